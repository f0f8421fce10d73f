/* The largest of each row: see `greedy` in sampling.py. */
#include "vector.h"

#define CHUNK 1024 /* numbers among which the largest is looked for once more, to find where it stands */

/* Index of the first of the row's largest numbers, or -1 where the largest is not finite or there is a NaN. */
static int64_t first_largest(const float *x, int64_t size) {
    float largest = -__builtin_inff();
    int64_t at = -1;
    vi nan = {0};
    for (int64_t start = 0; start < size; start += CHUNK) {
        int64_t end = min64(start + CHUNK, size), i = start;
        vf most[4];
        UNROLL for (int j = 0; j < 4; j++) most[j] = splat(-__builtin_inff());
        for (; i + 4 * VL <= end; i += 4 * VL)
            UNROLL for (int j = 0; j < 4; j++) {
                vf y = load(x, i + j * VL, F32);
                nan |= y != y;
                most[j] = max_f(y, most[j]);
            }
        float chunk = max_lanes(max_f(max_f(most[0], most[1]), max_f(most[2], most[3])));
        for (; i < end; i++) {
            if (x[i] != x[i]) return -1;
            chunk = x[i] > chunk ? x[i] : chunk;
        }
        if (chunk > largest) { /* an equal one comes later */
            largest = chunk;
            at = start;
        }
    }
    for (int i = 0; i < VL; i++)
        if (nan[i]) return -1;
    if (at < 0 || largest == __builtin_inff()) return -1;
    while (x[at] != largest) at++;
    return at;
}

/* logits: [num_rows, vocab_size], `stride` numbers from one row to the next. */
void octavo_greedy(const float *logits, int64_t stride, int64_t num_rows, int64_t vocab_size, int64_t *token_ids,
                   int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_rows > 1 && num_rows * vocab_size > 262144)
    for (int64_t row = 0; row < num_rows; row++) token_ids[row] = first_largest(logits + row * stride, vocab_size);
}
