/* y = x w^T and two elementwise functions whose bits depend on a row alone: see linear_deterministic.py.
 *
 * The layout and the order of sums are those of linear.c, for any of the three storage types: each output is summed over
 * BLOCK_K inputs in VL lanes, then by one tree, then block after block. So its bits depend on its own row and column
 * alone, not on the number of rows, the tile it fell into, or the number of threads.
 *
 *   x, float32 [K / BLOCK_K][rows / TILE][BLOCK_K / VL][TILE][VL]    MAX_ROWS x BLOCK_K stay in the L2 cache
 *   w, float32 [BLOCK_K / VL][COLS][VL]    laid out once for these rows, stays in the L1 cache
 *   TILE x COLS sums of VL lanes           registers
 */
#include <math.h>

#include "vector.h"

#ifdef __AVX512F__
#define TILE 6 /* rows; with COLS, TILE * COLS + TILE + 1 registers of the CPU's 32 (16 with AVX2) */
#else
#define TILE 3
#endif
#define COLS 4 /* weight rows in a tile */
#define BLOCK_K 1024 /* COLS * BLOCK_K floats are half an L1 cache; fixed, as the order of sums depends on it */
#define MAX_ROWS 96 /* rows whose BLOCK_K floats stay in the L2 cache; a multiple of TILE */
#define MAX_COLS 128 /* columns that a thread takes at once; a multiple of 2 * COLS */
#define PASS_ROWS 768 /* rows widened at once: what bounds the scratch memory; a multiple of MAX_ROWS */

/* sums[r * MAX_COLS + c] += x[r] . w[c] over num_vectors * VL inputs; w[c] goes on by w_step for each VL of them. */
INLINE void dot_tile(float *sums, const float *x, const void *const *w, int64_t w_step, int64_t num_vectors, int rows,
                     int cols, int dtype) {
    vf acc[TILE * COLS > 2 * COLS ? TILE * COLS : 2 * COLS] = {{0}};
    for (int64_t i = 0; i < num_vectors; i++) {
        vf a[TILE];
        UNROLL for (int r = 0; r < rows; r++) {
            a[r] = load(x, (i * TILE + r) * VL, F32);
            KEEP(a[r]);
        }
        UNROLL for (int c = 0; c < cols; c++) {
            vf b = load(w[c], i * w_step, dtype);
            KEEP(b);
            UNROLL for (int r = 0; r < rows; r++) acc[r * cols + c] = fma_f(a[r], b, acc[r * cols + c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < cols; c += 4) {
            v4_mem *to = (v4_mem *)(sums + r * MAX_COLS + c);
            *to = *to + sum_four(acc + r * cols + c);
        }
}

/* The same for at most TILE rows with weights as they lie in memory, cols of them at cols different places. */
INLINE void dot_direct(float *sums, const float *x, const void *const *w, int64_t num_vectors, int64_t rows,
                       int dtype) {
    switch (rows) {
    case 1: dot_tile(sums, x, w, VL, num_vectors, 1, 2 * COLS, dtype); break;
    case 2: dot_tile(sums, x, w, VL, num_vectors, 2, COLS, dtype); break;
    default: dot_tile(sums, x, w, VL, num_vectors, TILE, COLS, dtype); break;
    }
}

typedef struct {
    const float *x; /* laid out as above; absent rows and inputs are zeros */
    const void *w; /* [out_features, in_features] */
    void *out; /* [num_rows, out_features] */
    int64_t x_rows, in_features, out_features; /* x_rows: the rows that x is laid out for, a multiple of TILE */
} operands;

/* Lays w[0..COLS][0..size] out for a tile. */
INLINE void pack_weights(float *to, const void *const *w, int64_t size, int dtype) {
    for (int c = 0; c < COLS; c++) {
        int64_t i = 0;
        for (; i + VL <= size; i += VL) store(to, i * COLS + c * VL, load(w[c], i, dtype), F32);
        if (i < size) store(to, i * COLS + c * VL, load_some(w[c], i, size - i, dtype), F32);
    }
}

/* Row `row` of `from` [num_rows, size], laid out for tiles; zeros where there is no such row. */
INLINE void pack_row(float *to, const void *from, int64_t row, int64_t num_rows, int64_t x_rows, int64_t size,
                     int dtype) {
    for (int64_t k = 0; k < size; k += BLOCK_K) {
        int64_t rest = min64(BLOCK_K, size - k), dim = round_up(rest);
        float *block = to + k * x_rows + row / TILE * TILE * dim + row % TILE * VL;
        const void *x = at(from, row * size + k, dtype);
        for (int64_t i = 0; i < dim; i += VL)
            store(block, i * TILE, row < num_rows ? load_upto(x, i, rest - i, dtype) : (vf){0}, F32);
    }
}

/* Asks for weights that come next while these are multiplied. */
INLINE void prefetch(const void *w, int64_t from, int64_t to, int dtype) {
    for (int64_t i = from; i < to; i += 64 / size_of(dtype)) __builtin_prefetch(at(w, i, dtype));
}

/* sums[r * MAX_COLS + c] for at most TILE rows, which lie at o->x: every weight is read once, in long streams. */
INLINE void sum_few(const operands *o, int64_t num_rows, int64_t col, int64_t num_cols, float *sums, int dtype) {
    int step = num_rows == 1 ? 2 * COLS : COLS;
    for (int64_t c = 0; c < num_cols; c += step)
        for (int64_t k = 0; k < o->in_features; k += BLOCK_K) {
            const void *w[2 * COLS];
            for (int i = 0; i < step; i++)
                w[i] = at(o->w, (col + min64(c + i, num_cols - 1)) * o->in_features + k, dtype);
            dot_direct(sums + c, o->x + k * TILE, w, min64(BLOCK_K, o->in_features - k) / VL, num_rows, dtype);
        }
}

/* The same for any number of rows, from `row`, a multiple of TILE. */
INLINE void sum_many(const operands *o, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float *sums,
                     float *packed, int dtype) {
    int64_t tiles = (num_rows + TILE - 1) / TILE, in = o->in_features;
    int64_t share = (min64(BLOCK_K, in) / tiles + 32) / 32 * 32; /* of a weight row, to ask for during a tile */
    const void *tile_w[COLS];
    for (int i = 0; i < COLS; i++) tile_w[i] = packed + i * VL;
    for (int64_t k = 0; k < in; k += BLOCK_K) {
        int64_t size = min64(BLOCK_K, in - k), dim = round_up(size);
        const float *x = o->x + k * o->x_rows + row * dim;
        for (int64_t c = 0; c < num_cols; c += COLS) {
            const void *w[COLS];
            for (int i = 0; i < COLS; i++) w[i] = at(o->w, (col + min64(c + i, num_cols - 1)) * in + k, dtype);
            pack_weights(packed, w, size, dtype);
            const void *next = at(o->w, (col + c + COLS) * in + k, dtype);
            int64_t num_next = min64(COLS, num_cols - c - COLS);
            for (int64_t t = 0; t < tiles; t++) {
                for (int64_t i = 0; i < num_next; i++)
                    prefetch(at(next, i * in, dtype), t * share, min64(size, (t + 1) * share), dtype);
                dot_tile(sums + t * TILE * MAX_COLS + c, x + t * TILE * dim, tile_w, COLS * VL, dim / VL, TILE, COLS,
                         F32);
            }
        }
    }
}

/* out[row.., col..] for at most MAX_ROWS x MAX_COLS; row is a multiple of TILE. */
INLINE void linear_block(const operands *o, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float *sums,
                         float *packed, int dtype) {
    memset(sums, 0, (num_rows + TILE - 1) / TILE * TILE * MAX_COLS * sizeof *sums);
    if (o->x_rows == TILE && o->in_features % VL == 0)
        sum_few(o, num_rows, col, num_cols, sums, dtype);
    else
        sum_many(o, row, num_rows, col, num_cols, sums, packed, dtype);
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL)
            store_upto(o->out, (row + r) * o->out_features + col + c, load(sums, r * MAX_COLS + c, F32), num_cols - c,
                       dtype);
}

/* One instance for each dtype, so that the loops do not branch. */
#define BLOCK(name, T) \
    static void block_##name(const operands *o, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, \
                             float *sums, float *packed) { \
        linear_block(o, row, num_rows, col, num_cols, sums, packed, T); \
    }
BLOCK(f32, F32)
BLOCK(bf16, BF16)
BLOCK(f16, F16)

static void (*const block_of[])(const operands *, int64_t, int64_t, int64_t, int64_t, float *,
                                float *) = {block_f32, block_bf16, block_f16};

/* x: [num_rows, in_features], w: [out_features, in_features], out: [num_rows, out_features], all of one dtype, contiguous.
 * Returns 0, or -1 when out of memory. */
int octavo_linear_deterministic(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features,
                                int64_t out_features, int dtype, int num_threads) {
    int64_t pass_rows = (min64(num_rows, PASS_ROWS) + TILE - 1) / TILE * TILE;
    float *wide = aligned_alloc(64, (pass_rows * round_up(in_features) * 4 + 63) / 64 * 64);
    if (!wide) return -1;
    int threads = num_threads > 1 && in_features * out_features > 65536 ? num_threads : 1;
    /* Enough parts for each thread to find more when another is held up. */
    int64_t cols = (out_features / (threads * 4) + 2 * COLS) / (2 * COLS) * (2 * COLS);
    cols = min64(cols, MAX_COLS);
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
            int64_t block_rows = (tiles + row_blocks - 1) / row_blocks * TILE; /* the last is not much smaller */
#pragma omp for
            for (int64_t r = 0; r < tiles * TILE; r++)
                pack_row(wide, at(x, first * in_features, dtype), r, rows, tiles * TILE, in_features, dtype);
            void *to = (char *)out + first * out_features * size_of(dtype);
            operands o = {wide, w, to, tiles * TILE, in_features, out_features};
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < col_blocks * row_blocks; task++) {
                int64_t row = task % row_blocks * block_rows, col = task / row_blocks * cols;
                if (packed)
                    block_of[dtype](&o, row, min64(block_rows, rows - row), col, min64(cols, out_features - col), sums,
                                    packed);
            }
        }
        free(packed);
    }
    free(wide);
    return failed ? -1 : 0;
}

/* x = tanh(x / cap) * cap, float32. Lanes are independent, and a ragged end goes through the same code as the rest. */
void octavo_softcap(float *x, int64_t size, float cap, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && size > 65536)
    for (int64_t i = 0; i < size; i += VL)
        store_upto(x, i, tanh_f(load_upto(x, i, size - i, F32) / cap) * cap, size - i, F32);
}

/* gate_up: [num_tokens, 2 * dim], out: [num_tokens, dim]: gelu(gate) * up by erf, which libm computes one by one. */
void octavo_gelu_erf(const void *gate_up, void *out, int64_t num_tokens, int64_t dim, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_tokens * dim > 4096)
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t d = 0; d < dim; d += VL) {
            vf gate = load_upto(gate_up, token * 2 * dim + d, dim - d, dtype), half;
            vf up = load_upto(gate_up, token * 2 * dim + dim + d, dim - d, dtype);
            for (int i = 0; i < VL; i++) half[i] = 0.5f * (1.0f + erff(gate[i] * 0.70710678118654752f));
            store_upto(out, token * dim + d, gate * half * up, dim - d, dtype);
        }
}
