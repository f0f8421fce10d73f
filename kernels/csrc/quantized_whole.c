/* Weights of 4 or 8 bits times x in whole numbers: the quick way of quantized.c, for x of 16-bit floats.
 *
 * x is rounded to whole numbers of 16 bits with a power of two for each X_BLOCK inputs, and multiplied by codes exactly:
 * one instruction for 16 products, where floats take two. Sums over X_BLOCK inputs, or SEGMENT where groups are as small,
 * become floats, and are multiplied by both scales.
 *
 * A few rows wait for memory and for codes to be unpacked, which is done in registers; the lanes of a vector are inputs.
 * For more rows codes are unpacked once, into a panel in the L1 cache, by which all tiles are multiplied. There lanes are
 * columns, so that products of a whole segment become one float, and pairs of inputs lie beside each other:
 *
 *   x, int16 [in / PANEL_K][tiles][PANEL_K / 2][rows of the tile][2]
 *   w, int16 [PANEL_K / 2][PANEL_COLS][2]
 *
 * An output's bits depend on its own row and column, and on whether there are a few rows or many.
 */
#include "quantized.h"
#include "work_queue.h"

#ifdef __AVX2__
#define X_BLOCK 32 /* inputs of x that share a power of two */
#define COLS 4 /* at most, multiplied at once, for a few rows */
#define FEW_TILE 4 /* rows, likewise */
#define FEW_COLS 960 /* columns that a thread takes at once: long streams in the order of memory */
#define FEW_PARTS 4 /* of a thread's columns, or more: enough for it to find more when another is held up */
#define AHEAD 1024 /* bytes of codes, behind those that are read, to ask for */
#define TILE 4 /* rows, where there are many */
#define PANEL_COLS 16
#define PANEL_K 512 /* inputs of a panel, which is half an L1 cache; divides BLOCK_K */
#define MAX_ROWS 96 /* that a thread takes at once */
#define LINE 64 /* bytes */

/* Rows in whole numbers: x = integers * scale. */
typedef struct {
    int16_t *integers; /* as above; of a few rows [rows, padded_in] */
    float *scale;      /* [rows, padded_in / X_BLOCK], powers of two */
    float *sum;        /* [rows, sums_stride] of x: inputs' [k, k + block_of(x)) from k / SEGMENT on, as in `factors` */
    int64_t num_rows, num_tiles, padded_in, sums_stride;
    int few, bits;
} whole;

/* Inputs whose factors are taken at once. */
INLINE int64_t block_of(const whole *x) { return x->few ? BLOCK_K : PANEL_K; }

/* X_BLOCK numbers to whole ones below 2^15 times the scale that is returned; NaN where one is not finite. */
INLINE float round_block(int16_t *integers, const float *x) {
    float largest = 0.0f, up;
    int finite = 1;
    for (int j = 0; j < X_BLOCK; j++) largest = __builtin_fabsf(x[j]) > largest ? __builtin_fabsf(x[j]) : largest;
    for (int j = 0; j < X_BLOCK; j++) finite &= __builtin_fabsf(x[j]) <= 3.4e38f;
    uint32_t bits;
    memcpy(&bits, &largest, sizeof bits);
    int64_t up_by = 14 - ((int64_t)(bits >> 23) - 127); /* largest * 2^up_by is from 2^14 to 2^15 */
    up_by = min64(up_by, 126);
    uint32_t up_bits = (uint32_t)(up_by + 127) << 23;
    memcpy(&up, &up_bits, sizeof up);
    for (int j = 0; j < X_BLOCK; j++) {
        float shifted = x[j] * up + 12582912.0f; /* 1.5 * 2^23: rounds, and leaves the number in the low bits */
        uint32_t low;
        memcpy(&low, &shifted, sizeof low);
        integers[j] = finite ? (int16_t)(low & 0xffff) : 0;
    }
    return finite ? 1.0f / up : __builtin_nanf("");
}

/* Input of the pair that stands at inputs j and j + 1. Of four codes of 8 bits in a word the even and the odd ones are pairs,
 * which a mask and a shift take out. */
INLINE int first_of_pair(int j, int bits) { return bits == 8 ? j / 4 * 4 + j % 4 / 2 : j; }

/* Where X_BLOCK inputs from i on of row `first` + `r` go, the first rows of whose tile is `first`. */
INLINE void put_block(const whole *to, const int16_t *integers, int64_t first, int64_t r, int64_t height, int64_t i) {
    if (to->few) {
        memcpy(to->integers + (first + r) * to->padded_in + i, integers, X_BLOCK * sizeof *integers);
        return;
    }
    int64_t k = i / PANEL_K * PANEL_K, dim = min64(PANEL_K, to->padded_in - k);
    int16_t *tile = to->integers + k * to->num_rows + first * dim;
    for (int j = 0; j < X_BLOCK; j += 2) {
        int16_t *pair = tile + (i - k + j) * height + 2 * r;
        pair[0] = integers[first_of_pair(j, to->bits)];
        pair[1] = integers[first_of_pair(j, to->bits) + (to->bits == 8 ? 2 : 1)];
    }
}

/* Rounds row `first` + `r` of a tile of `height` rows. */
INLINE void round_row(const whole *to, int64_t first, int64_t r, int64_t height, const void *from, int64_t size, int shift,
                      int dtype) {
    float *scales = to->scale + (first + r) * (to->padded_in / X_BLOCK), *sums = to->sum + (first + r) * to->sums_stride;
    int64_t block = block_of(to);
    memset(sums, 0, to->sums_stride * sizeof *sums);
    for (int64_t i = 0; i < to->padded_in; i += X_BLOCK) {
        int16_t integers[X_BLOCK];
        float x[X_BLOCK];
        for (int64_t j = 0; j < X_BLOCK; j += VL)
            store(x, j, i + j < size ? load_upto(from, (first + r) * size + i + j, size - i - j, dtype) : (vf){0}, F32);
        float scale = round_block(integers, x);
        put_block(to, integers, first, r, height, i);
        scales[i / X_BLOCK] = scale;
        for (int64_t j = 0; j < X_BLOCK; j += SEGMENT) {
            int32_t sum = 0;
            for (int n = 0; n < SEGMENT; n++) sum += integers[j + n];
            sums[i / block * block / SEGMENT + ((i % block + j) >> shift)] += (float)sum * scale; /* below 2^19: exact */
        }
    }
}

static void round_tile(const whole *to, int64_t tile, const void *from, int64_t size, int shift, int dtype) {
    int64_t first = tile_start(tile, to->num_rows, to->num_tiles);
    int64_t height = tile_start(tile + 1, to->num_rows, to->num_tiles) - first;
    for (int64_t r = 0; r < height; r++) {
        if (dtype == BF16) round_row(to, first, r, height, from, size, shift, BF16);
        if (dtype == F16) round_row(to, first, r, height, from, size, shift, F16);
    }
}

INLINE __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

/* Codes of inputs 32 * half .. of PAD, which lie in `words` for 4 bits. */
INLINE void codes_of_half(__m256i code[2], __m256i words, const uint8_t *from, int half, int bits) {
    const __m256i low = _mm256_set1_epi16(15);
    if (bits == 8) {
        code[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + 32 * half)));
        code[1] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + 32 * half + 16)));
    } else {
        code[0] = _mm256_and_si256(half ? _mm256_srli_epi16(words, 8) : words, low);
        code[1] = half ? _mm256_srli_epi16(words, 12) : _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
    }
}

/* sums[r * FEW_COLS + c * apart] += x[row + r] . w[col + c * apart] over size inputs; of columns from col on there are
 * `cols`. */
INLINE void dot_whole(float *sums, const whole *x, int64_t row, const quantized *w, int64_t col, int64_t cols,
                      int64_t apart, int64_t k, int64_t size, int bits, int rows, int num_cols) {
    float scale[FEW_TILE * COLS][BLOCK_K / X_BLOCK]; /* of x's whole numbers times the weight's codes */
    v8 acc[FEW_TILE * COLS] = {{0}};
    const uint8_t *codes[COLS];
    int64_t num_blocks = w->padded_in / X_BLOCK, n_groups = ((size - 1) >> w->shift) + 1;
    const int16_t *integers = x->integers + row * w->padded_in + k;
    int has_offsets = bits == 4 || w->zeros || w->offsets, spread = w->shift - 5;
    __m256i lane = _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm_cvtsi32_si128(spread));
    float extra[FEW_TILE * COLS] = {0};
    int64_t group = k / w->group_size, plain_group = bits == 4 ? X_BLOCK : 2 * X_BLOCK; /* as `--quantization` makes weights */
    int is_plain = !w->zeros && !w->offsets && w->scale_dtype == BF16 && w->group_size == plain_group &&
                   size % (8 * X_BLOCK) == 0 && (k + size) / plain_group <= w->num_groups;
    UNROLL for (int c = 0; c < num_cols; c++) {
        factors f;
        int64_t out = col + min64(c * apart, cols - 1);
        codes[c] = w->codes + out * w->row_bytes + k * bits / 8;
        __builtin_prefetch(at(w->scales, (out + 4) * w->num_groups + group, w->scale_dtype));
        if (is_plain) { /* what load_factors would make of it, in registers */
            const uint16_t *from = (const uint16_t *)w->scales + out * w->num_groups + k / plain_group;
            for (int64_t n = 0; n < size / X_BLOCK; n += 8) {
                __m128i some = bits == 4 ? _mm_loadu_si128((const __m128i *)(from + n))
                                         : _mm_loadl_epi64((const __m128i *)(from + n / 2));
                v8 scales = (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16);
                if (bits == 8) scales = __builtin_shufflevector(scales, scales, 0, 0, 1, 1, 2, 2, 3, 3);
                UNROLL for (int r = 0; r < rows; r++) {
                    const float *x_scale = x->scale + (row + r) * num_blocks + k / X_BLOCK;
                    const float *group_sum = x->sum + (row + r) * x->sums_stride + k / SEGMENT;
                    *(v8_mem *)(scale[r * num_cols + c] + n) = scales * *(const v8_mem *)(x_scale + n);
                    if (bits == 4)
                        acc[r * num_cols + c] =
                            fma8(scales * -8.0f, *(const v8_mem *)(group_sum + n), acc[r * num_cols + c]);
                }
            }
            continue;
        }
        load_factors(&f, w, out, k, size, 8);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *x_scale = x->scale + (row + r) * num_blocks + k / X_BLOCK;
            int64_t n = 0, end = size / X_BLOCK;
            for (; n + 8 <= end; n += 8) {
                __m256 scales = _mm256_loadu_ps(f.scale + (n >> spread));
                v8 product = (v8)_mm256_permutevar8x32_ps(scales, lane) * *(const v8_mem *)(x_scale + n);
                *(v8_mem *)(scale[r * num_cols + c] + n) = product;
            }
            for (; n < end; n++) scale[r * num_cols + c][n] = f.scale[n >> spread] * x_scale[n];
            if (!has_offsets) continue;
            const float *group_sum = x->sum + (row + r) * x->sums_stride + k / SEGMENT;
            int64_t g = 0;
            for (; g + 8 <= n_groups; g += 8)
                acc[r * num_cols + c] =
                    fma8(*(const v8_mem *)(f.offset + g), *(const v8_mem *)(group_sum + g), acc[r * num_cols + c]);
            for (; g < n_groups; g++) extra[r * num_cols + c] += f.offset[g] * group_sum[g];
        }
    }
    for (int64_t i = 0, byte = 0; i < size; i += PAD, byte += PAD * bits / 8) {
        __m256i words[COLS];
        UNROLL for (int c = 0; c < num_cols; c++) {
            __builtin_prefetch(codes[c] + byte + AHEAD);
            if (bits == 4) words[c] = _mm256_loadu_si256((const __m256i *)(codes[c] + byte));
        }
        UNROLL for (int half = 0; half < 2; half++) {
            const __m256i *a = (const __m256i *)(integers + i + half * X_BLOCK);
            __m256i a0 = _mm256_loadu_si256(a), a1 = _mm256_loadu_si256(a + 1);
            if (rows == 1) { /* the same for all columns */
                KEEP(a0);
                KEEP(a1);
            }
            UNROLL for (int c = 0; c < num_cols; c++) {
                __m256i code[2];
                codes_of_half(code, words[c], codes[c] + byte, half, bits);
                UNROLL for (int r = 0; r < rows; r++) {
                    const __m256i *b = (const __m256i *)(integers + r * w->padded_in + i + half * X_BLOCK);
                    __m256i sum = _mm256_madd_epi16(code[0], r ? _mm256_loadu_si256(b) : a0);
                    sum = multiply_add(sum, code[1], r ? _mm256_loadu_si256(b + 1) : a1);
                    v8 factor = splat8(scale[r * num_cols + c][i / X_BLOCK + half]);
                    acc[r * num_cols + c] = fma8((v8)_mm256_cvtepi32_ps(sum), factor, acc[r * num_cols + c]);
                }
            }
        }
    }
    float result[FEW_TILE * COLS];
    UNROLL for (int i = 0; i < rows * num_cols; i += 4) {
        v8 a = add_pairs(add_pairs(acc[i], acc[i + 1]), add_pairs(acc[i + 2], acc[i + 3]));
        *(v4_mem *)(result + i) = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < num_cols; c++)
            sums[r * FEW_COLS + c * apart] += result[r * num_cols + c] + extra[r * num_cols + c];
}

/* out[all rows, col ..] of a few rows, for at most FEW_COLS. Columns that are multiplied at once stand far apart: so each
 * is one of a few streams in the order of memory, which is what the processor's prefetcher follows. */
INLINE void few_rows(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols, int bits) {
    int64_t num_rows = x->num_rows;
    memset(sums, 0, num_rows * FEW_COLS * sizeof *sums);
    int64_t step = num_rows == 1 ? COLS : num_rows == 2 ? 2 : 1, apart = (num_cols + step - 1) / step;
    int64_t tiles = (num_rows + FEW_TILE - 1) / FEW_TILE;
    for (int64_t c = 0; c < apart; c++)
        for (int64_t k = 0; k < w->padded_in; k += BLOCK_K) /* as the codes lie in memory */
            for (int64_t t = 0; t < tiles; t++) {
                int64_t size = min64(BLOCK_K, w->padded_in - k), row = num_rows * t / tiles;
                float *to = sums + row * FEW_COLS + c;
                int64_t rows = num_rows * (t + 1) / tiles - row, cols = num_cols - c;
                if (step == COLS) dot_whole(to, x, row, w, col + c, cols, apart, k, size, bits, 1, COLS);
                if (step == 2) dot_whole(to, x, row, w, col + c, cols, apart, k, size, bits, 2, 2);
                if (step == 1 && rows == 2) dot_whole(to, x, row, w, col + c, cols, apart, k, size, bits, 2, 1);
                if (step == 1 && rows == 3) dot_whole(to, x, row, w, col + c, cols, apart, k, size, bits, 3, 1);
                if (step == 1 && rows == 4) dot_whole(to, x, row, w, col + c, cols, apart, k, size, bits, 4, 1);
            }
}

static void few_rows_4(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols) {
    few_rows(x, w, sums, col, num_cols, 4);
}

static void few_rows_8(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols) {
    few_rows(x, w, sums, col, num_cols, 8);
}

/* PANEL_COLS columns of at most PANEL_K inputs, unpacked, and what comes out of it. */
typedef struct {
    int32_t codes[PANEL_K / 2 * PANEL_COLS]; /* pairs of int16 */
    float scale[PANEL_K / SEGMENT][PANEL_COLS], offset[PANEL_K / SEGMENT][PANEL_COLS]; /* in the order of `factors` */
    float sums[MAX_ROWS * PANEL_COLS];
} panel;

/* Element j of v[i] to element i of v[j]. */
INLINE void transpose(v8 v[8]) {
    v8 a[8], b[8];
    UNROLL for (int i = 0; i < 4; i++) {
        a[i] = (v8)_mm256_unpacklo_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
        a[4 + i] = (v8)_mm256_unpackhi_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* columns i % 2 of 4 rows, then those behind */
        v8 low = a[i / 2 * 4 + i % 2 * 2], high = a[i / 2 * 4 + i % 2 * 2 + 1];
        b[2 * i] = (v8)_mm256_unpacklo_pd((__m256d)low, (__m256d)high);
        b[2 * i + 1] = (v8)_mm256_unpackhi_pd((__m256d)low, (__m256d)high);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        v8 low = b[i / 2 * 4 + i % 2], high = b[i / 2 * 4 + 2 + i % 2];
        v[i] = (v8)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x20);
        v[4 + i] = (v8)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x31);
    }
}

/* to[PANEL_COLS * pair]: pairs of PAD inputs of 8 rows of codes, less `zero` for 4 bits. */
INLINE void unpack(int32_t *to, const uint8_t *const from[8], int bits, int zero) {
    __m256i low = _mm256_set1_epi16(bits == 4 ? 15 : 255), less = _mm256_set1_epi16((int16_t)(bits == 4 ? zero : 128));
    for (int half = 0; half < bits / 4; half++) {
        v8 words[8];
        UNROLL for (int c = 0; c < 8; c++) words[c] = *(const v8_mem *)(from[c] + 32 * half);
        transpose(words);
        UNROLL for (int j = 0; j < 8; j++) {
            __m256i word = (__m256i)words[j];
            if (bits == 8) word = _mm256_xor_si256(word, _mm256_set1_epi8(-128)); /* from 0 to 255, until `less` */
            UNROLL for (int s = 0; s < 16 / bits; s++) {
                __m256i codes = _mm256_and_si256(_mm256_srli_epi16(word, bits * s), low);
                int pair = bits == 4 ? 8 * s + j : 16 * half + 2 * j + s;
                *(__m256i *)(to + pair * PANEL_COLS) = _mm256_sub_epi16(codes, less);
            }
        }
    }
}

/* Unpacks inputs [k, k + size) of `num_cols` columns from col on; the last stands for those that are not there. */
INLINE void fill_panel(panel *p, const quantized *w, int64_t col, int64_t num_cols, int64_t k, int64_t size, int bits) {
    int has_offsets = w->zeros || w->offsets;
    int64_t num_factors = ((size - 1) >> w->shift) + 1;
    for (int64_t c = 0; c < PANEL_COLS; c += 8) {
        factors f[8];
        const uint8_t *from[8];
        for (int i = 0; i < 8; i++) {
            int64_t row = col + min64(c + i, num_cols - 1);
            from[i] = w->codes + row * w->row_bytes + k * bits / 8;
            load_factors(&f[i], w, row, k, size, 8);
        }
        for (int64_t i = 0; i < size; i += PAD) {
            unpack(p->codes + i / 2 * PANEL_COLS + c, from, bits, has_offsets ? 0 : 8);
            UNROLL for (int j = 0; j < 8; j++) from[j] += PAD * bits / 8;
        }
        for (int64_t n = 0; n < num_factors; n += 8) {
            v8 scale[8], offset[8];
            UNROLL for (int i = 0; i < 8; i++) scale[i] = *(const v8_mem *)(f[i].scale + n);
            transpose(scale);
            UNROLL for (int i = 0; i < 8; i++) *(v8_mem *)(p->scale[n + i] + c) = scale[i];
            if (!has_offsets) continue;
            UNROLL for (int i = 0; i < 8; i++) offset[i] = *(const v8_mem *)(f[i].offset + n);
            transpose(offset);
            UNROLL for (int i = 0; i < 8; i++) *(v8_mem *)(p->offset[n + i] + c) = offset[i];
        }
    }
}

/* sum += a * b of pairs. GCC left alone makes many products before it adds them, and moves them to memory. */
INLINE void add_products(__m256i *sum, __m256i a, __m256i b) {
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(a), "x"(b));
}

/* sums[r] += x[r] . w, for PANEL_COLS columns and inputs [k, k + size); x and the scales of its segments are a tile's. */
INLINE void multiply_tile(float *sums, const panel *p, const whole *x, int64_t row, int64_t k, int64_t size, int shift,
                          int has_offsets, int rows, int segment) {
    const int32_t *pairs = (const int32_t *)(x->integers + k * x->num_rows + row * size);
    for (int64_t i = 0; i < size; i += segment) {
        __m256i acc[TILE][2] = {{{0}}};
        const __m256i *w = (const __m256i *)(p->codes + i / 2 * PANEL_COLS);
        const int32_t *a = pairs + i / 2 * rows;
        UNROLL for (int j = 0; j < segment / 2; j++, w += 2, a += rows) {
            __m256i b0 = w[0], b1 = w[1];
            KEEP(b0);
            KEEP(b1);
            UNROLL for (int r = 0; r < rows; r++) {
                __m256i both = _mm256_set1_epi32(a[r]);
                add_products(&acc[r][0], both, b0);
                add_products(&acc[r][1], both, b1);
            }
        }
        const float *scale = p->scale[i >> shift];
        UNROLL for (int r = 0; r < rows; r++) {
            v8 x_scale = splat8(x->scale[(row + r) * (x->padded_in / X_BLOCK) + (k + i) / X_BLOCK]);
            UNROLL for (int h = 0; h < 2; h++) {
                v8_mem *to = (v8_mem *)(sums + r * PANEL_COLS + 8 * h);
                *to = fma8((v8)_mm256_cvtepi32_ps(acc[r][h]) * x_scale, *(const v8_mem *)(scale + 8 * h), *to);
            }
        }
    }
    if (!has_offsets) return;
    for (int64_t n = 0; n <= (size - 1) >> shift; n++)
        UNROLL for (int r = 0; r < rows; r++) {
            v8 sum = splat8(x->sum[(row + r) * x->sums_stride + k / SEGMENT + n]);
            UNROLL for (int h = 0; h < 2; h++) {
                v8_mem *to = (v8_mem *)(sums + r * PANEL_COLS + 8 * h);
                *to = fma8(*(const v8_mem *)(p->offset[n] + 8 * h), sum, *to);
            }
        }
}

/* Rows of the tiles by the PANEL_COLS columns from col on, to p->sums; asks for the codes of those from `next` on. */
INLINE void multiply_panel(panel *p, const whole *x, const quantized *w, int64_t first_tile, int64_t last_tile, int64_t col,
                           int64_t num_cols, int64_t next, int bits, int segment) {
    int64_t start = tile_start(first_tile, x->num_rows, x->num_tiles), num_tiles = last_tile - first_tile, share = 0;
    /* An equal share of the next columns' codes with each block of inputs and tile. */
    int64_t lines = num_cols * w->row_bytes / LINE, shares = (w->padded_in + PANEL_K - 1) / PANEL_K * num_tiles, asked = 0;
    int has_offsets = w->zeros || w->offsets;
    memset(p->sums, 0, sizeof p->sums);
    for (int64_t k = 0; k < w->padded_in; k += PANEL_K) {
        int64_t size = min64(PANEL_K, w->padded_in - k);
        fill_panel(p, w, col, num_cols, k, size, bits);
        for (int64_t t = first_tile; t < last_tile; t++) {
            int64_t row = tile_start(t, x->num_rows, x->num_tiles);
            float *sums = p->sums + (row - start) * PANEL_COLS;
            for (share++; asked < lines * share / shares; asked++)
                __builtin_prefetch(w->codes + next * w->row_bytes + asked * LINE);
            switch (tile_start(t + 1, x->num_rows, x->num_tiles) - row) {
            case 2: multiply_tile(sums, p, x, row, k, size, w->shift, has_offsets, 2, segment); break;
            case 3: multiply_tile(sums, p, x, row, k, size, w->shift, has_offsets, 3, segment); break;
            default: multiply_tile(sums, p, x, row, k, size, w->shift, has_offsets, TILE, segment);
            }
        }
    }
}

typedef void multiply(panel *, const whole *, const quantized *, int64_t, int64_t, int64_t, int64_t, int64_t);
#define MULTIPLY(bits, segment) \
    static void multiply_##bits##_##segment(panel *p, const whole *x, const quantized *w, int64_t first_tile, \
                                            int64_t last_tile, int64_t col, int64_t num_cols, int64_t next) { \
        multiply_panel(p, x, w, first_tile, last_tile, col, num_cols, next, bits, segment); \
    }
MULTIPLY(4, 32)
MULTIPLY(8, 32)
MULTIPLY(8, 16)

static void store_columns(void *out, int dtype, int64_t out_features, const float *sums, int64_t stride, int64_t first,
                          int64_t num_rows, int64_t col, int64_t num_cols) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL)
            store_upto(out, (first + r) * out_features + col + c, load(sums, r * stride + c, F32), num_cols - c, dtype);
}

INLINE int64_t num_passes(int64_t num_rows) { return (num_rows + PASS_ROWS - 1) / PASS_ROWS; }

static void work_few(const whole *x, const quantized *w, void *out, int dtype, work_queue *queues, int num_queues,
                     int64_t parts) {
    float sums[FEW_ROWS * FEW_COLS];
    for (int64_t part; (part = take_task(queues, num_queues, thread_index())) >= 0;) {
        int64_t col = w->out_features * part / parts, num_cols = w->out_features * (part + 1) / parts - col;
        (w->bits == 4 ? few_rows_4 : few_rows_8)(x, w, sums, col, num_cols);
        store_columns(out, dtype, w->out_features, sums, FEW_COLS, 0, x->num_rows, col, num_cols);
    }
}

static void work_many(const whole *x, const quantized *w, void *out, int dtype, work_queue *queues, int num_queues,
                      int64_t row_parts, panel *p) {
    multiply *by = w->bits == 4 ? multiply_4_32 : w->group_size % X_BLOCK ? multiply_8_16 : multiply_8_32;
    for (int64_t task; (task = take_task(queues, num_queues, thread_index())) >= 0;) {
        int64_t part = task % row_parts, col = task / row_parts * PANEL_COLS;
        int64_t num_cols = min64(PANEL_COLS, w->out_features - col);
        int64_t first_tile = x->num_tiles * part / row_parts, last_tile = x->num_tiles * (part + 1) / row_parts;
        int64_t first = tile_start(first_tile, x->num_rows, x->num_tiles);
        int64_t num_rows = tile_start(last_tile, x->num_rows, x->num_tiles) - first;
        by(p, x, w, first_tile, last_tile, col, num_cols, part + 1 == row_parts ? col + num_cols : col);
        store_columns(out, dtype, w->out_features, p->sums, PANEL_COLS, first, num_rows, col, num_cols);
    }
}

int octavo_linear_whole(const void *x, int dtype, const quantized *w, void *out, int64_t num_rows, int64_t in_features,
                        int num_threads) {
    int few = num_rows <= FEW_ROWS;
    int64_t passes = num_passes(num_rows), pass_rows = (num_rows + passes - 1) / passes, padded_in = w->padded_in;
    int64_t sums_stride = (padded_in + BLOCK_K - 1) / BLOCK_K * (BLOCK_K / SEGMENT);
    int64_t row_size = padded_in * 2 + padded_in / X_BLOCK * 4 + sums_stride * 4;
    char *memory = aligned_alloc(64, (num_threads * sizeof(work_queue) + pass_rows * row_size + 127) / 64 * 64);
    if (!memory) return -1;
    work_queue *queues = (work_queue *)memory;
    int16_t *integers = (int16_t *)(queues + num_threads);
    float *scale = (float *)(integers + pass_rows * padded_in), *sums = scale + pass_rows * (padded_in / X_BLOCK);
    int64_t parts = few ? num_parts(w->out_features, FEW_COLS, FEW_PARTS, num_threads)
                        : (w->out_features + PANEL_COLS - 1) / PANEL_COLS;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        panel *p = few ? NULL : aligned_alloc(64, (sizeof(panel) + 63) / 64 * 64);
        if (!few && !p) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t pass = 0; pass < passes; pass++) {
            int64_t first = num_rows * pass / passes, rows = num_rows * (pass + 1) / passes - first;
            int64_t row_parts = few ? 1 : (rows + MAX_ROWS - 1) / MAX_ROWS;
            whole rounded = {integers, scale, sums, rows, (rows + TILE - 1) / TILE, padded_in, sums_stride, few, w->bits};
#pragma omp for
            for (int64_t t = 0; t < rounded.num_tiles; t++)
                round_tile(&rounded, t, at(x, first * in_features, dtype), in_features, w->shift, dtype);
#pragma omp for
            for (int i = 0; i < num_threads; i++) fill_queue(queues, num_threads, i, parts * row_parts);
            void *to = (char *)out + first * w->out_features * size_of(dtype);
            if (few) work_few(&rounded, w, to, dtype, queues, num_threads, parts);
            if (p) work_many(&rounded, w, to, dtype, queues, num_threads, row_parts, p);
#pragma omp barrier
        }
        free(p);
    }
    free(memory);
    return failed ? -1 : 0;
}
#else
int octavo_linear_whole(const void *x, int dtype, const quantized *w, void *out, int64_t num_rows, int64_t in_features,
                        int num_threads) {
    (void)x, (void)dtype, (void)w, (void)out, (void)num_rows, (void)in_features, (void)num_threads;
    return -1; /* not reached: see whole_is_quick */
}
#endif
