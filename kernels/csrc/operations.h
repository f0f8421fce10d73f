/* What a step is made of, for those that call it from C: each operation stands in a file of its own. */
#ifndef OCTAVO_OPERATIONS_H
#define OCTAVO_OPERATIONS_H

#include <stdint.h>

typedef struct {
    const void *q, *k_cache, *v_cache;
    void *out;
    const int32_t *query_start, *context_lens, *block_tables;
    const float *sinks, *alibi_slopes; /* [num_heads] or NULL */
    int64_t q_stride_token, q_stride_head, block_table_stride;
    int64_t num_rows, num_tokens, num_heads, num_kv_heads, k_dim, v_dim, block_size, window, num_threads;
    float scale, softcap;
    int32_t q_dtype, cache_dtype;
} attention_args; /* mirrored by _AttentionArgs in paged_attention.py, and compared by a test, as are the others */

/* 0, or -1 when out of memory. */
int octavo_paged_attention(const attention_args *a);

/* 0, or -1 at a slot outside the cache. */
int octavo_write_kv(const void *x, void *cache, const int64_t *slots, int64_t num_tokens, int64_t num_kv_heads,
                    int64_t num_blocks, int64_t block_size, int64_t head_dim, int64_t stride_token, int64_t stride_head,
                    int x_dtype, int cache_dtype);

typedef struct {
    void *q, *k;
    const void *v;
    void *k_cache, *v_cache; /* NULL: nothing is written to a cache */
    const float *cos_sin; /* [max_position, rotary_dim]: cosines, then sines */
    const int64_t *positions, *slots;
    const void *q_weight, *k_weight; /* [head_dim] or NULL */
    int64_t q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head;
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, v_head_dim, rotary_dim, max_position, num_blocks, block_size;
    float eps;
    int32_t dtype, weight_dtype, num_threads, cache_dtype;
} rotary_args; /* mirrored by _RotaryArgs in rotary.py */

/* 0; 1 for a position outside the table, 2 for a slot outside the cache, and then nothing has been written. */
int octavo_rotary(const rotary_args *a);

/* 0, or -1 when out of memory. */
int octavo_rms_norm(const void *x, int64_t x_stride, const void *residual, void *sum, void *out, const void *weight,
                    int64_t num_tokens, int64_t dim, float eps, int dtype, int weight_dtype, int num_threads);

enum { SILU = 0, GELU_TANH = 1 }; /* as in gated_activation.py */

void octavo_gated_activation(const void *gate_up, int64_t stride, void *out, int64_t num_tokens, int64_t dim, int kind,
                             int dtype, int num_threads);

/* 0, or -1 when out of memory. */
int octavo_linear(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features, int64_t out_features,
                  int dtype, int w_dtype, int num_threads);

/* The same, of bfloat16 in whole numbers where that is quicker: see linear_whole.c. */
int octavo_linear_quick(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int dtype, int w_dtype, int num_threads);

/* How many numbers of 16 bits weights take that have been rounded to whole ones; 0 where the CPU or in_features is left to
 * floats. */
int64_t octavo_rounded_size(int64_t in_features, int64_t out_features);

/* `packed`: so many numbers, of which these are the rows from `first` on, a multiple of 16, from bfloat16
 * w [num_rows, in_features]: see linear_whole.c. */
void octavo_round_weights(const void *w, void *packed, int64_t in_features, int64_t out_features, int64_t first,
                          int64_t num_rows, int num_threads);

/* x packed^T of bfloat16: the same bits for any number of rows. 0, or -1 when out of memory. */
int octavo_linear_rounded(const void *x, const void *packed, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int num_threads);

/* The same of `w` as oneDNN packs it, in panels of so many columns: see linear_packed.c. At most 4 rows; x and w are of
 * `dtype`, float32, or bfloat16 with in_features even. 0, or -1 when out of memory. */
int octavo_linear_packed(const void *x, const void *w, void *out, int64_t num_rows, int64_t in_features,
                         int64_t out_features, int64_t panel, int dtype, int num_threads);

struct quantized_weight; /* `weight` of quantized.h */
/* 0, or -1 when out of memory. */
int octavo_linear_quantized(const void *x, int x_dtype, const struct quantized_weight *from, void *out, int64_t num_rows,
                            int num_threads, int may_be_quick);

#endif
