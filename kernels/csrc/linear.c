/* y = x w^T, each of float32, bfloat16 or float16: see linear_dense.py and linear_deterministic.py.
 *
 * Rows of x are cut into tiles, and are laid out, in float32, in the order in which a tile reads them. Weights are read
 * as they lie in memory and widened in registers, which costs one instruction or two for TILE of those that multiply:
 *
 *   x  [K / BLOCK_K][tiles][BLOCK_K / VL][rows of the tile][VL]    one tile and block stays in the L1 cache
 *   w  BLOCK_COLS rows of BLOCK_K inputs                           stay in the L2 cache for all tiles
 *   sums of rows x cols x VL lanes                                 registers
 *
 * A pair of bfloat16 numbers is widened by a shift and a mask, which give the even inputs and the odd ones: so x has
 * those apart too. Each output is summed over BLOCK_K inputs in VL lanes, then by one tree, then block after block: so its
 * bits depend on its own row and column alone, not on the number of rows, the tile it fell into, or the number of threads.
 *
 * Columns that are multiplied at once stand far apart, so that each is one of a few streams in the order of memory, which
 * is what the processor's prefetcher follows. Up to FEW_ROWS rows wait for memory alone, and so take more streams.
 */
#include "vector.h"
#include "work_queue.h"

#define PAIR (2 * VL) /* inputs of one round of the inner loop */
#define TILE 6 /* rows */
#define LEAST_ROWS 3 /* of a tile where there are several */
#define FEW_ROWS 3
#define STREAMS 4
#ifdef __AVX512F__
#define TILE_COLS 4 /* of a tile: TILE * TILE_COLS sums, and what they are made from, fit the CPU's registers */
#else
#define TILE_COLS 2
#endif
#define BLOCK_K 1024 /* fixed, as the order of sums depends on it */
#define BLOCK_COLS 96 /* a multiple of TILE_COLS */
#define MAX_ROWS 96 /* rows of x that a thread takes at once */
#define MAX_COLS 960 /* columns, likewise */
#define FEW_PARTS 4 /* of a thread's columns, or more: enough for it to find more when another is held up */
#define PARTS 8 /* likewise, for more rows */
#define PASS_ROWS 768 /* rows laid out at once: what bounds the scratch memory; a multiple of MAX_ROWS */
#define PARALLEL_PRODUCTS 400000 /* below, waking threads costs more than they save */
#define AHEAD 1024 /* bytes of a stream, behind those that are read, to ask for */

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

/* sums[r * sums_stride + c * sums_step] += x[r] . w[c] over num_pairs * PAIR inputs; asks for `ahead` bytes on. */
INLINE void dot_tile(float *sums, int64_t sums_stride, int64_t sums_step, const float *x, const char *const *w,
                     int64_t num_pairs, int64_t ahead, int rows, int cols, int dtype) {
    vf acc[24] = {{0}};
    for (int64_t i = 0; i < num_pairs; i++) {
        UNROLL for (int c = 0; c < cols; c++) __builtin_prefetch(w[c] + ahead + i * PAIR * size_of(dtype));
        UNROLL for (int half = 0; half < 2; half++) {
            const float *xi = x + (2 * i + half) * rows * VL;
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
    float result[24];
    UNROLL for (int i = 0; i < rows * cols; i += 4) *(v4_mem *)(result + i) = sum_four(acc + i);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) sums[r * sums_stride + c * sums_step] += result[r * cols + c];
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && VL == 8
/* The inner loop for two columns, written out, as compilers put one of its 12 sums into memory: 12 sums, two vectors of
 * weights, one of x, and a mask are all of the 16 registers. */
#define EACH_SUM(DO) \
    DO(0, 4) DO(1, 5) DO(2, 6) DO(3, 7) DO(4, 8) DO(5, 9) DO(6, 10) DO(7, 11) DO(8, 12) DO(9, 13) DO(10, 14) DO(11, 15)
#define ZERO(i, ymm) "vxorps %%xmm" #ymm ", %%xmm" #ymm ", %%xmm" #ymm "\n\t"
#define KEEP_SUM(i, ymm) "vmovaps %%ymm" #ymm ", 32*" #i "(%[sums])\n\t"
#define PRODUCTS(i, ymm_0, ymm_1) \
    "vmovaps 32*" #i "(%[x]), %%ymm2\n\t" \
    "vfmadd231ps %%ymm0, %%ymm2, %%ymm" #ymm_0 "\n\t" \
    "vfmadd231ps %%ymm1, %%ymm2, %%ymm" #ymm_1 "\n\t"
#define ROWS_3_0 PRODUCTS(0, 4, 5) PRODUCTS(1, 6, 7) PRODUCTS(2, 8, 9)
#define ROWS_3_1 PRODUCTS(3, 4, 5) PRODUCTS(4, 6, 7) PRODUCTS(5, 8, 9)
#define ROWS_4_0 ROWS_3_0 PRODUCTS(3, 10, 11)
#define ROWS_4_1 PRODUCTS(4, 4, 5) PRODUCTS(5, 6, 7) PRODUCTS(6, 8, 9) PRODUCTS(7, 10, 11)
#define ROWS_5_0 ROWS_4_0 PRODUCTS(4, 12, 13)
#define ROWS_5_1 PRODUCTS(5, 4, 5) PRODUCTS(6, 6, 7) PRODUCTS(7, 8, 9) PRODUCTS(8, 10, 11) PRODUCTS(9, 12, 13)
#define ROWS_6_0 ROWS_5_0 PRODUCTS(5, 14, 15)
#define ROWS_6_1 \
    PRODUCTS(6, 4, 5) PRODUCTS(7, 6, 7) PRODUCTS(8, 8, 9) PRODUCTS(9, 10, 11) PRODUCTS(10, 12, 13) PRODUCTS(11, 14, 15)
#define WIDEN_BF16_0 \
    "vmovdqu (%[w]), %%ymm0\n\tvpslld $16, %%ymm0, %%ymm0\n\t" \
    "vmovdqu (%[w],%[s]), %%ymm1\n\tvpslld $16, %%ymm1, %%ymm1\n\t"
#define WIDEN_BF16_1 "vpand (%[w]), %%ymm3, %%ymm0\n\tvpand (%[w],%[s]), %%ymm3, %%ymm1\n\t"
#define WIDEN_F16_0 "vcvtph2ps (%[w]), %%ymm0\n\tvcvtph2ps (%[w],%[s]), %%ymm1\n\t"
#define WIDEN_F16_1 "vcvtph2ps 16(%[w]), %%ymm0\n\tvcvtph2ps 16(%[w],%[s]), %%ymm1\n\t"
#define WIDEN_F32_0 "vmovups (%[w]), %%ymm0\n\tvmovups (%[w],%[s]), %%ymm1\n\t"
#define WIDEN_F32_1 "vmovups 32(%[w]), %%ymm0\n\tvmovups 32(%[w],%[s]), %%ymm1\n\t"
#define ASK "prefetcht1 (%[w],%[p])\n\tprefetcht1 (%[w],%[q])\n\t"

#define PAIR_KERNEL(rows, T, bytes) \
    static void dot_pair_##rows##_##T(float *sums, const float *x, const char *w, int64_t stride, int64_t num_pairs, \
                                      int64_t ahead) { \
        __asm__ volatile( \
            "vpcmpeqd %%ymm3, %%ymm3, %%ymm3\n\tvpslld $16, %%ymm3, %%ymm3\n\t" EACH_SUM(ZERO) \
            ".p2align 5\n1:\n\t" ASK WIDEN_##T##_0 ROWS_##rows##_0 WIDEN_##T##_1 ROWS_##rows##_1 \
            "add $64*" #rows ", %[x]\n\tadd $" #bytes ", %[w]\n\tdec %[n]\n\tjnz 1b\n\t" EACH_SUM(KEEP_SUM) \
            : [x] "+r"(x), [w] "+r"(w), [n] "+r"(num_pairs) \
            : [sums] "r"(sums), [s] "r"(stride), [p] "r"(ahead), [q] "r"(stride + ahead) \
            : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
              "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"); \
    }
#define TILE_KERNELS(T, bytes) \
    PAIR_KERNEL(3, T, bytes) PAIR_KERNEL(4, T, bytes) PAIR_KERNEL(5, T, bytes) PAIR_KERNEL(6, T, bytes)
TILE_KERNELS(F32, 64)
TILE_KERNELS(BF16, 32)
TILE_KERNELS(F16, 32)

typedef void pair_kernel(float *, const float *, const char *, int64_t, int64_t, int64_t);
#define KERNELS_OF(T) {dot_pair_3_##T, dot_pair_4_##T, dot_pair_5_##T, dot_pair_6_##T}
static pair_kernel *const pair_kernels[3][TILE - LEAST_ROWS + 1] = {KERNELS_OF(F32), KERNELS_OF(BF16), KERNELS_OF(F16)};

/* sums[r * BLOCK_COLS + c] of a tile for num_cols <= BLOCK_COLS columns whose weights begin at w; asks for `ahead` bytes
 * on. */
static void sum_tile(float *sums, const float *x, const char *w, int64_t stride, int64_t num_cols, int64_t num_pairs,
                     int64_t ahead, int64_t rows, int dtype) {
    pair_kernel *kernel = pair_kernels[dtype][rows - LEAST_ROWS];
    int64_t apart = (num_cols + 1) / 2;
    for (int64_t c = 0; c < apart; c++) {
        vf acc[2 * TILE];
        float result[2 * TILE];
        kernel((float *)acc, x, w + c * stride, c + apart < num_cols ? apart * stride : 0, num_pairs, ahead);
        UNROLL for (int i = 0; i < 2 * TILE; i += 4) *(v4_mem *)(result + i) = sum_four(acc + i);
        for (int r = 0; r < rows; r++) {
            sums[r * BLOCK_COLS + c] += result[2 * r];
            sums[r * BLOCK_COLS + c + apart] += result[2 * r + 1];
        }
    }
}
#else
INLINE void sum_rows(float *sums, const float *x, const char *w, int64_t stride, int64_t num_cols, int64_t num_pairs,
                     int64_t ahead, int rows, int dtype) {
    int64_t apart = (num_cols + TILE_COLS - 1) / TILE_COLS;
    for (int64_t c = 0; c < apart; c++) {
        const char *columns[TILE_COLS];
        for (int i = 0; i < TILE_COLS; i++) columns[i] = w + min64(i * apart + c, num_cols - 1) * stride;
        dot_tile(sums + c, BLOCK_COLS, apart, x, columns, num_pairs, ahead, rows, TILE_COLS, dtype);
    }
}

static void sum_tile(float *sums, const float *x, const char *w, int64_t stride, int64_t num_cols, int64_t num_pairs,
                     int64_t ahead, int64_t rows, int dtype) {
#define ROWS(n, T) \
    if (rows == n && dtype == T) sum_rows(sums, x, w, stride, num_cols, num_pairs, ahead, n, T)
#define TILES(T) ROWS(3, T); ROWS(4, T); ROWS(5, T); ROWS(6, T)
    TILES(F32);
    TILES(BF16);
    TILES(F16);
}
#endif

typedef struct {
    const float *x; /* laid out as above, inputs that are not there are zeros */
    const void *w; /* [out_features, in_features] */
    void *out; /* [num_rows, out_features] */
    int64_t num_rows, in_features, out_features, num_tiles;
} operands;

INLINE int64_t padded(int64_t n) { return (n + PAIR - 1) / PAIR * PAIR; }
INLINE int64_t tiles_of(int64_t num_rows) { return (num_rows + TILE - 1) / TILE; }
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
        halves[0] = SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        halves[1] = SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
        halves[0] = SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
        halves[1] = SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
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

typedef struct {
    float *sums; /* [MAX_ROWS, BLOCK_COLS]; for few rows [FEW_ROWS, MAX_COLS + STREAMS] of it */
    char *ragged; /* [BLOCK_COLS, BLOCK_K], for weights whose rows end within a PAIR */
} scratch;

/* Of num_cols weight rows of `rest` inputs, `stride` bytes apart: those with zeros behind them, `dim` inputs apart. */
static const char *fill_up(char *to, const char *w, int64_t stride, int64_t num_cols, int64_t rest, int64_t dim,
                           int64_t size) {
    for (int64_t c = 0; c < num_cols; c++) {
        memcpy(to + c * dim * size, w + c * stride, rest * size);
        memset(to + (c * dim + rest) * size, 0, (dim - rest) * size);
    }
    return to;
}

static void store_sums(const operands *o, const float *sums, int64_t stride, int64_t first, int64_t num_rows, int64_t col,
                       int64_t num_cols, int dtype) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL) {
            int64_t to = (first + r) * o->out_features + col + c;
            vf y = load(sums, r * stride + c, F32);
            if (dtype == F32) store_upto(o->out, to, y, num_cols - c, F32);
            if (dtype == BF16) store_upto(o->out, to, y, num_cols - c, BF16);
            if (dtype == F16) store_upto(o->out, to, y, num_cols - c, F16);
        }
}

/* out[rows of the tiles, col...] for at most MAX_ROWS and BLOCK_COLS. */
static void linear_block(const operands *o, int64_t first_tile, int64_t last_tile, int64_t col, int64_t num_cols,
                         const scratch *s, int dtype, int w_dtype) {
    int64_t in = o->in_features, size = size_of(w_dtype), first = tile_start(first_tile, o->num_rows, o->num_tiles);
    int64_t num_rows = tile_start(last_tile, o->num_rows, o->num_tiles) - first;
    memset(s->sums, 0, num_rows * BLOCK_COLS * sizeof *s->sums);
    for (int64_t k = 0; k < in; k += BLOCK_K) {
        int64_t rest = min64(BLOCK_K, in - k), dim = padded(rest), stride = in * size;
        const char *w = (const char *)o->w + (col * in + k) * size;
        if (dim != rest) {
            w = fill_up(s->ragged, w, stride, num_cols, rest, dim, size);
            stride = dim * size;
        }
        for (int64_t t = first_tile; t < last_tile; t++) {
            int64_t start = tile_start(t, o->num_rows, o->num_tiles);
            int64_t rows = tile_start(t + 1, o->num_rows, o->num_tiles) - start;
            sum_tile(s->sums + (start - first) * BLOCK_COLS, o->x + k * o->num_rows + start * dim, w, stride, num_cols,
                     dim / PAIR, t == first_tile ? stride : 0, rows, w_dtype);
        }
    }
    store_sums(o, s->sums, BLOCK_COLS, first, num_rows, col, num_cols, dtype);
}

/* out[all rows, col...] for at most FEW_ROWS and MAX_COLS. */
INLINE void stream_columns(const operands *o, int64_t col, int64_t num_cols, const scratch *s, int rows, int w_dtype) {
    int64_t in = o->in_features, size = size_of(w_dtype), apart = (num_cols + STREAMS - 1) / STREAMS;
    memset(s->sums, 0, rows * (MAX_COLS + STREAMS) * sizeof *s->sums);
    for (int64_t c = 0; c < apart; c++)
        for (int64_t k = 0; k < in; k += BLOCK_K) {
            int64_t rest = min64(BLOCK_K, in - k), dim = padded(rest);
            const char *w[STREAMS];
            for (int64_t i = 0; i < STREAMS; i++) {
                w[i] = (const char *)o->w + ((col + min64(i * apart + c, num_cols - 1)) * in + k) * size;
                if (dim != rest) w[i] = fill_up(s->ragged + i * dim * size, w[i], 0, 1, rest, dim, size);
            }
            dot_tile(s->sums + c, MAX_COLS + STREAMS, apart, o->x + k * rows, w, dim / PAIR, AHEAD, rows, STREAMS,
                     w_dtype);
        }
}

#define STREAM(name, T) \
    static void stream_##name(const operands *o, int64_t col, int64_t num_cols, const scratch *s) { \
        if (o->num_rows == 1) stream_columns(o, col, num_cols, s, 1, T); \
        if (o->num_rows == 2) stream_columns(o, col, num_cols, s, 2, T); \
        if (o->num_rows == 3) stream_columns(o, col, num_cols, s, 3, T); \
    }
STREAM(f32, F32)
STREAM(bf16, BF16)
STREAM(f16, F16)
static void (*const stream_of[])(const operands *, int64_t, int64_t, const scratch *) = {stream_f32, stream_bf16,
                                                                                        stream_f16};

/* The columns of one of `parts` parts, which differ by two at most. */
INLINE int64_t part_start(int64_t part, int64_t parts, int64_t out_features) {
    return min64((out_features + 1) / 2 * part / parts * 2, out_features);
}

/* A thread's share of the product, and what others leave of theirs. */
static void work(const operands *o, work_queue *queues, int num_queues, int64_t row_parts, int64_t col_parts,
                 const scratch *s, int dtype, int w_dtype) {
    for (int64_t task; (task = take_task(queues, num_queues, thread_index())) >= 0;) {
        int64_t part = task % row_parts, col = part_start(task / row_parts, col_parts, o->out_features);
        int64_t end = part_start(task / row_parts + 1, col_parts, o->out_features);
        int64_t first_tile = o->num_tiles * part / row_parts, last_tile = o->num_tiles * (part + 1) / row_parts;
        if (o->num_rows <= FEW_ROWS) {
            stream_of[w_dtype](o, col, end - col, s);
            store_sums(o, s->sums, MAX_COLS + STREAMS, 0, o->num_rows, col, end - col, dtype);
        } else {
            linear_block(o, first_tile, last_tile, col, end - col, s, dtype, w_dtype);
        }
    }
}

/* x: [num_rows, in_features] and out: [num_rows, out_features] of `dtype`, w: [out_features, in_features]; contiguous.
 * Returns 0, or -1 when out of memory. */
int octavo_linear(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features, int64_t out_features,
                  int dtype, int w_dtype, int num_threads) {
    int64_t pass_rows = min64(num_rows, PASS_ROWS);
    int threads = num_threads > 1 && num_rows * in_features * out_features > PARALLEL_PRODUCTS ? num_threads : 1;
    int64_t wide_size = (pass_rows * padded(in_features) * 4 + 127) / 64 * 64;
    char *shared = aligned_alloc(64, threads * sizeof(work_queue) + wide_size);
    if (!shared) return -1;
    work_queue *queues = (work_queue *)shared;
    float *wide = (float *)(shared + threads * sizeof(work_queue));
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t ragged = in_features % PAIR ? BLOCK_COLS * BLOCK_K : 0;
        float *memory = aligned_alloc(64, (MAX_ROWS * BLOCK_COLS + ragged) * 4);
        scratch s = {memory, (char *)(memory + MAX_ROWS * BLOCK_COLS)};
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t first = 0; first < num_rows; first += PASS_ROWS) {
            int64_t rows = min64(PASS_ROWS, num_rows - first), tiles = tiles_of(rows);
            int few = rows <= FEW_ROWS;
            int64_t row_parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
            int64_t col_parts = num_parts(out_features, few ? MAX_COLS : BLOCK_COLS, few ? FEW_PARTS : PARTS, threads);
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
#pragma omp for
            for (int i = 0; i < threads; i++) fill_queue(queues, threads, i, col_parts * row_parts);
            void *to = (char *)out + first * out_features * size_of(dtype);
            operands o = {wide, w, to, rows, in_features, out_features, tiles};
            if (memory) work(&o, queues, threads, row_parts, col_parts, &s, dtype, w_dtype);
#pragma omp barrier
        }
        free(memory);
    }
    free(shared);
    return failed ? -1 : 0;
}
