/* RMS norm, rotary embedding and gated activations, each in one pass over a token: their meanings are in rms_norm.py,
 * rotary.py and gated_activation.py. All arithmetic is float32, rounded once when stored; a token's bits depend on that
 * token alone. */
#include <math.h>

#include "kv_quantize.h"
#include "operations.h"
#include "vector.h"

#define MAX_HEAD_DIM 1024 /* as in rotary.py */
#define PARALLEL_ELEMENTS 65536 /* below, waking threads costs more than they save */

/* The dtype as a constant, so that loads and stores do not branch within the loops. */
#define WITH_DTYPE(dtype, call) \
    do { \
        if ((dtype) == F32) { enum { T = F32 }; call; } \
        else if ((dtype) == BF16) { enum { T = BF16 }; call; } \
        else { enum { T = F16 }; call; } \
    } while (0)

INLINE float mean_square(const float *x, int64_t dim) {
    vf acc[4] = {{0}};
    int64_t d = 0;
    for (; d + 4 * VL <= dim; d += 4 * VL)
        UNROLL for (int i = 0; i < 4; i++) {
            vf y = load(x, d + i * VL, F32);
            acc[i] = fma_f(y, y, acc[i]);
        }
    for (; d < dim; d += VL) {
        vf y = load_upto(x, d, dim - d, F32);
        acc[0] = fma_f(y, y, acc[0]);
    }
    return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)dim;
}

INLINE void scale_by(float *x, float factor, const void *weight, int64_t dim, int weight_dtype) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf w;
        WITH_DTYPE(weight_dtype, w = load_upto(weight, d, dim - d, T));
        store_upto(x, d, load_upto(x, d, dim - d, F32) * factor * w, dim - d, F32);
    }
}

INLINE void narrow(void *to, int64_t element, const float *x, int64_t dim, int dtype) {
    for (int64_t d = 0; d < dim; d += VL) store_upto(to, element + d, load_upto(x, d, dim - d, F32), dim - d, dtype);
}

/* buffer: [dim]. The sum with the residual is rounded to dtype before it is normalised, as it is handed on so. */
INLINE void norm_token(const void *x, int64_t x_at, const void *residual, void *sum, int64_t at_, void *out,
                       const void *weight, int64_t dim, float eps, float *buffer, int dtype, int weight_dtype) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf y = load_upto(x, x_at + d, dim - d, dtype);
        if (residual) {
            y += load_upto(residual, at_ + d, dim - d, dtype);
            store_upto(sum, at_ + d, y, dim - d, dtype);
            y = load_upto(sum, at_ + d, dim - d, dtype);
        }
        store_upto(buffer, d, y, dim - d, F32);
    }
    scale_by(buffer, 1.0f / sqrtf(mean_square(buffer, dim) + eps), weight, dim, weight_dtype);
    narrow(out, at_, buffer, dim, dtype);
}

/* residual and sum: both NULL or neither. Returns 0, or -1 when out of memory. */
int octavo_rms_norm(const void *x, int64_t x_stride, const void *residual, void *sum, void *out, const void *weight,
                    int64_t num_tokens, int64_t dim, float eps, int dtype, int weight_dtype, int num_threads) {
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_tokens * dim > PARALLEL_ELEMENTS)
    {
        float *buffer = malloc(dim * sizeof *buffer);
        if (!buffer) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for
        for (int64_t token = 0; token < num_tokens; token++)
            if (buffer)
                WITH_DTYPE(dtype, norm_token(x, token * x_stride, residual, sum, token * dim, out, weight, dim, eps, buffer,
                                             T, weight_dtype));
        free(buffer);
    }
    return failed ? -1 : 0;
}

INLINE void rotate_head(void *x, int64_t element, const void *weight, const float *cos_sin, const rotary_args *a,
                        int dtype) {
    float buffer[MAX_HEAD_DIM + VL];
    widen(buffer, at(x, element, dtype), a->head_dim, dtype);
    if (weight)
        scale_by(buffer, 1.0f / sqrtf(mean_square(buffer, a->head_dim) + a->eps), weight, a->head_dim, a->weight_dtype);
    int64_t half = a->rotary_dim / 2;
    for (int64_t d = 0; d < half; d += VL) {
        int64_t n = half - d;
        vf x1 = load_upto(buffer, d, n, F32), x2 = load_upto(buffer, half + d, n, F32);
        vf c = load_upto(cos_sin, d, n, F32), s = load_upto(cos_sin, half + d, n, F32);
        store_upto(buffer, d, x1 * c - x2 * s, n, F32);
        store_upto(buffer, half + d, x2 * c + x1 * s, n, F32);
    }
    narrow(x, element, buffer, a->head_dim, dtype);
}

static void rotate_token(const rotary_args *a, int64_t token) {
    const float *cos_sin = a->cos_sin + a->positions[token] * a->rotary_dim;
    for (int64_t head = 0; head < a->num_heads; head++) {
        int64_t element = token * a->q_stride_token + head * a->q_stride_head;
        WITH_DTYPE(a->dtype, rotate_head(a->q, element, a->q_weight, cos_sin, a, T));
    }
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        int64_t element = token * a->k_stride_token + head * a->k_stride_head;
        WITH_DTYPE(a->dtype, rotate_head(a->k, element, a->k_weight, cos_sin, a, T));
    }
    if (!a->k_cache || a->slots[token] < 0) return;
    int64_t block = a->slots[token] / a->block_size, offset = a->slots[token] % a->block_size;
    int64_t k_bytes = row_bytes(a->head_dim, a->cache_dtype), v_bytes = row_bytes(a->v_head_dim, a->cache_dtype);
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        int64_t slot = (block * a->num_kv_heads + head) * a->block_size + offset;
        write_row_of((char *)a->k_cache + slot * k_bytes, a->k, token * a->k_stride_token + head * a->k_stride_head,
                     a->head_dim, a->dtype, a->cache_dtype);
        write_row_of((char *)a->v_cache + slot * v_bytes, a->v, token * a->v_stride_token + head * a->v_stride_head,
                     a->v_head_dim, a->dtype, a->cache_dtype);
    }
}

/* Returns 0; 1 for a position outside the table, 2 for a slot outside the cache, and then nothing has been written. */
int octavo_rotary(const rotary_args *a) {
    for (int64_t token = 0; token < a->num_tokens; token++) {
        if (a->positions[token] < 0 || a->positions[token] >= a->max_position) return 1;
        if (a->k_cache && a->slots[token] >= a->num_blocks * a->block_size) return 2;
    }
    int64_t elements = a->num_tokens * (a->num_heads + a->num_kv_heads) * a->head_dim;
#pragma omp parallel for num_threads(a->num_threads) if (a->num_threads > 1 && elements > PARALLEL_ELEMENTS)
    for (int64_t token = 0; token < a->num_tokens; token++) rotate_token(a, token);
    (void)elements;
    return 0;
}

INLINE vf activate(vf x, int kind) {
    if (kind == SILU) return x / (1.0f + exp_f(-x));
    vf inner = 0.7978845608028654f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.0f + tanh_f(inner));
}

INLINE void gate_token(const void *gate_up, int64_t from, void *out, int64_t to, int64_t dim, int kind, int dtype) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf gate = load_upto(gate_up, from + d, dim - d, dtype), up = load_upto(gate_up, from + dim + d, dim - d, dtype);
        store_upto(out, to + d, activate(gate, kind) * up, dim - d, dtype);
    }
}

/* gate_up: [num_tokens, 2 * dim], out: [num_tokens, dim]. */
void octavo_gated_activation(const void *gate_up, int64_t stride, void *out, int64_t num_tokens, int64_t dim, int kind,
                             int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_tokens * dim > PARALLEL_ELEMENTS)
    for (int64_t token = 0; token < num_tokens; token++) {
        if (kind == SILU)
            WITH_DTYPE(dtype, gate_token(gate_up, token * stride, out, token * dim, dim, SILU, T));
        else
            WITH_DTYPE(dtype, gate_token(gate_up, token * stride, out, token * dim, dim, GELU_TANH, T));
    }
}

/* One expert's gate and up of GPT-OSS: see clamped_swiglu.py. A NaN stays one: it compares false. */
INLINE void clamped_swiglu_token(const void *gate_up, int64_t from, void *out, int64_t to, int64_t dim, float alpha,
                                 float limit, int dtype) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf gate = load_upto(gate_up, from + d, dim - d, dtype), up = load_upto(gate_up, from + dim + d, dim - d, dtype);
        for (int i = 0; i < VL; i++) {
            gate[i] = gate[i] > limit ? limit : gate[i];
            up[i] = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        }
        store_upto(out, to + d, (up + 1.0f) * (gate / (1.0f + exp_f(-alpha * gate))), dim - d, dtype);
    }
}

/* gate_up: [num_tokens, 2 * dim], out: [num_tokens, dim]. */
void octavo_clamped_swiglu(const void *gate_up, int64_t stride, void *out, int64_t num_tokens, int64_t dim, float alpha,
                           float limit, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_tokens * dim > PARALLEL_ELEMENTS)
    for (int64_t token = 0; token < num_tokens; token++)
        WITH_DTYPE(dtype, clamped_swiglu_token(gate_up, token * stride, out, token * dim, dim, alpha, limit, T));
}
