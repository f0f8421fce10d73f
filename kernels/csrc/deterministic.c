/* Elementwise functions whose bits depend on a row alone: see linear_deterministic.py. */
#include <math.h>

#include "vector.h"

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
