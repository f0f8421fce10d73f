/* y = x w^T for weights of 4 or 8 bits with a scale for each group of inputs: see linear_quantized.py.
 *
 * A weight is widened to float32 as fma(code, scale, offset), in registers, before it is multiplied. Several rows share
 * that work: w is then widened into a buffer in the L1 cache and multiplied in tiles whose sums stay in registers.
 *
 *   codes, 4 bits [out / 8][in / 64][8][8][4]: byte b of word [j][row] has weights 4 j + b and, above it, 32 + 4 j + b of
 *                                     64: a mask, and a shift, take 4 of each of 8 rows out as integers. Of one row's 8
 *                                     words, put side by side, a mask and an exact power of two take 8 as floats: bits
 *                                     4 t .. 4 t + 3 of word j are weight 32 (t % 2) + 4 j + t / 2
 *   codes, 8 bits [out][in]           signed
 *   x, float32 [in / BLOCK_K][tiles][BLOCK_K / VL][rows of the tile][VL]    inputs in the order in which weights come out
 *   w, float32 [BLOCK_K / VL][COLS][VL]
 *
 * One row or many, each output is summed over BLOCK_K inputs in VL lanes, then by one tree, then block after block: so
 * its bits depend on its own row and column alone, not on the number of rows, the tile, or the number of threads.
 *
 * That takes 4 instructions for 8 weights, which is more than the memory needs to bring 4 bits. The quick way for 16-bit
 * floats has x in whole numbers of 16 bits, and multiplies them by codes: see quantized_whole.c.
 */
#include "quantized.h"

#ifdef __AVX512F__
#define TILE 6 /* rows; with COLS, TILE * COLS + TILE + 1 registers of the CPU's 32 (16 with AVX2) */
#else
#define TILE 3
#endif
#define COLS 4 /* weight rows in a tile: COLS * BLOCK_K floats are half an L1 cache */
#define MAX_ROWS 96 /* rows whose BLOCK_K floats stay in the L2 cache; a multiple of TILE */
#define MAX_COLS 128 /* columns that a thread takes at once; a multiple of COLS */
#define NUM_ACC (VL / 8)

/* PAD codes of one row: of 4 bits in a register, of 8 in memory. */
typedef struct {
    i8 words;
    const uint8_t *codes;
} block;

INLINE block load_block(const uint8_t *codes, int bits) {
    block b = {{0}, codes};
    if (bits == 8) return b;
    int32_t words[8];
    UNROLL for (int j = 0; j < 8; j++) memcpy(words + j, codes + 4 * NIBBLE_ROWS * j, 4);
    memcpy(&b.words, words, sizeof words);
    return b;
}

/* Vector t of a block that starts at input k + i. Call with t from 0 to 7 in turn. */
INLINE v8 decode(block *b, const factors *f, int64_t i, int shift, int t, int bits, int segment) {
    int64_t at = (i + (bits == 4 ? t % 2 * 32 : 8 * t / segment * segment)) >> shift;
    v8 offset = splat8(f->offset[at]);
    if (bits == 4) { /* code * 16^t is a whole number below 2^24, and the scale's factor a power of two: exact */
        v8 code = __builtin_convertvector(b->words & (15 << 4 * (t % 4)), v8);
        if (t == 3) b->words = (i8)((u8)b->words >> 16);
        return fma8(code, splat8(f->scale[4 * at + t % 4]), offset);
    }
#ifdef __AVX2__
    v8 code = (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(b->codes + 8 * t))));
#else
    v8 code;
    UNROLL for (int j = 0; j < 8; j++) code[j] = (float)(int8_t)b->codes[8 * t + j];
#endif
    return fma8(code, splat8(f->scale[at]), offset);
}

/* sums[c] += x . w[c] over size inputs, for COLS weight rows, of which there are `cols`; one row of x, in order. */
INLINE void dot_row(float *sums, const float *x, const quantized *w, int64_t col, int64_t cols, int64_t k, int64_t size,
                    int bits, int segment) {
    factors f[COLS];
    v8 acc[COLS][NUM_ACC] = {{{0}}};
    const uint8_t *codes[COLS];
    UNROLL for (int c = 0; c < COLS; c++) {
        int64_t row = col + min64(c, cols - 1);
        load_factors(&f[c], w, row, k, size, bits);
        codes[c] = codes_of((uint8_t *)w->codes, row, w->padded_in, bits) + codes_between(k, bits);
    }
    int64_t ahead = (bits == 4 ? NIBBLE_ROWS : COLS) * w->row_bytes;
    for (int64_t i = 0; i < size; i += PAD) {
        block b[COLS];
        UNROLL for (int c = 0; c < COLS; c++) {
            b[c] = load_block(codes[c] + codes_between(i, bits), bits);
            __builtin_prefetch(b[c].codes + ahead);
        }
        UNROLL for (int t = 0; t < 8; t++) { /* column by column: their sums do not wait for each other */
            v8 a = *(const v8_mem *)(x + i + 8 * t);
            UNROLL for (int c = 0; c < COLS; c++)
                acc[c][t % NUM_ACC] =
                    fma8(decode(&b[c], &f[c], i, w->shift, t, bits, segment), a, acc[c][t % NUM_ACC]);
        }
    }
    v8 folded[COLS];
    UNROLL for (int c = 0; c < COLS; c++) folded[c] = NUM_ACC == 1 ? acc[c][0] : acc[c][0] + acc[c][NUM_ACC - 1];
    v8 a = add_pairs(add_pairs(folded[0], folded[1]), add_pairs(folded[2], folded[3]));
    v4_mem *to = (v4_mem *)sums;
    *to = *to + (low_four(a) + high_four(a));
}

/* Widens COLS weight rows, of which there are `cols`, for a tile. */
INLINE void decode_rows(float *to, const quantized *w, int64_t col, int64_t cols, int64_t k, int64_t size, int bits,
                        int segment) {
    factors f;
    for (int c = 0; c < COLS; c++) {
        int64_t row = col + min64(c, cols - 1);
        const uint8_t *codes = codes_of((uint8_t *)w->codes, row, w->padded_in, bits) + codes_between(k, bits);
        load_factors(&f, w, row, k, size, bits);
        for (int64_t i = 0; i < size; i += PAD) {
            block b = load_block(codes + codes_between(i, bits), bits);
            __builtin_prefetch(b.codes + COLS * w->row_bytes); /* while these are multiplied */
            UNROLL for (int t = 0; t < 8; t++) /* vector t / NUM_ACC of column c, its lanes from t % NUM_ACC * 8 */
                *(v8_mem *)(to + (i + t / NUM_ACC * VL) * COLS + c * VL + t % NUM_ACC * 8) =
                    decode(&b, &f, i, w->shift, t, bits, segment);
        }
    }
}

/* sums[r * MAX_COLS + c] += x[r] . w[c] over num_vectors * VL inputs, for `rows` rows and COLS columns. */
INLINE void dot_tile(float *sums, const float *x, const float *w, int64_t num_vectors, int rows) {
    vf acc[TILE * COLS] = {{0}};
    for (int64_t i = 0; i < num_vectors; i++) {
        vf a[TILE];
        UNROLL for (int r = 0; r < rows; r++) {
            a[r] = load(x, (i * rows + r) * VL, F32);
            KEEP(a[r]);
        }
        UNROLL for (int c = 0; c < COLS; c++) {
            vf b = load(w, (i * COLS + c) * VL, F32);
            KEEP(b);
            UNROLL for (int r = 0; r < rows; r++) acc[r * COLS + c] = fma_f(a[r], b, acc[r * COLS + c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        v4_mem *to = (v4_mem *)(sums + r * MAX_COLS);
        *to = *to + sum_four(acc + r * COLS);
    }
}

/* Row r of tile `tile` of `from` [num_rows, size], laid out in the order of `decode`; zeros where there is nothing. */
INLINE void pack_row(float *to, const void *from, int64_t tile, int64_t r, int64_t num_rows, int64_t num_tiles,
                     int64_t size, int64_t padded, int bits, int dtype) {
    int64_t first = tile_start(tile, num_rows, num_tiles), row = first + r;
    int64_t height = tile_start(tile + 1, num_rows, num_tiles) - first;
    for (int64_t k = 0; k < padded; k += BLOCK_K) {
        int64_t dim = min64(BLOCK_K, padded - k), rest = size - k;
        float *block = to + k * num_rows + first * dim + r * VL;
        const void *x = at(from, row * size + k, dtype);
        for (int64_t i = 0; i < dim; i += PAD) {
            float wide[PAD];
            for (int64_t j = 0; j < PAD; j += VL)
                store(wide, j, i + j < rest ? load_upto(x, i + j, rest - i - j, dtype) : (vf){0}, F32);
            UNROLL for (int t = 0; t < 8; t++) {
                v8 vector;
                if (bits == 4) {
                    UNROLL for (int j = 0; j < 8; j++) vector[j] = wide[32 * (t % 2) + 4 * j + t / 2];
                } else {
                    vector = *(const v8_mem *)(wide + 8 * t);
                }
                *(v8_mem *)(block + (i + t / NUM_ACC * VL) * height + t % NUM_ACC * 8) = vector;
            }
        }
    }
}

typedef struct {
    const float *x;
    const quantized *w;
    void *out;
    int64_t num_rows, num_tiles;
    int out_dtype;
} operands;

/* out[rows of the tiles, col..] for at most MAX_ROWS x MAX_COLS. */
INLINE void linear_block(const operands *o, int64_t first_tile, int64_t last_tile, int64_t col, int64_t num_cols,
                         float *sums, float *packed, int bits, int segment) {
    const quantized *w = o->w;
    int64_t first = tile_start(first_tile, o->num_rows, o->num_tiles);
    int64_t num_rows = tile_start(last_tile, o->num_rows, o->num_tiles) - first;
    memset(sums, 0, num_rows * MAX_COLS * sizeof *sums);
    for (int64_t k = 0; k < w->padded_in; k += BLOCK_K) {
        int64_t size = min64(BLOCK_K, w->padded_in - k);
        const float *x = o->x + k * o->num_rows;
        for (int64_t c = 0; c < num_cols; c += COLS) {
            if (o->num_rows == 1) {
                dot_row(sums + c, x, w, col + c, num_cols - c, k, size, bits, segment);
                continue;
            }
            decode_rows(packed, w, col + c, num_cols - c, k, size, bits, segment);
            for (int64_t t = first_tile; t < last_tile; t++) {
                int64_t row = tile_start(t, o->num_rows, o->num_tiles);
                const float *tile = x + row * size;
                float *to = sums + (row - first) * MAX_COLS + c;
                switch (tile_start(t + 1, o->num_rows, o->num_tiles) - row) {
                case 1: dot_tile(to, tile, packed, size / VL, 1); break;
                case 2: dot_tile(to, tile, packed, size / VL, 2); break;
#ifdef __AVX512F__
                case 3: dot_tile(to, tile, packed, size / VL, 3); break;
                case 4: dot_tile(to, tile, packed, size / VL, 4); break;
                case 5: dot_tile(to, tile, packed, size / VL, 5); break;
#endif
                default: dot_tile(to, tile, packed, size / VL, TILE);
                }
            }
        }
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL)
            store_upto(o->out, (first + r) * w->out_features + col + c, load(sums, r * MAX_COLS + c, F32), num_cols - c,
                       o->out_dtype);
}

static void linear_block_4(const operands *o, int64_t first_tile, int64_t last_tile, int64_t col,
                           int64_t num_cols, float *sums, float *packed) {
    linear_block(o, first_tile, last_tile, col, num_cols, sums, packed, 4, 32);
}

static void linear_block_8(const operands *o, int64_t first_tile, int64_t last_tile, int64_t col,
                           int64_t num_cols, float *sums, float *packed) {
    if (o->w->group_size % 32)
        linear_block(o, first_tile, last_tile, col, num_cols, sums, packed, 8, 16);
    else
        linear_block(o, first_tile, last_tile, col, num_cols, sums, packed, 8, 32);
}

/* x: [num_rows, in_features], out: [num_rows, out_features], of x_dtype. group_size is a multiple of 32 (16 for 8 bits).
 * may_be_quick: 16-bit floats may be rounded to whole numbers. Returns 0, or -1 when out of memory. */
int octavo_linear_quantized(const void *x, int x_dtype, const weight *from, void *out, int64_t num_rows, int num_threads,
                            int may_be_quick) {
    if (!num_rows) return 0;
    quantized w = describe(from);
    int64_t in_features = from->in_features, out_features = from->out_features, padded_in = w.padded_in;
    int bits = w.bits;
    int threads = num_threads > 1 && in_features * out_features > 65536 ? num_threads : 1;
    if (may_be_quick && x_dtype != F32 && whole_is_quick(&w, num_rows))
        return octavo_linear_whole(x, x_dtype, &w, out, num_rows, in_features, threads);
    float *wide = aligned_alloc(64, min64(num_rows, PASS_ROWS) * padded_in * 4);
    if (!wide) return -1;
    /* Enough parts for each thread to find more when another is held up. */
    int64_t cols = min64((out_features / (threads * 4) + COLS) / COLS * COLS, MAX_COLS);
    int64_t col_blocks = (out_features + cols - 1) / cols;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *packed = aligned_alloc(64, (COLS * BLOCK_K + MAX_ROWS * MAX_COLS) * 4), *sums = packed + COLS * BLOCK_K;
        if (!packed) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t first = 0; first < num_rows; first += PASS_ROWS) {
            int64_t rows = min64(PASS_ROWS, num_rows - first), tiles = (rows + TILE - 1) / TILE;
            int64_t row_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
            const void *from_x = at(x, first * in_features, x_dtype);
#pragma omp for
            for (int64_t t = 0; t < tiles; t++)
                for (int64_t r = 0; r < tile_start(t + 1, rows, tiles) - tile_start(t, rows, tiles); r++)
                    if (bits == 4)
                        pack_row(wide, from_x, t, r, rows, tiles, in_features, padded_in, 4, x_dtype);
                    else
                        pack_row(wide, from_x, t, r, rows, tiles, in_features, padded_in, 8, x_dtype);
            operands o = {wide, &w, (char *)out + first * out_features * size_of(x_dtype), rows, tiles, x_dtype};
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < col_blocks * row_blocks; task++) {
                int64_t part = task % row_blocks, col = task / row_blocks * cols;
                int64_t first_tile = tiles * part / row_blocks, last_tile = tiles * (part + 1) / row_blocks;
                int64_t some_cols = min64(cols, out_features - col);
                if (!packed) continue;
                if (bits == 4)
                    linear_block_4(&o, first_tile, last_tile, col, some_cols, sums, packed);
                else
                    linear_block_8(&o, first_tile, last_tile, col, some_cols, sums, packed);
            }
        }
        free(packed);
    }
    free(wide);
    return failed ? -1 : 0;
}

/* Makes bfloat16 scales and codes of `from` [out_features, in_features]: see weight_quantization.py, with whose torch path
 * it agrees bit for bit. group_size is a multiple of 32. Returns 0, -1 when out of memory, 1 for weights not finite. */
int octavo_quantize(const void *from, int dtype, int64_t out_features, int64_t in_features, int bits, int64_t group_size,
                    uint8_t *codes, uint16_t *scales, int num_threads) {
    int64_t padded_in = (in_features + PAD - 1) / PAD * PAD;
    int64_t num_groups = (in_features + group_size - 1) / group_size;
    int failed = 0, unfit = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1) reduction(| : failed, unfit)
    {
        float *wide = aligned_alloc(64, padded_in * sizeof *wide);
        failed |= !wide;
#pragma omp for
        for (int64_t row = 0; row < out_features; row++) {
            if (!wide) continue;
            memset(wide + padded_in - PAD, 0, PAD * sizeof *wide);
            for (int64_t i = 0; i < in_features; i += VL)
                store(wide, i, load_upto(at(from, row * in_features, dtype), i, in_features - i, dtype), F32);
            for (int64_t group = 0; group < num_groups; group++) {
                int64_t first = group * group_size, end = min64(first + group_size, in_features);
                float low = wide[first], high = wide[first];
                for (int64_t i = first; i < end; i++) {
                    low = wide[i] < low ? wide[i] : low;
                    high = wide[i] > high ? wide[i] : high;
                    unfit |= !(__builtin_fabsf(wide[i]) <= 3.4028235e38f);
                }
                if (end < first + group_size) { /* the missing inputs count as zeros */
                    low = low < 0.0f ? low : 0.0f;
                    high = high > 0.0f ? high : 0.0f;
                }
                float largest = bits == 4 ? (-low > high ? low : high) : (-low > high ? -low : high);
                float scale = largest / (bits == 4 ? -8.0f : 127.0f);
                uint32_t word;
                memcpy(&word, &scale, sizeof word);
                word = (word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000;
                memcpy(&scale, &word, sizeof scale);
                if (bits == 8 && scale * 127.0f < largest) {
                    word += 0x10000;
                    memcpy(&scale, &word, sizeof scale);
                }
                scales[row * num_groups + group] = (uint16_t)(word >> 16);
                float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
                float least = bits == 4 ? -8.0f : -127.0f, most = bits == 4 ? 7.0f : 127.0f;
                for (int64_t i = first; i < end; i++) {
                    float code = (wide[i] * inverse + 12582912.0f) - 12582912.0f; /* rounded, ties to even */
                    code = code < least ? least : code;
                    wide[i] = code > most ? most : code;
                }
            }
            uint8_t *to = codes_of(codes, row, padded_in, bits);
            if (bits == 8) {
                for (int64_t i = 0; i < padded_in; i++) to[i] = (uint8_t)(int8_t)wide[i];
                continue;
            }
            for (int64_t i = in_features; i < padded_in; i++) wide[i] = -8.0f; /* code 0 */
            for (int64_t i = 0; i < padded_in; i += PAD)
                for (int j = 0; j < 32; j++) {
                    uint8_t pair = (uint8_t)((int)(wide[i + j] + 8.0f) | (int)(wide[i + 32 + j] + 8.0f) << 4);
                    to[codes_between(i, 4) + j / 4 * 4 * NIBBLE_ROWS + j % 4] = pair;
                }
        }
        free(wide);
    }
    return failed ? -1 : unfit;
}
