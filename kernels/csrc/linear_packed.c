/* y = x w^T for a few rows, with w as oneDNN packs it: see linear_packed.py.
 *
 *   w  [out_features / panel][in_features / unit][panel][unit]    panel: a multiple of 16 columns, the last filled up;
 *                                                                  unit: 2 inputs of bfloat16, which are multiplied in
 *                                                                  pairs, or 1 of float32
 *   x  float32 [in_features][rows]
 *
 * A few rows wait for memory alone, so what counts is that each weight is read once, in a few streams: panel after panel,
 * a unit of inputs for all of its columns at a time; a pair is widened by a shift and a mask. Each output's products are
 * added up in one order: its bits depend on its own row and column alone. (On AVX2, one thread, bfloat16: 15 GB/s for one
 * row and 12.5 for 4, where linear.c has 16 and 12 on the plain matrix.)
 */
#include "operations.h"
#include "vector.h"
#include "work_queue.h"

#define FEW_ROWS 4 /* as in linear_packed.py: their sums for a panel are half of the registers that AVX-512 has */
#define MAX_PANEL 64
#define STREAMS 4 /* parts of a panel's inputs, read side by side: one stream does not keep the memory busy */
#define PARTS 8 /* of the panels, for each thread, or more: enough for it to find more when another is held up */
#define PARALLEL_PRODUCTS 400000 /* below, waking threads costs more than they save */
#define AHEAD 1024 /* bytes of a stream, behind those that are read, to ask for */

typedef uint32_t vu_mem __attribute__((vector_size(4 * VL), aligned(2), may_alias));

/* Adds a unit of inputs' products, whose weights begin at `columns`. */
INLINE void add_unit(vf *acc, const float *inputs, const char *columns, int rows, int vectors, int dtype) {
    UNROLL for (int v = 0; v < vectors; v++) {
        vu word = *(const vu_mem *)(columns + v * VL * 4);
        __builtin_prefetch(columns + v * VL * 4 + AHEAD);
        vf first = (vf)(dtype == BF16 ? word << 16 : word), second = (vf)(word & 0xffff0000u);
        UNROLL for (int r = 0; r < rows; r++) {
            acc[r * vectors + v] = fma_f(splat(inputs[r]), first, acc[r * vectors + v]);
            if (dtype == BF16) acc[r * vectors + v] = fma_f(splat(inputs[rows + r]), second, acc[r * vectors + v]);
        }
    }
}

/* sums[r * MAX_PANEL + column] of a panel. */
INLINE void dot_panel(float *sums, const float *x, const char *w, int64_t in_features, int rows, int panel, int dtype) {
    vf acc[FEW_ROWS * MAX_PANEL / VL] = {{0}};
    int unit = dtype == BF16 ? 2 : 1, vectors = panel / VL; /* a unit is four bytes, either way */
    int64_t units = in_features / unit, part = units / STREAMS;
    for (int64_t i = 0; i < part; i++)
        UNROLL for (int s = 0; s < STREAMS; s++)
            add_unit(acc, x + (s * part + i) * unit * rows, w + (s * part + i) * panel * 4, rows, vectors, dtype);
    for (int64_t i = part * STREAMS; i < units; i++)
        add_unit(acc, x + i * unit * rows, w + i * panel * 4, rows, vectors, dtype);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) store(sums, r * MAX_PANEL + v * VL, acc[r * vectors + v], F32);
}

#define DOT(rows, T) \
    static void dot_##rows##_##T(float *sums, const float *x, const char *w, int64_t in_features, int64_t panel) { \
        switch (panel) { \
        case 16: dot_panel(sums, x, w, in_features, rows, 16, T); break; \
        case 32: dot_panel(sums, x, w, in_features, rows, 32, T); break; \
        case 48: dot_panel(sums, x, w, in_features, rows, 48, T); break; \
        default: dot_panel(sums, x, w, in_features, rows, MAX_PANEL, T); \
        } \
    }
#define DOTS(T) DOT(1, T) DOT(2, T) DOT(3, T) DOT(4, T)
DOTS(F32)
DOTS(BF16)

typedef void dot(float *, const float *, const char *, int64_t, int64_t);
#define DOTS_OF(T) {dot_1_##T, dot_2_##T, dot_3_##T, dot_4_##T}
static dot *const dot_of[2][FEW_ROWS] = {DOTS_OF(F32), DOTS_OF(BF16)};

/* to[num_inputs][num_rows] of x [num_rows, num_inputs] */
static void lay_out(float *to, const void *x, int64_t num_rows, int64_t num_inputs, int dtype) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t i = 0; i < num_inputs; i++) {
            uint32_t bits;
            if (dtype == F32)
                memcpy(&bits, (const float *)x + r * num_inputs + i, sizeof bits);
            else
                bits = (uint32_t)((const uint16_t *)x)[r * num_inputs + i] << 16;
            memcpy(to + i * num_rows + r, &bits, sizeof bits);
        }
}

typedef struct {
    const float *x; /* laid out as above */
    const char *w;
    void *out;
    int64_t num_rows, in_features, out_features, panel;
    int dtype;
} operands;

/* The outputs of one panel. */
static void multiply_panel(const operands *o, int64_t number) {
    float sums[FEW_ROWS * MAX_PANEL];
    int64_t first = number * o->panel, num_cols = min64(o->panel, o->out_features - first);
    const char *w = o->w + first * o->in_features * size_of(o->dtype);
    dot_of[o->dtype][o->num_rows - 1](sums, o->x, w, o->in_features, o->panel);
    for (int64_t r = 0; r < o->num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL) {
            vf y = load(sums, r * MAX_PANEL + c, F32);
            int64_t to = r * o->out_features + first + c;
            if (o->dtype == F32)
                store_upto(o->out, to, y, num_cols - c, F32);
            else
                store_upto(o->out, to, y, num_cols - c, BF16);
        }
}

int octavo_linear_packed(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features,
                         int64_t out_features, int64_t panel, int dtype, int num_threads) {
    if (num_rows == 0 || out_features == 0) return 0;
    int threads = num_threads > 1 && num_rows * in_features * out_features > PARALLEL_PRODUCTS ? num_threads : 1;
    int64_t wide_size = (num_rows * in_features * 4 + 63) / 64 * 64;
    char *shared = aligned_alloc(64, threads * sizeof(work_queue) + wide_size);
    if (!shared) return -1;
    work_queue *queues = (work_queue *)shared;
    float *wide = (float *)(shared + threads * sizeof(work_queue));
    lay_out(wide, x, num_rows, in_features, dtype);
    operands o = {wide, w, out, num_rows, in_features, out_features, panel, dtype};
    int64_t panels = (out_features + panel - 1) / panel, tasks = min64(panels, PARTS * threads);
    for (int i = 0; i < threads; i++) fill_queue(queues, threads, i, tasks);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t task; (task = take_task(queues, threads, thread_index())) >= 0;)
        for (int64_t p = panels * task / tasks; p < panels * (task + 1) / tasks; p++) multiply_panel(&o, p);
    free(shared);
    return 0;
}
