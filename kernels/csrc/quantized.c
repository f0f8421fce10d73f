/* y = x w^T for weights of 4 or 8 bits with a scale for each group of inputs: see linear_quantized.py.
 *
 * A weight is widened to float32 as fma(code, scale, offset), in registers, before it is multiplied. Several rows share
 * that work: w is then widened into a buffer in the L1 cache and multiplied in tiles whose sums stay in registers.
 *
 *   codes, 4 bits [out][in / 64][8]: bits 4 t .. 4 t + 3 of 32-bit word j are weight 8 t + j, so that a mask and an
 *                                    exact power of two take eight weights out without moving anything between lanes
 *   codes, 8 bits [out][in]          signed
 *   x, float32 [in / BLOCK_K][rows / TILE][BLOCK_K / VL][TILE][VL]
 *   w, float32 [BLOCK_K / VL][COLS][VL]
 *
 * One row or many, each output is summed over BLOCK_K inputs in VL lanes, then by one tree, then block after block: so
 * its bits depend on its own row and column alone, not on the number of rows, the tile, or the number of threads.
 */
#include "vector.h"

#ifdef __AVX512F__
#define TILE 6 /* rows; with COLS, TILE * COLS + TILE + 1 registers of the CPU's 32 (16 with AVX2) */
#else
#define TILE 3
#endif
#define COLS 4 /* weight rows in a tile */
#define BLOCK_K 1024 /* COLS * BLOCK_K floats are half an L1 cache; fixed, as the order of sums depends on it */
#define MAX_ROWS 96 /* rows whose BLOCK_K floats stay in the L2 cache; a multiple of TILE */
#define MAX_COLS 128 /* columns that a thread takes at once; a multiple of COLS */
#define PASS_ROWS 768 /* rows widened at once: what bounds the scratch memory; a multiple of MAX_ROWS */
#define PAD 64 /* inputs: rows of codes are filled up to a multiple of it */
#define SEGMENT 16 /* inputs that share their factors, at least: so many have one entry in `factors` */
#define NUM_ACC (VL / 8)

typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef int32_t i8_mem __attribute__((vector_size(32), aligned(1), may_alias));
typedef float v8_mem __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    const uint8_t *codes;
    const void *scales;   /* [out_features, num_groups] */
    const int16_t *zeros; /* the same, or NULL: 8 for 4 bits, 0 for 8 bits */
    const void *offsets;  /* the same, in place of zeros; or NULL */
    int64_t out_features, padded_in, group_size, num_groups, row_bytes;
    int bits, shift, scale_dtype, offset_dtype;
} quantized;

/* Of a weight row's inputs [k, k + BLOCK_K): those of input k + i stand at i >> shift. */
typedef struct {
    float scale[BLOCK_K / SEGMENT], offset[BLOCK_K / SEGMENT];
} factors;

INLINE v8 splat8(float x) { return x - (v8){0}; }

INLINE v8 fma8(v8 a, v8 b, v8 c) {
#if defined(__FMA__)
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    UNROLL for (int i = 0; i < 8; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

/* n elements to float32. */
INLINE void widen_some(float *to, const void *base, int64_t first, int64_t n, int dtype) {
    int64_t i = 0;
    switch (dtype) {
    case F32:
        for (; i + VL <= n; i += VL) store(to, i, load(base, first + i, F32), F32);
        break;
    case BF16:
        for (; i + VL <= n; i += VL) store(to, i, load(base, first + i, BF16), F32);
        break;
    default:
        for (; i + VL <= n; i += VL) store(to, i, load(base, first + i, F16), F32);
    }
    for (; i < n; i++) {
        const uint16_t *half = (const uint16_t *)base + first + i;
        if (dtype == F32) {
            to[i] = ((const float *)base)[first + i];
        } else if (dtype == BF16) {
            uint32_t bits = (uint32_t)*half << 16;
            memcpy(to + i, &bits, sizeof bits);
        } else {
            _Float16 x;
            memcpy(&x, half, sizeof x);
            to[i] = (float)x;
        }
    }
}

/* offset[0..n] of scale[0..n], whose elements stand from `at` on in the weight's tensors. */
INLINE void fill_offsets(factors *f, const quantized *w, int64_t at, int64_t n) {
    float zero = w->bits == 4 ? 8.0f : 0.0f;
    if (w->offsets) {
        widen_some(f->offset, w->offsets, at, n, w->offset_dtype);
    } else if (w->zeros) {
        for (int64_t i = 0; i < n; i++) f->offset[i] = -(f->scale[i] * (float)w->zeros[at + i]);
    } else {
        for (int64_t i = 0; i < n; i++) f->offset[i] = -(f->scale[i] * zero);
    }
}

/* Factors of inputs [k, k + size) of a weight row. */
INLINE void load_factors(factors *f, const quantized *w, int64_t row, int64_t k, int64_t size) {
    int64_t first = row * w->num_groups, group = k / w->group_size;
    if (w->group_size == (int64_t)1 << w->shift || w->group_size >= w->padded_in) {
        int64_t n = min64(((size - 1) >> w->shift) + 1, w->num_groups - group); /* the padding may have none */
        widen_some(f->scale, w->scales, first + group, n, w->scale_dtype);
        fill_offsets(f, w, first + group, n);
        if (n << w->shift < size) f->scale[n] = f->offset[n] = 0.0f;
        return;
    }
    for (int64_t i = 0, n = 0; i < size; i += (int64_t)1 << w->shift, n++) { /* groups that blocks of inputs cut */
        int64_t at = first + min64((k + i) / w->group_size, w->num_groups - 1);
        factors one;
        widen_some(one.scale, w->scales, at, 1, w->scale_dtype);
        fill_offsets(&one, w, at, 1);
        f->scale[n] = one.scale[0];
        f->offset[n] = one.offset[0];
    }
}

/* Widens PAD weights from input k + i of a row on. */
INLINE void decode(v8 *to, const uint8_t *codes, const factors *f, int64_t i, int shift, int bits, int segment) {
    if (bits == 4) {
        i8 word = *(const i8_mem *)codes;
        UNROLL for (int half = 0; half < 2; half++) {
            int64_t at = (i + 32 * half) >> shift;
            v8 s = splat8(f->scale[at]), o = splat8(f->offset[at]);
            UNROLL for (int t = 0; t < 4; t++) /* code * 16^t is a whole number below 2^24, as is the power: exact */
                to[4 * half + t] =
                    fma8(__builtin_convertvector(word & (15 << 4 * t), v8), s * (1.0f / (float)(1 << 4 * t)), o);
            word = (i8)((u8)word >> 16);
        }
        return;
    }
    UNROLL for (int part = 0; part < PAD / segment; part++) {
        int64_t at = (i + segment * part) >> shift;
        v8 s = splat8(f->scale[at]), o = splat8(f->offset[at]);
        UNROLL for (int t = part * segment / 8; t < (part + 1) * segment / 8; t++) {
#ifdef __AVX2__
            v8 code = (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * t))));
#else
            v8 code;
            UNROLL for (int j = 0; j < 8; j++) code[j] = (float)(int8_t)codes[8 * t + j];
#endif
            to[t] = fma8(code, s, o);
        }
    }
}

/* sums[c] += x . w[c] over size inputs, for COLS weight rows, of which there are `cols`; one row of x, in order. */
INLINE void dot_row(float *sums, const float *x, const quantized *w, int64_t col, int64_t cols, int64_t k, int64_t size,
                    int bits, int segment) {
    factors f[COLS];
    v8 acc[COLS][NUM_ACC] = {{{0}}};
    const uint8_t *codes[COLS];
    UNROLL for (int c = 0; c < COLS; c++) {
        int64_t row = col + min64(c, cols - 1);
        load_factors(&f[c], w, row, k, size);
        codes[c] = w->codes + row * w->row_bytes + k * bits / 8;
    }
    int64_t ahead = COLS * w->row_bytes;
    for (int64_t i = 0; i < size; i += PAD) {
        UNROLL for (int c = 0; c < COLS; c++) {
            v8 b[8];
            const uint8_t *from = codes[c] + i * bits / 8;
            __builtin_prefetch(from + ahead);
            decode(b, from, &f[c], i, w->shift, bits, segment);
            UNROLL for (int t = 0; t < 8; t++)
                acc[c][t % NUM_ACC] = fma8(b[t], *(const v8_mem *)(x + i + 8 * t), acc[c][t % NUM_ACC]);
        }
    }
    v8 folded[COLS];
    UNROLL for (int c = 0; c < COLS; c++) folded[c] = NUM_ACC == 1 ? acc[c][0] : acc[c][0] + acc[c][NUM_ACC - 1];
    v8 a = add_pairs(add_pairs(folded[0], folded[1]), add_pairs(folded[2], folded[3]));
    v4_mem *to = (v4_mem *)sums;
    *to = *to + (__builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7));
}

/* Widens COLS weight rows, of which there are `cols`, for a tile. */
INLINE void decode_rows(float *to, const quantized *w, int64_t col, int64_t cols, int64_t k, int64_t size, int bits,
                        int segment) {
    factors f;
    for (int c = 0; c < COLS; c++) {
        int64_t row = col + min64(c, cols - 1);
        const uint8_t *codes = w->codes + row * w->row_bytes + k * bits / 8;
        load_factors(&f, w, row, k, size);
        for (int64_t i = 0; i < size; i += PAD) {
            v8 b[8];
            decode(b, codes + i * bits / 8, &f, i, w->shift, bits, segment);
            UNROLL for (int t = 0; t < 8; t++) /* vector t / NUM_ACC of column c, its lanes from t % NUM_ACC * 8 */
                *(v8_mem *)(to + (i + t / NUM_ACC * VL) * COLS + c * VL + t % NUM_ACC * 8) = b[t];
        }
    }
}

/* sums[r * MAX_COLS + c] += x[r] . w[c] over num_vectors * VL inputs, for TILE rows and COLS columns. */
INLINE void dot_tile(float *sums, const float *x, const float *w, int64_t num_vectors) {
    vf acc[TILE * COLS] = {{0}};
    for (int64_t i = 0; i < num_vectors; i++) {
        vf a[TILE];
        UNROLL for (int r = 0; r < TILE; r++) {
            a[r] = load(x, (i * TILE + r) * VL, F32);
            KEEP(a[r]);
        }
        UNROLL for (int c = 0; c < COLS; c++) {
            vf b = load(w, (i * COLS + c) * VL, F32);
            KEEP(b);
            UNROLL for (int r = 0; r < TILE; r++) acc[r * COLS + c] = fma_f(a[r], b, acc[r * COLS + c]);
        }
    }
    UNROLL for (int r = 0; r < TILE; r++) {
        v4_mem *to = (v4_mem *)(sums + r * MAX_COLS);
        *to = *to + sum_four(acc + r * COLS);
    }
}

/* Row `row` of `from` [num_rows, size], laid out for tiles; zeros where there is nothing. */
INLINE void pack_row(float *to, const void *from, int64_t row, int64_t num_rows, int64_t x_rows, int64_t size,
                     int64_t padded, int64_t tile, int dtype) {
    for (int64_t k = 0; k < padded; k += BLOCK_K) {
        int64_t dim = min64(BLOCK_K, padded - k), rest = size - k;
        float *block = to + k * x_rows + row / tile * tile * dim + row % tile * VL;
        const void *x = at(from, row * size + k, dtype);
        for (int64_t i = 0; i < dim; i += VL)
            store(block, i * tile, row < num_rows && i < rest ? load_upto(x, i, rest - i, dtype) : (vf){0}, F32);
    }
}

typedef struct {
    const float *x;
    const quantized *w;
    void *out;
    int64_t x_rows; /* rows that x is laid out for: 1, or a multiple of TILE */
    int out_dtype;
} operands;

/* out[row.., col..] for at most MAX_ROWS x MAX_COLS; row is a multiple of TILE. */
INLINE void linear_block(const operands *o, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float *sums,
                         float *packed, int bits, int segment) {
    const quantized *w = o->w;
    int64_t tiles = (num_rows + TILE - 1) / TILE;
    memset(sums, 0, tiles * TILE * MAX_COLS * sizeof *sums);
    for (int64_t k = 0; k < w->padded_in; k += BLOCK_K) {
        int64_t size = min64(BLOCK_K, w->padded_in - k);
        const float *x = o->x + k * o->x_rows + row * size;
        for (int64_t c = 0; c < num_cols; c += COLS) {
            if (o->x_rows == 1) {
                dot_row(sums + c, x, w, col + c, num_cols - c, k, size, bits, segment);
                continue;
            }
            decode_rows(packed, w, col + c, num_cols - c, k, size, bits, segment);
            for (int64_t t = 0; t < tiles; t++)
                dot_tile(sums + t * TILE * MAX_COLS + c, x + t * TILE * size, packed, size / VL);
        }
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL)
            store_upto(o->out, (row + r) * w->out_features + col + c, load(sums, r * MAX_COLS + c, F32), num_cols - c,
                       o->out_dtype);
}

static void linear_block_4(const operands *o, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float *sums,
                           float *packed) {
    linear_block(o, row, num_rows, col, num_cols, sums, packed, 4, 32);
}

static void linear_block_8(const operands *o, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float *sums,
                           float *packed) {
    if (o->w->group_size % 32)
        linear_block(o, row, num_rows, col, num_cols, sums, packed, 8, 16);
    else
        linear_block(o, row, num_rows, col, num_cols, sums, packed, 8, 32);
}

/* x: [num_rows, in_features], out: [num_rows, out_features], of x_dtype; codes, scales, zeros, offsets: see above.
 * group_size is a multiple of 32 (16 for 8 bits); padded_in is in_features up to a multiple of PAD.
 * Returns 0, or -1 when out of memory. */
int octavo_linear_quantized(const void *x, int x_dtype, const uint8_t *codes, int bits, const void *scales,
                            int scale_dtype, const int16_t *zeros, const void *offsets, int offset_dtype, void *out,
                            int64_t num_rows, int64_t in_features, int64_t out_features, int64_t group_size,
                            int64_t num_groups, int num_threads) {
    int64_t padded_in = (in_features + PAD - 1) / PAD * PAD, row_bytes = padded_in * bits / 8;
    int shift = 0; /* of the largest power of two that divides the group size */
    while (!(group_size >> shift & 1)) shift++;
    if (num_groups == 1)
        while ((int64_t)1 << shift < BLOCK_K) shift++;
    quantized w = {codes,      scales,     zeros,     offsets, out_features, padded_in,
                   group_size, num_groups, row_bytes, bits,    shift,        scale_dtype, offset_dtype};
    int64_t tile = num_rows == 1 ? 1 : TILE;
    int64_t pass_rows = (min64(num_rows, PASS_ROWS) + tile - 1) / tile * tile;
    float *wide = aligned_alloc(64, pass_rows * padded_in * 4);
    if (!wide) return -1;
    int threads = num_threads > 1 && in_features * out_features > 65536 ? num_threads : 1;
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
            int64_t rows = min64(PASS_ROWS, num_rows - first), x_rows = (rows + tile - 1) / tile * tile;
            if (num_rows == 1) x_rows = 1;
            int64_t row_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
            int64_t block_rows = ((rows + TILE - 1) / TILE + row_blocks - 1) / row_blocks * TILE;
#pragma omp for
            for (int64_t r = 0; r < x_rows; r++)
                pack_row(wide, at(x, first * in_features, x_dtype), r, rows, x_rows, in_features, padded_in, tile,
                         x_dtype);
            char *to = (char *)out + first * out_features * size_of(x_dtype);
            operands o = {wide, &w, to, x_rows, x_dtype};
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < col_blocks * row_blocks; task++) {
                int64_t row = task % row_blocks * block_rows, col = task / row_blocks * cols;
                if (!packed || row >= rows) continue;
                int64_t some_rows = min64(block_rows, rows - row), some_cols = min64(cols, out_features - col);
                if (bits == 4)
                    linear_block_4(&o, row, some_rows, col, some_cols, sums, packed);
                else
                    linear_block_8(&o, row, some_rows, col, some_cols, sums, packed);
            }
        }
        free(packed);
    }
    free(wide);
    return failed ? -1 : 0;
}
