/* y = x w^T, each of float32, bfloat16 or float16: see linear_dense.py and linear_deterministic.py.
 *
 * Rows of x are cut into tiles, and are laid out, in float32, in the order in which a tile reads them. For few rows
 * weights are read as they lie in memory and widened in registers, for many they are widened once for all tiles:
 *
 *   x  [K / BLOCK_K][tiles][BLOCK_K / VL][rows of the tile][VL]    one tile and block stays in the L1 cache
 *   w  few rows: BLOCK_COLS rows of BLOCK_K inputs                 stay in the L2 cache for all tiles
 *      many: float32 [BLOCK_K / VL][WIDE_COLS][VL]                 stays in the L1 cache
 *   sums of rows x cols x VL lanes                                 registers
 *
 * A pair of bfloat16 numbers is widened by two shifts, which gives the even inputs and the odd ones: so x has those
 * apart too. Each output is summed over BLOCK_K inputs in VL lanes, then by one tree, then block after block: so its bits
 * depend on its own row and column alone, not on the number of rows, the tile it fell into, or the number of threads.
 */
#include "vector.h"

#define PAIR (2 * VL) /* inputs of one round of the inner loop */
#ifdef __AVX512F__
#define TILE 6 /* rows; rows * cols sums, and what they are made from, fit the CPU's 32 registers (16 with AVX2) */
#define WIDE_TILE 6 /* of many rows */
#else
#define TILE 4
#define WIDE_TILE 3
#endif
#define FEW_ROWS 16
#define WIDE_COLS 4
#define GROUP 24 /* columns, a multiple of the columns that a tile of any height takes at once */
#define BLOCK_K 1024 /* fixed, as the order of sums depends on it */
#define BLOCK_COLS (2 * GROUP)
#define MAX_ROWS 96 /* rows of x that a thread takes at once */
#define MAX_COLS 960 /* columns, likewise: a multiple of BLOCK_COLS */
#define PASS_ROWS 768 /* rows laid out at once: what bounds the scratch memory; a multiple of MAX_ROWS */
#define PARALLEL_PRODUCTS 400000 /* below, waking threads costs more than they save */

typedef uint32_t vu_mem __attribute__((vector_size(4 * VL), aligned(2), may_alias));

/* Half 0 or 1 of PAIR weights. */
INLINE vf load_half(const void *w, int64_t element, int half, int dtype) {
    if (dtype != BF16) return load(w, element + half * VL, dtype);
    vu pair = *(const vu_mem *)((const uint16_t *)w + element);
    if (half) {
        pair >>= 16;
        KEEP(pair); /* or GCC would make this a mask, for which there is no register left */
    }
    return (vf)(pair << 16);
}

/* sums[r * BLOCK_COLS + c] += x[r] . w[c] over num_pairs * PAIR inputs, and asks for weights that come next: w_next bytes
 * behind those that are read, from byte next_from on and next_step bytes further each round. */
INLINE void dot_tile(float *sums, const float *x, const void *const *w, int64_t num_pairs, int64_t w_next,
                     int64_t next_step, int rows, int cols, int dtype) {
    vf acc[24] = {{0}};
    for (int64_t i = 0; i < num_pairs; i++) {
        UNROLL for (int c = 0; c < cols; c++) __builtin_prefetch((const char *)w[c] + w_next + i * next_step);
        UNROLL for (int half = 0; half < 2; half++) {
            const float *xi = x + (2 * i + half) * rows * VL;
            if (rows > cols) {
                vf b[24];
                UNROLL for (int c = 0; c < cols; c++) {
                    b[c] = load_half(w[c], i * PAIR, half, dtype);
                    KEEP(b[c]);
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    vf a = load(xi, r * VL, F32);
                    KEEP(a);
                    UNROLL for (int c = 0; c < cols; c++) ADD_PRODUCT(acc[r * cols + c], a, b[c]);
                }
            } else {
                vf a[TILE];
                UNROLL for (int r = 0; r < rows; r++) {
                    a[r] = load(xi, r * VL, F32);
                    KEEP(a[r]);
                }
                UNROLL for (int c = 0; c < cols; c++) {
                    vf b = load_half(w[c], i * PAIR, half, dtype);
                    KEEP(b);
                    UNROLL for (int r = 0; r < rows; r++) ADD_PRODUCT(acc[r * cols + c], a[r], b);
                }
            }
        }
    }
    float result[24];
    UNROLL for (int i = 0; i < rows * cols; i += 4) *(v4_mem *)(result + i) = sum_four(acc + i);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) sums[r * BLOCK_COLS + c] += result[r * cols + c];
}

/* The same with WIDE_COLS weights that are widened and laid out; nothing is asked for. */
INLINE void dot_wide(float *sums, const float *x, const float *w, int64_t num_vectors, int rows) {
    vf acc[WIDE_TILE * WIDE_COLS] = {{0}};
    for (int64_t i = 0; i < num_vectors; i++) {
        vf a[WIDE_TILE];
        UNROLL for (int r = 0; r < rows; r++) {
            a[r] = load(x, (i * rows + r) * VL, F32);
            KEEP(a[r]);
        }
        UNROLL for (int c = 0; c < WIDE_COLS; c++) {
            vf b = load(w, (i * WIDE_COLS + c) * VL, F32);
            KEEP(b);
            UNROLL for (int r = 0; r < rows; r++) acc[r * WIDE_COLS + c] = fma_f(a[r], b, acc[r * WIDE_COLS + c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        v4_mem *to = (v4_mem *)(sums + r * BLOCK_COLS);
        *to = *to + sum_four(acc + r * WIDE_COLS);
    }
}

/* Lays WIDE_COLS weights of `dim` inputs, a multiple of PAIR, out for dot_wide. */
INLINE void widen_weights(float *to, const char *w, int64_t stride, int64_t num_cols, int64_t dim, int dtype) {
    for (int c = 0; c < WIDE_COLS; c++) {
        const char *from = w + min64(c, num_cols - 1) * stride;
        for (int64_t i = 0; i < dim; i += PAIR)
            UNROLL for (int half = 0; half < 2; half++)
                store(to, ((i / VL + half) * WIDE_COLS + c) * VL, load_half(from, i, half, dtype), F32);
    }
}

typedef struct {
    const float *x; /* laid out as above, inputs that are not there are zeros */
    const void *w; /* [out_features, in_features] */
    void *out; /* [num_rows, out_features] */
    int64_t num_rows, in_features, out_features, num_tiles;
} operands;

INLINE int64_t padded(int64_t n) { return (n + PAIR - 1) / PAIR * PAIR; }
INLINE int64_t tiles_of(int64_t num_rows) {
    int64_t height = num_rows > FEW_ROWS ? WIDE_TILE : TILE;
    return (num_rows + height - 1) / height;
}
/* Tiles differ in height by one row at most. */
INLINE int64_t tile_start(int64_t tile, int64_t num_rows, int64_t num_tiles) {
    return tile * (num_rows / num_tiles) + min64(tile, num_rows % num_tiles);
}

/* PAIR inputs of x in the order in which load_half gives weights of w_dtype. */
INLINE void load_pair(vf halves[2], const void *x, int64_t element, int dtype, int w_dtype) {
    if (dtype == BF16 && w_dtype == BF16) {
        halves[0] = load_half(x, element, 0, BF16);
        halves[1] = load_half(x, element, 1, BF16);
        return;
    }
    vf a = load(x, element, dtype), b = load(x, element + VL, dtype);
    if (w_dtype == BF16) {
#if VL == 16
        halves[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        halves[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
        halves[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
        halves[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
    } else {
        halves[0] = a;
        halves[1] = b;
    }
}

/* Tile `tile` of `from` [num_rows, size], laid out. */
INLINE void pack_tile(float *to, const void *from, int64_t tile, int64_t num_rows, int64_t num_tiles, int64_t size,
                      int dtype, int w_dtype) {
    int64_t first = tile_start(tile, num_rows, num_tiles), rows = tile_start(tile + 1, num_rows, num_tiles) - first;
    for (int64_t k = 0; k < size; k += BLOCK_K) {
        int64_t rest = min64(BLOCK_K, size - k), dim = padded(rest);
        for (int64_t r = 0; r < rows; r++) {
            const void *x = at(from, (first + r) * size + k, dtype);
            float *block = to + k * num_rows + first * dim + r * VL;
            for (int64_t i = 0; i < dim; i += PAIR) {
                vf halves[2];
                if (i + PAIR <= rest) {
                    load_pair(halves, x, i, dtype, w_dtype);
                } else {
                    char buffer[4 * PAIR] = {0};
                    memcpy(buffer, at(x, i, dtype), (rest - i) * size_of(dtype));
                    load_pair(halves, buffer, 0, dtype, w_dtype);
                }
                store(block, i * rows, halves[0], F32);
                store(block, (i + VL) * rows, halves[1], F32);
            }
        }
    }
}

/* sums of a tile for num_cols <= GROUP columns whose weights begin at w, `stride` bytes from one to the next. */
INLINE void dot_group(float *sums, const float *x, const char *w, int64_t stride, int64_t num_cols, int64_t num_pairs,
                      int64_t w_next, int64_t next_step, int rows, int cols, int dtype) {
    for (int64_t c = 0; c < num_cols; c += cols) {
        const void *columns[24];
        for (int i = 0; i < cols; i++) columns[i] = w + min64(c + i, num_cols - 1) * stride;
        dot_tile(sums + c, x, columns, num_pairs, w_next ? w_next : cols * stride, next_step, rows, cols, dtype);
    }
}

/* One instance for each number of rows, so that the loops are unrolled. */
#define GROUPS(name, T) \
    static void group_##name(float *sums, const float *x, const char *w, int64_t stride, int64_t num_cols, \
                             int64_t num_pairs, int64_t w_next, int64_t next_step, int64_t rows) { \
        switch (rows) { \
        case 1: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 1, 8, T); break; \
        case 2: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 2, GROUP2, T); break; \
        case 3: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 3, GROUP3, T); break; \
        MORE_ROWS(T) \
        } \
    }
#ifdef __AVX512F__
#define GROUP2 12
#define GROUP3 8
#define MORE_ROWS(T) \
    case 4: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 4, 6, T); break; \
    case 5: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 5, 4, T); break; \
    default: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 6, 4, T); break;
#else
#define GROUP2 6
#define GROUP3 4
#define MORE_ROWS(T) \
    default: dot_group(sums, x, w, stride, num_cols, num_pairs, w_next, next_step, 4, 3, T); break;
#endif
GROUPS(f32, F32)
GROUPS(bf16, BF16)
GROUPS(f16, F16)

static void (*const group_of[])(float *, const float *, const char *, int64_t, int64_t, int64_t, int64_t, int64_t,
                                int64_t) = {group_f32, group_bf16, group_f16};

/* sums of few rows for num_cols <= BLOCK_COLS. Each tile asks for its share of the columns behind these, where has_next
 * says that they come next; a single one for those that it needs next itself. */
static void sum_few(const operands *o, const float *x, const char *w, int64_t stride, int64_t dim, int64_t num_cols,
                    int has_next, float *sums, int dtype) {
    int64_t size = size_of(dtype);
    for (int64_t t = 0; t < o->num_tiles; t++) {
        int64_t start = tile_start(t, o->num_rows, o->num_tiles);
        int64_t rows = tile_start(t + 1, o->num_rows, o->num_tiles) - start;
        int64_t next = 0, step = PAIR * size;
        if (o->num_tiles > 1) {
            next = has_next ? BLOCK_COLS * stride + t * (dim * size / o->num_tiles) : -1;
            step = has_next ? step / o->num_tiles : 0;
        }
        for (int64_t c = 0; c < num_cols; c += GROUP)
            group_of[dtype](sums + start * BLOCK_COLS + c, x + start * dim, w + c * stride, stride,
                            min64(GROUP, num_cols - c), dim / PAIR, next, step, rows);
    }
}

/* The same for the tiles from first_tile to last_tile of many rows; sums are those tiles'. */
INLINE void sum_many(const operands *o, const float *x, const char *w, int64_t stride, int64_t dim, int64_t num_cols,
                     int64_t first_tile, int64_t last_tile, int has_next, float *sums, float *wide, int dtype) {
    int64_t first = tile_start(first_tile, o->num_rows, o->num_tiles), size = size_of(dtype);
    int64_t share = (dim * size / (last_tile - first_tile) + 64) / 64 * 64; /* bytes of a weight row to ask for a tile */
    for (int64_t c = 0; c < num_cols; c += WIDE_COLS) {
        widen_weights(wide, w + c * stride, stride, num_cols - c, dim, dtype);
        const char *next = w + (c + WIDE_COLS) * stride;
        int64_t num_next = has_next ? WIDE_COLS : min64(WIDE_COLS, num_cols - c - WIDE_COLS);
        for (int64_t t = first_tile; t < last_tile; t++) {
            int64_t start = tile_start(t, o->num_rows, o->num_tiles), from = (t - first_tile) * share;
            int64_t rows = tile_start(t + 1, o->num_rows, o->num_tiles) - start;
            for (int64_t i = 0; i < num_next; i++)
                for (int64_t byte = from; byte < min64(from + share, dim * size); byte += 64)
                    __builtin_prefetch(next + i * stride + byte);
            float *to = sums + (start - first) * BLOCK_COLS + c;
            const float *tile = x + start * dim;
            switch (rows) {
            case 1: dot_wide(to, tile, wide, dim / VL, 1); break;
            case 2: dot_wide(to, tile, wide, dim / VL, 2); break;
#ifdef __AVX512F__
            case 3: dot_wide(to, tile, wide, dim / VL, 3); break;
            case 4: dot_wide(to, tile, wide, dim / VL, 4); break;
            case 5: dot_wide(to, tile, wide, dim / VL, 5); break;
#endif
            default: dot_wide(to, tile, wide, dim / VL, WIDE_TILE); break;
            }
        }
    }
}

#define MANY(name, T) \
    static void many_##name(const operands *o, const float *x, const char *w, int64_t stride, int64_t dim, \
                            int64_t num_cols, int64_t first_tile, int64_t last_tile, int has_next, float *sums, \
                            float *wide) { \
        sum_many(o, x, w, stride, dim, num_cols, first_tile, last_tile, has_next, sums, wide, T); \
    }
MANY(f32, F32)
MANY(bf16, BF16)
MANY(f16, F16)

static void (*const many_of[])(const operands *, const float *, const char *, int64_t, int64_t, int64_t, int64_t, int64_t,
                               int, float *, float *) = {many_f32, many_bf16, many_f16};

typedef struct {
    char *ragged; /* [BLOCK_COLS, BLOCK_K], for weights whose rows end within a PAIR */
    float *wide; /* [BLOCK_K, WIDE_COLS] */
    float *sums; /* [MAX_ROWS, BLOCK_COLS] */
} scratch;

/* out[rows of the tiles, col...] for at most MAX_ROWS and BLOCK_COLS. has_next: the columns behind these come next. */
static void linear_block(const operands *o, int64_t first_tile, int64_t last_tile, int64_t col, int64_t num_cols,
                         int has_next, const scratch *s, int dtype, int w_dtype) {
    int64_t in = o->in_features, size = size_of(w_dtype), first = tile_start(first_tile, o->num_rows, o->num_tiles);
    int64_t num_rows = tile_start(last_tile, o->num_rows, o->num_tiles) - first;
    float *sums = s->sums;
    memset(sums, 0, num_rows * BLOCK_COLS * sizeof *sums);
    for (int64_t k = 0; k < in; k += BLOCK_K) {
        int64_t rest = min64(BLOCK_K, in - k), dim = padded(rest), stride = in * size;
        const char *w = (const char *)o->w + (col * in + k) * size;
        if (dim != rest) {
            for (int64_t c = 0; c < num_cols; c++) {
                memcpy(s->ragged + c * dim * size, w + c * stride, rest * size);
                memset(s->ragged + (c * dim + rest) * size, 0, (dim - rest) * size);
            }
            w = s->ragged;
            stride = dim * size;
        }
        const float *x = o->x + k * o->num_rows;
        if (o->num_rows > FEW_ROWS)
            many_of[w_dtype](o, x, w, stride, dim, num_cols, first_tile, last_tile, has_next && dim == rest, sums, s->wide);
        else
            sum_few(o, x, w, stride, dim, num_cols, has_next && dim == rest, sums, w_dtype);
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL) {
            int64_t to = (first + r) * o->out_features + col + c;
            vf y = load(sums, r * BLOCK_COLS + c, F32);
            if (dtype == F32) store_upto(o->out, to, y, num_cols - c, F32);
            if (dtype == BF16) store_upto(o->out, to, y, num_cols - c, BF16);
            if (dtype == F16) store_upto(o->out, to, y, num_cols - c, F16);
        }
}

/* x: [num_rows, in_features] and out: [num_rows, out_features] of `dtype`, w: [out_features, in_features]; contiguous.
 * Returns 0, or -1 when out of memory. */
int octavo_linear(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features, int64_t out_features,
                  int dtype, int w_dtype, int num_threads) {
    int64_t pass_rows = min64(num_rows, PASS_ROWS);
    float *wide = aligned_alloc(64, (pass_rows * padded(in_features) * 4 + 127) / 64 * 64);
    if (!wide) return -1;
    int threads = num_threads > 1 && num_rows * in_features * out_features > PARALLEL_PRODUCTS ? num_threads : 1;
    /* Enough parts for each thread to find more when another is held up. */
    int64_t cols = min64((out_features / (threads * 4) + GROUP) / GROUP * GROUP, MAX_COLS);
    int64_t col_parts = (out_features + cols - 1) / cols;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *memory = aligned_alloc(64, (BLOCK_COLS * BLOCK_K + BLOCK_K * WIDE_COLS + MAX_ROWS * BLOCK_COLS) * 4);
        scratch s = {(char *)memory, memory + BLOCK_COLS * BLOCK_K, memory + (BLOCK_COLS + WIDE_COLS) * BLOCK_K};
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t first = 0; first < num_rows; first += PASS_ROWS) {
            int64_t rows = min64(PASS_ROWS, num_rows - first), tiles = tiles_of(rows);
            int64_t row_parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
            const void *from = at(x, first * in_features, dtype);
#pragma omp for
            for (int64_t t = 0; t < tiles; t++) {
#define PACK(T) \
    if (dtype == T && w_dtype == BF16) pack_tile(wide, from, t, rows, tiles, in_features, T, BF16); \
    if (dtype == T && w_dtype != BF16) pack_tile(wide, from, t, rows, tiles, in_features, T, F32)
                PACK(F32);
                PACK(BF16);
                PACK(F16);
            }
            void *to = (char *)out + first * out_features * size_of(dtype);
            operands o = {wide, w, to, rows, in_features, out_features, tiles};
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < col_parts * row_parts; task++) {
                int64_t part = task % row_parts, col = task / row_parts * cols, end = min64(col + cols, out_features);
                int64_t first_tile = tiles * part / row_parts, last_tile = tiles * (part + 1) / row_parts;
                if (!memory) continue;
                for (; col < end; col += BLOCK_COLS)
                    linear_block(&o, first_tile, last_tile, col, min64(BLOCK_COLS, end - col), end - col > BLOCK_COLS,
                                 &s, dtype, w_dtype);
            }
        }
        free(memory);
    }
    free(wide);
    return failed ? -1 : 0;
}
