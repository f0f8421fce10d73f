/* y = x w^T for few rows of bfloat16: see linear_bf16.py. Each output is summed over in_features in VL lanes and then by
 * one tree, whatever the number of rows and of threads. */
#include "vector.h"

#define COLS 8 /* weight rows at a time: as many streams for the hardware's prefetcher */

INLINE void linear_cols(float *out, const float *x, const void *const *w, int64_t num_rows, int64_t dim, int dtype) {
    int64_t r = 0;
    for (; r + 2 <= num_rows; r += 2)
        for (int c = 0; c < COLS; c += 4) dot_block(out + r * COLS + c, COLS, x + r * dim, w + c, dim, 2, 4, dtype);
    if (r < num_rows) dot_block(out + r * COLS, COLS, x + r * dim, w, dim, 1, COLS, dtype);
}

/* x: [num_rows, in_features], w: [out_features, in_features], out: [num_rows, out_features], all bfloat16, contiguous.
 * Returns 0, or -1 when out of memory. */
int octavo_linear_bf16(const uint16_t *x, const uint16_t *w, uint16_t *out, int64_t num_rows, int64_t in_features,
                       int64_t out_features, int num_threads) {
    int64_t dim = round_up(in_features);
    float *wide = aligned_alloc(64, (num_rows * dim * 4 + 63) / 64 * 64);
    if (!wide) return -1;
    for (int64_t r = 0; r < num_rows; r++) widen(wide + r * dim, x + r * in_features, in_features, BF16);
    int failed = 0, widen_w = num_rows > 2 || dim != in_features;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && in_features * out_features > 65536)
    {
        float *weights = aligned_alloc(64, COLS * dim * 4), *sums = aligned_alloc(64, (num_rows * COLS * 4 + 63) / 64 * 64);
        int ok = weights && sums;
        if (!ok) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for
        for (int64_t n = 0; n < (out_features + COLS - 1) / COLS; n++) {
            if (!ok) continue;
            int64_t first = n * COLS, cols = min64(COLS, out_features - first);
            const void *rows[COLS];
            for (int64_t c = 0; c < COLS; c++) {
                rows[c] = w + (first + min64(c, cols - 1)) * in_features;
                if (!widen_w) continue;
                widen(weights + c * dim, rows[c], in_features, BF16);
                rows[c] = weights + c * dim;
            }
            if (widen_w)
                linear_cols(sums, wide, rows, num_rows, dim, F32);
            else
                linear_cols(sums, wide, rows, num_rows, dim, BF16);
            for (int64_t r = 0; r < num_rows; r++) {
                uint16_t narrow[2 * VL];
                for (int c = 0; c < COLS; c += VL) store(narrow, c, load_upto(sums, r * COLS + c, COLS - c, F32), BF16);
                memcpy(out + r * out_features + first, narrow, cols * 2);
            }
        }
        free(weights);
        free(sums);
    }
    free(wide);
    return failed ? -1 : 0;
}
