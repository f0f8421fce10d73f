/* y = x w^T of bfloat16 in whole numbers: the quick way of linear_dense.py for more than a few rows, and that of
 * linear_rounded.py for any number of them.
 *
 * GROUP inputs of a row of x, and of a row of w, are rounded to whole numbers of 16 bits times a power of two of their own,
 * multiplied and summed exactly in 32 bits, and become floats: two instructions for 16 products, which AVX2 does in two
 * thirds of the time of the two that floats take; AVX-512 with VNNI takes one for 32, twice as many as of floats. The sum
 * stays below 2^31, as numbers of x are below 2^13 and those of w are below 2^18 all together. A bfloat16 number has 8 bits:
 * so those of x within 2^5 of the largest of their group are taken as they are, and smaller ones are at most 2^-13 of the
 * largest beside what they were. For w that is 2^4 and 2^-12 where all are alike, better by 2 or 4 where they are not. Up to
 * 2^-9 of each was lost when it was stored.
 *
 * Weights are rounded as they are needed, into panels that all rows are multiplied by, or once for all, and then they are
 * read as panels, in the order of memory:
 *
 *   x, int16 [in / BLOCK_K][tiles][BLOCK_K / 2][rows of the tile][2]   a tile's block stays in the L1 cache
 *   w, int16 [columns / PANEL][BLOCK_K / 2][PANEL][2]                  one panel too, all of a task in the L2 cache
 *   stored, [columns / PANEL][in / 2][PANEL][2], then powers, bfloat16 [columns / PANEL][in / GROUP][PANEL]
 *   sums, float [columns / PANEL][rows][PANEL]                         of a task's columns
 *
 * An output's bits depend on its own row and column alone, as those of linear.c do; they are others than those.
 */
#include "operations.h"
#include "vector.h"
#include "work_queue.h"

#define MAX_PANELS 6 /* of a task */
#define TASKS_OF_THREAD 8 /* at least: enough for each thread to find more when another is held up */
#define NEAR_TILES 32 /* whose block of x stays in the L2 cache while a task's panels go by */
#define PASS_ROWS 768 /* rows laid out at once: what bounds the scratch memory */
#define LEAST_ROWS 24 /* fewer do not pay for weights to be rounded */
#define FEW_TILES 4 /* for which stored panels are read one after the other, as they lie */
#define FEW_ROWS 3 /* for which several of those are read side by side, */
#define FEW_TASKS 4 /* of each thread then, or more, */
#define MOST_STREAMED 60 /* which are of so many panels at most */
#define PARALLEL_PRODUCTS 400000 /* below, waking threads costs more than they save; where weights are stored */

#if defined(__AVX2__) && defined(__FMA__) && (VL == 8 || defined(__AVX512VNNI__))
#include "whole_products.h"

typedef struct {
    float *sums;    /* as above */
    int32_t *panels; /* [MAX_PANELS][BLOCK_K / 2][PANEL] pairs */
    uint16_t *scales; /* [MAX_PANELS][BLOCK_K / GROUP][PANEL] */
} scratch;

typedef struct {
    const uint16_t *rows;    /* [out_features, in_features], to be rounded; or NULL, and */
    const int32_t *panels;   /* stored, as above */
    const uint16_t *scales;
    int64_t in_features, out_features;
} weights;

INLINE int64_t panels_of(int64_t out_features) { return (out_features + PANEL - 1) / PANEL; }

static void store_panel(const rows_of_x *x, const weights *w, uint16_t *out, int64_t panel, const float *sums) {
    int64_t num_cols = min64(PANEL, w->out_features - panel * PANEL);
    for (int64_t r = 0; r < x->num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL)
            store_upto(out, r * w->out_features + panel * PANEL + c, load(sums, r * PANEL + c, F32), num_cols - c, BF16);
}

/* As multiply_columns, for FEW_ROWS at most and weights that are stored. */
static void stream_columns(const rows_of_x *x, const weights *w, uint16_t *out, int64_t first_panel, int64_t num_panels) {
    int64_t in = x->in_features, rows = x->num_rows, streams = streams_of[rows - 1];
    int64_t apart = (num_panels + streams - 1) / streams;
    for (int64_t i = 0; i < apart; i++) {
        float sums[MAX_SUMS * PANEL];
        const int32_t *panels[STREAMS];
        const uint16_t *scales[STREAMS];
        int64_t numbers[STREAMS];
        for (int64_t s = 0; s < streams; s++) {
            numbers[s] = first_panel + min64(s * apart + i, num_panels - 1);
            panels[s] = w->panels + numbers[s] * in / 2 * PANEL;
            scales[s] = w->scales + numbers[s] * in / GROUP * PANEL;
        }
        stream_kernels[rows - 1](sums, x, panels, scales);
        for (int64_t s = 0; s < streams; s++) store_panel(x, w, out, numbers[s], sums + s * rows * PANEL);
    }
}

/* The columns of num_panels panels from the first on, or what there is of them. */
static void multiply_columns(const rows_of_x *x, const weights *w, uint16_t *out, int64_t first_panel, int64_t num_panels,
                             const scratch *s) {
    int64_t in = x->in_features, rows = x->num_rows;
    memset(s->sums, 0, num_panels * rows * PANEL * sizeof *s->sums);
    for (int64_t k = 0; k < in; k += BLOCK_K) {
        int64_t dim = min64(BLOCK_K, in - k), num_groups = dim / GROUP;
        for (int64_t near = 0; near < x->num_tiles; near += NEAR_TILES) {
            int64_t end = min64(near + NEAR_TILES, x->num_tiles);
            for (int64_t p = 0; p < num_panels; p++) {
                int32_t *rounded = s->panels + p * (BLOCK_K / 2 * PANEL);
                uint16_t *their_scales = s->scales + p * (BLOCK_K / GROUP * PANEL);
                if (w->rows && near == 0)
                    round_panel(rounded, their_scales, w->rows, in, w->out_features, (first_panel + p) * PANEL, k, num_groups);
                const int32_t *panel = w->rows ? rounded : w->panels + ((first_panel + p) * in + k) / 2 * PANEL;
                const uint16_t *scales =
                    w->rows ? their_scales : w->scales + ((first_panel + p) * in + k) / GROUP * PANEL;
                for (int64_t t = near; t < end; t++) {
                    int64_t first = tile_start(t, rows, x->num_tiles);
                    int64_t height = tile_start(t + 1, rows, x->num_tiles) - first;
                    tile_kernel *kernel = (t > 0 || w->rows ? multiply_rows_of : multiply_far_rows_of)[height - 1];
                    kernel(s->sums + (p * rows + first) * PANEL, (const int32_t *)(x->integers + k * rows + first * dim),
                           panel, x->scales + k / GROUP * rows + first, rows, scales, num_groups);
                }
            }
        }
    }
    for (int64_t p = 0; p < num_panels; p++) store_panel(x, w, out, first_panel + p, s->sums + p * rows * PANEL);
}

/* out = x w^T. 0, or -1 when out of memory. */
static int multiply(const uint16_t *x, const weights *w, uint16_t *out, int64_t num_rows, int num_threads) {
    int64_t pass_rows = min64(num_rows, PASS_ROWS), in_features = w->in_features;
    int64_t scales_size = (in_features / GROUP * pass_rows * 4 + 63) / 64 * 64;
    int64_t shared_size = num_threads * sizeof(work_queue) + scales_size + pass_rows * in_features * 2;
    char *shared = aligned_alloc(64, (shared_size + 63) / 64 * 64);
    if (!shared) return -1;
    work_queue *queues = (work_queue *)shared;
    float *scales = (float *)(shared + num_threads * sizeof(work_queue));
    int16_t *integers = (int16_t *)((char *)scales + scales_size);
    int64_t all_panels = panels_of(w->out_features);
    int streams = !w->rows && num_rows <= FEW_ROWS;
    int64_t most = streams ? MOST_STREAMED : MAX_PANELS, least = streams ? FEW_TASKS : TASKS_OF_THREAD;
    int64_t tasks = max64((all_panels + most - 1) / most, min64(all_panels, least * num_threads));
    tasks = min64(all_panels, (tasks + num_threads - 1) / num_threads * num_threads);
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        int64_t panels_size = w->rows ? MAX_PANELS * BLOCK_K * PANEL * 2 : 0;
        int64_t w_scales_size = w->rows ? MAX_PANELS * BLOCK_K / GROUP * PANEL * 2 : 0;
        char *memory = aligned_alloc(64, panels_size + w_scales_size + MAX_PANELS * pass_rows * PANEL * 4);
        scratch s = {(float *)(memory + panels_size + w_scales_size), (int32_t *)memory, (uint16_t *)(memory + panels_size)};
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t first = 0; first < num_rows; first += PASS_ROWS) {
            int64_t rows = min64(PASS_ROWS, num_rows - first), num_tiles = (rows + TILE - 1) / TILE;
            rows_of_x packed = {integers, scales, rows, num_tiles, in_features};
            int64_t at_once = w->rows || num_tiles > FEW_TILES ? MAX_PANELS : 1;
#pragma omp for
            for (int64_t t = 0; t < num_tiles; t++) {
                int64_t start = tile_start(t, rows, num_tiles), height = tile_start(t + 1, rows, num_tiles) - start;
                for (int64_t r = 0; r < height; r++)
                    round_row(&packed, start, r, height, x + (first + start + r) * in_features);
            }
#pragma omp for
            for (int i = 0; i < num_threads; i++) fill_queue(queues, num_threads, i, tasks);
            for (int64_t task; memory && (task = take_task(queues, num_threads, thread_index())) >= 0;) {
                int64_t panel = all_panels * task / tasks, end = all_panels * (task + 1) / tasks;
                uint16_t *to = out + first * w->out_features;
                if (streams) stream_columns(&packed, w, to, panel, end - panel);
                for (; panel < end && !streams; panel += at_once)
                    multiply_columns(&packed, w, to, panel, min64(at_once, end - panel), &s);
            }
#pragma omp barrier
        }
        free(memory);
    }
    free(shared);
    return failed ? -1 : 0;
}

int octavo_linear_quick(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int dtype, int w_dtype, int num_threads) {
    if (dtype != BF16 || w_dtype != BF16 || num_rows < LEAST_ROWS || in_features % GROUP || in_features == 0)
        return octavo_linear(x, w, out, num_rows, in_features, out_features, dtype, w_dtype, num_threads);
    weights as_they_are = {w, NULL, NULL, in_features, out_features};
    return multiply(x, &as_they_are, out, num_rows, num_threads);
}

int64_t octavo_rounded_size(int64_t in_features, int64_t out_features) {
    return in_features % GROUP ? 0 : panels_of(out_features) * PANEL * (in_features + in_features / GROUP);
}

INLINE uint16_t *scales_behind(const void *packed, int64_t in_features, int64_t out_features) {
    return (uint16_t *)packed + panels_of(out_features) * PANEL * in_features;
}

void octavo_round_weights(const void *w, void *packed, int64_t in_features, int64_t out_features, int64_t first,
                          int64_t num_rows, int num_threads) {
    int32_t *integers = (int32_t *)packed + first / 2 * in_features;
    uint16_t *scales = scales_behind(packed, in_features, out_features) + first * (in_features / GROUP);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t p = 0; p < panels_of(num_rows); p++)
        round_panel(integers + p * in_features / 2 * PANEL, scales + p * in_features / GROUP * PANEL, w, in_features,
                    num_rows, p * PANEL, 0, in_features / GROUP);
}

int octavo_linear_rounded(const void *x, const void *packed, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int num_threads) {
    if (num_rows == 0 || out_features == 0) return 0;
    int threads = num_threads > 1 && num_rows * in_features * out_features > PARALLEL_PRODUCTS ? num_threads : 1;
    weights stored = {NULL, packed, scales_behind(packed, in_features, out_features), in_features, out_features};
    return multiply(x, &stored, out, num_rows, threads);
}
#else
int octavo_linear_quick(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int dtype, int w_dtype, int num_threads) {
    return octavo_linear(x, w, out, num_rows, in_features, out_features, dtype, w_dtype, num_threads);
}

int64_t octavo_rounded_size(int64_t in_features, int64_t out_features) {
    (void)in_features, (void)out_features;
    return 0;
}
void octavo_round_weights(const void *w, void *packed, int64_t in_features, int64_t out_features, int64_t first,
                          int64_t num_rows, int num_threads) {
    (void)w, (void)packed, (void)in_features, (void)out_features, (void)first, (void)num_rows, (void)num_threads;
}
int octavo_linear_rounded(const void *x, const void *packed, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int num_threads) {
    (void)x, (void)packed, (void)out, (void)num_rows, (void)in_features, (void)out_features, (void)num_threads;
    return -1;
}
#endif
