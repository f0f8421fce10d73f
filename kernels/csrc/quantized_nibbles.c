/* A few rows in whole numbers of 8 bits times codes of 4: see quantized_whole.c.
 *
 * A vector of codes has four inputs of each of eight weight rows, in words of 32 bits: so the lanes are columns, products of
 * X_BLOCK inputs become one number of 16 bits for each half of a word, and one float for each column. Two blocks of eight
 * columns, which stand far apart, are multiplied at once where there are few enough rows: two streams in the order of
 * memory, and each word of x is loaded for both.
 */
#include "quantized_whole.h"

#ifdef __AVX2__
#define MAX_BLOCKS 2
#define MAX_FACTORS (BLOCK_K / X_BLOCK)

typedef struct {
    float scale[MAX_FACTORS * NIBBLE_ROWS], offset[MAX_FACTORS * NIBBLE_ROWS];
} column_factors;

/* acc[row][block] += x[row + r] . w over inputs [k, k + size), but for offsets; codes[b] begin at input k. */
INLINE void dot_codes(v8 acc[FEW_TILE][MAX_BLOCKS], const whole *x, int64_t row, const uint8_t *const codes[MAX_BLOCKS],
                      const column_factors f[MAX_BLOCKS], int64_t k, int64_t size, int spread, int has_offsets, int rows,
                      int blocks) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    int64_t x_blocks = x->padded_in / X_BLOCK;
    for (int64_t i = 0; i < size; i += PAD) {
        __m256i sum[2][FEW_TILE][MAX_BLOCKS] = {{{{0}}}}; /* of the lower and the upper half of the inputs */
        int64_t from = codes_between(i, 4);
        UNROLL for (int v = 0; v < PAD / 8; v++) {
            __m256i half[2][MAX_BLOCKS];
            UNROLL for (int b = 0; b < blocks; b++) {
                const uint8_t *at = codes[b] + from + v * 32;
                if (v % 2 == 0) __builtin_prefetch(at + AHEAD);
                __m256i words = _mm256_loadu_si256((const __m256i *)at);
                half[0][b] = _mm256_and_si256(words, nibble);
                half[1][b] = _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                const int8_t *four = (const int8_t *)x->integers + (row + r) * x->padded_in + k + i + 4 * v;
                UNROLL for (int h = 0; h < 2; h++) {
                    __m256i all = (__m256i)_mm256_broadcast_ss((const float *)(four + h * X_BLOCK));
                    UNROLL for (int b = 0; b < blocks; b++) add_fours(&sum[h][r][b], half[h][b], all);
                }
            }
        }
        UNROLL for (int h = 0; h < 2; h++)
            UNROLL for (int r = 0; r < rows; r++) {
                int64_t n = (row + r) * x_blocks + (k + i) / X_BLOCK + h;
                v8 x_scale = splat8(x->scale[n]);
                __m256i zero = _mm256_set1_epi32(x->zero[n]);
                UNROLL for (int b = 0; b < blocks; b++) {
                    __m256i all = _mm256_madd_epi16(sum[h][r][b], ones); /* of 8 times 2 products below 15 * 127 */
                    if (!has_offsets) all = _mm256_sub_epi32(all, zero);
                    const v8_mem *by = (const v8_mem *)(f[b].scale + ((i / X_BLOCK + h) >> spread) * NIBBLE_ROWS);
                    acc[r][b] = fma8((v8)_mm256_cvtepi32_ps(all) * x_scale, *by, acc[r][b]);
                }
            }
    }
}

/* sums[r * FEW_COLS + b * apart + ..] = x[row + r] . w[col + b * apart + ..] of `blocks` blocks of columns. */
INLINE void dot_blocks(float *sums, const whole *x, int64_t row, const quantized *w, int64_t col, int64_t apart, int rows,
                       int blocks) {
    int has_offsets = w->zeros || w->offsets;
    v8 acc[FEW_TILE][MAX_BLOCKS] = {{{0}}};
    for (int64_t k = 0; k < w->padded_in; k += BLOCK_K) {
        int64_t size = min64(BLOCK_K, w->padded_in - k), num_factors = ((size - 1) >> w->shift) + 1;
        column_factors f[MAX_BLOCKS];
        const uint8_t *codes[MAX_BLOCKS] = {NULL};
        for (int b = 0; b < blocks; b++) {
            int64_t row_of = col + b * apart;
            octavo_quantized_columns(f[b].scale, f[b].offset, NIBBLE_ROWS, w, row_of, k, size);
            codes[b] = w->codes + row_of * w->row_bytes + codes_between(k, 4);
        }
        dot_codes(acc, x, row, codes, f, k, size, w->shift - 5, has_offsets, rows, blocks);
        for (int64_t n = 0; has_offsets && n < num_factors; n++)
            UNROLL for (int r = 0; r < rows; r++) {
                v8 sum = splat8(x->sum[(row + r) * x->sums_stride + k / SEGMENT + n]);
                UNROLL for (int b = 0; b < blocks; b++)
                    acc[r][b] = fma8(*(const v8_mem *)(f[b].offset + n * NIBBLE_ROWS), sum, acc[r][b]);
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int b = 0; b < blocks; b++) *(v8_mem *)(sums + r * FEW_COLS + b * apart) = acc[r][b];
}

typedef void dot(float *, const whole *, int64_t, const quantized *, int64_t, int64_t);
#define DOT(rows, blocks) \
    static void dot_##rows##_##blocks(float *sums, const whole *x, int64_t row, const quantized *w, int64_t col, \
                                      int64_t apart) { \
        dot_blocks(sums, x, row, w, col, apart, rows, blocks); \
    }
DOT(1, 1)
DOT(2, 1)
DOT(3, 1)
DOT(4, 1)
DOT(2, 2)
DOT(1, 2)

void octavo_few_nibbles(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols) {
    static dot *const one[] = {dot_1_1, dot_2_1, dot_3_1, dot_4_1}, *const two[] = {dot_1_2, dot_2_2};
    int64_t num_blocks = (num_cols + NIBBLE_ROWS - 1) / NIBBLE_ROWS, tiles = (x->num_rows + FEW_TILE - 1) / FEW_TILE;
    int64_t at_once = x->num_rows <= 2 ? 2 : 1, steps = num_blocks / at_once;
    for (int64_t block = 0; block < steps + num_blocks % at_once; block++) {
        int is_last = block == steps; /* one that has no second */
        int64_t c = (is_last ? num_blocks - 1 : block) * NIBBLE_ROWS;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = x->num_rows * t / tiles, rows = x->num_rows * (t + 1) / tiles - row;
            dot *by = at_once == 1 || is_last ? one[rows - 1] : two[rows - 1];
            by(sums + row * FEW_COLS + c, x, row, w, col + c, steps * NIBBLE_ROWS);
        }
    }
}
#endif
