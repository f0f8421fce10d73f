/* All layers of a decoder behind each other: see decoder_stack.py. Every operation is the one that Python calls, on the
 * same numbers in the same order, so that the bits are the same; what is saved is the way from one to the next, which is
 * some 20 us each, during which threads go to sleep and have to be woken. */
#include "operations.h"
#include "vector.h"

/* Kinds of weights, beside the dtypes; as in decoder_stack.py. Packed ones have the columns of a panel added to it. */
enum { QUANTIZED = 16, PACKED = 32, ROUNDED = 128 };

#define MAX_PARTS 3

typedef struct {
    const void *weights[MAX_PARTS]; /* [out_features, in_features] as its kind says, or a description */
    const void *bias; /* of all parts together, or NULL */
    int64_t out_features[MAX_PARTS];
    int64_t in_features, num_parts;
    int32_t kinds[MAX_PARTS], unused;
} product;

typedef struct {
    product qkv, o, gate_up, down;
    const void *before_attention, *after_attention, *before_mlp, *after_mlp; /* norms; the second and last may be NULL */
    const void *q_norm, *k_norm; /* [head_dim] or NULL */
    const float *cos_sin, *sinks; /* [max_position, head_dim] or NULL: nothing turns; [num_heads] or NULL */
    void *k_cache, *v_cache;
    int64_t num_heads, num_kv_heads, head_dim, rotary_dim, max_position, window;
    float eps, qk_eps, scale, softcap;
    int32_t norm_dtype, qk_norm_dtype, activation, unused;
} layer; /* mirrored by _Layer in decoder_stack.py */

typedef struct {
    const layer *layers;
    void *x; /* [num_tokens, hidden_size], changed in place */
    const int64_t *positions, *slots;
    const int32_t *query_start, *context_lens, *block_tables;
    int64_t num_layers, num_tokens, hidden_size, num_rows, block_table_stride, block_size, num_blocks;
    int32_t dtype, cache_dtype, num_threads, may_be_quick;
} step; /* mirrored by _Step in decoder_stack.py */

typedef struct {
    char *hidden, *qkv, *attended, *gate_up, *inner, *part;
} buffers;

enum { OUT_OF_MEMORY = 1, POSITION_OUTSIDE = 2, SLOT_OUTSIDE = 3 }; /* as in decoder_stack.py */
#define TRY(call) \
    do { \
        int status = (call); \
        if (status) return status; \
    } while (0)
#define TRY_MEMORY(call) \
    do { \
        if (call) return OUT_OF_MEMORY; \
    } while (0)

static int64_t width_of(const product *p) {
    int64_t width = 0;
    for (int64_t i = 0; i < p->num_parts; i++) width += p->out_features[i];
    return width;
}

/* to[row, ...] += from[row * step, ...] */
INLINE void add_rows(void *to, const void *from, int64_t num_rows, int64_t stride, int64_t dim, int dtype) {
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t d = 0; d < dim; d += VL)
            store_upto(to, row * dim + d,
                       load_upto(to, row * dim + d, dim - d, dtype) + load_upto(from, row * stride + d, dim - d, dtype),
                       dim - d, dtype);
}

static void add(void *to, const void *from, int64_t num_rows, int64_t stride, int64_t dim, int dtype) {
    if (dtype == F32) add_rows(to, from, num_rows, stride, dim, F32);
    if (dtype == BF16) add_rows(to, from, num_rows, stride, dim, BF16);
    if (dtype == F16) add_rows(to, from, num_rows, stride, dim, F16);
}

/* out[num_tokens, width] = x w^T + bias. `part` holds what one part of several gives, for which rows are not adjacent. */
static int multiply(const product *p, const step *s, const void *x, char *out, char *part) {
    int64_t size = size_of(s->dtype), width = width_of(p), from = 0;
    for (int64_t i = 0; i < p->num_parts; i++) {
        int64_t columns = p->out_features[i];
        int is_whole = p->num_parts == 1 || s->num_tokens == 1;
        char *to = is_whole ? out + from * size : part;
        if (p->kinds[i] == QUANTIZED)
            TRY_MEMORY(octavo_linear_quantized(x, s->dtype, p->weights[i], to, s->num_tokens, s->num_threads,
                                               s->may_be_quick));
        else if (p->kinds[i] == ROUNDED)
            TRY_MEMORY(octavo_linear_rounded(x, p->weights[i], to, s->num_tokens, p->in_features, columns,
                                             s->num_threads));
        else if (p->kinds[i] > PACKED)
            TRY_MEMORY(octavo_linear_packed(x, p->weights[i], to, s->num_tokens, p->in_features, columns,
                                            p->kinds[i] - PACKED, s->dtype, s->num_threads));
        else
            TRY_MEMORY((s->may_be_quick ? octavo_linear_quick : octavo_linear)(
                x, p->weights[i], to, s->num_tokens, p->in_features, columns, s->dtype, p->kinds[i], s->num_threads));
        for (int64_t row = 0; row < s->num_tokens && !is_whole; row++)
            memcpy(out + (row * width + from) * size, part + row * columns * size, columns * size);
        from += columns;
    }
    if (p->bias) add(out, p->bias, s->num_tokens, 0, width, s->dtype);
    return 0;
}

/* out = norm of x, or of x and what it adds to the residual stream. */
static int norm(const layer *l, const step *s, const void *x, void *residual, void *out, const void *weight) {
    TRY_MEMORY(octavo_rms_norm(x, s->hidden_size, residual, residual, out, weight, s->num_tokens, s->hidden_size, l->eps,
                               s->dtype, l->norm_dtype, s->num_threads));
    return 0;
}

/* Turn queries and keys where they turn, and write keys and values to the cache. */
static int rotate_and_write(const layer *l, const step *s, char *q, char *k, char *v, int64_t stride) {
    if (l->cos_sin) {
        rotary_args a = {q, k, v, l->k_cache, l->v_cache, l->cos_sin, s->positions, s->slots, l->q_norm, l->k_norm,
                         stride, l->head_dim, stride, l->head_dim, stride, l->head_dim, s->num_tokens, l->num_heads,
                         l->num_kv_heads, l->head_dim, l->head_dim, l->rotary_dim, l->max_position, s->num_blocks,
                         s->block_size, l->qk_eps, s->dtype, l->qk_norm_dtype, s->num_threads, s->cache_dtype};
        int status = octavo_rotary(&a);
        return status == 1 ? POSITION_OUTSIDE : status == 2 ? SLOT_OUTSIDE : 0;
    }
    char *of[] = {k, v};
    void *caches[] = {l->k_cache, l->v_cache};
    for (int i = 0; i < 2; i++)
        if (octavo_write_kv(of[i], caches[i], s->slots, s->num_tokens, l->num_kv_heads, s->num_blocks, s->block_size,
                            l->head_dim, stride, l->head_dim, s->dtype, s->cache_dtype))
            return SLOT_OUTSIDE;
    return 0;
}

/* b->hidden: in, normalised; out, what attention says. */
static int attend(const layer *l, const step *s, const buffers *b) {
    int64_t size = size_of(s->dtype), stride = width_of(&l->qkv);
    char *q = b->qkv, *k = q + l->num_heads * l->head_dim * size, *v = k + l->num_kv_heads * l->head_dim * size;
    TRY(multiply(&l->qkv, s, b->hidden, b->qkv, b->part));
    TRY(rotate_and_write(l, s, q, k, v, stride));
    attention_args a = {q, l->k_cache, l->v_cache, b->attended, s->query_start, s->context_lens, s->block_tables, l->sinks,
                        NULL, stride, l->head_dim, s->block_table_stride, s->num_rows, s->num_tokens, l->num_heads,
                        l->num_kv_heads, l->head_dim, l->head_dim, s->block_size, l->window, s->num_threads, l->scale,
                        l->softcap, s->dtype, s->cache_dtype};
    TRY_MEMORY(octavo_paged_attention(&a));
    TRY(multiply(&l->o, s, b->attended, b->hidden, b->part));
    return l->after_attention ? norm(l, s, b->hidden, NULL, b->hidden, l->after_attention) : 0;
}

/* b->hidden: in, normalised; out, what the gated MLP says. */
static int feed_forward(const layer *l, const step *s, const buffers *b) {
    int64_t inner = width_of(&l->gate_up) / 2;
    TRY(multiply(&l->gate_up, s, b->hidden, b->gate_up, b->part));
    octavo_gated_activation(b->gate_up, 2 * inner, b->inner, s->num_tokens, inner, l->activation, s->dtype, s->num_threads);
    TRY(multiply(&l->down, s, b->inner, b->hidden, b->part));
    return l->after_mlp ? norm(l, s, b->hidden, NULL, b->hidden, l->after_mlp) : 0;
}

static int run_layers(const step *s, const buffers *b) {
    for (int64_t i = 0; i < s->num_layers; i++) {
        const layer *l = s->layers + i;
        if (i == 0)
            TRY(norm(l, s, s->x, NULL, b->hidden, l->before_attention));
        else
            TRY(norm(l, s, b->hidden, s->x, b->hidden, l->before_attention));
        TRY(attend(l, s, b));
        TRY(norm(l, s, b->hidden, s->x, b->hidden, l->before_mlp));
        TRY(feed_forward(l, s, b));
    }
    add(s->x, b->hidden, s->num_tokens, s->hidden_size, s->hidden_size, s->dtype);
    return 0;
}

/* Returns 0, or one of the numbers above; then x means nothing. */
int octavo_decoder_stack(const step *s) {
    if (s->num_layers == 0 || s->num_tokens == 0) return 0;
    int64_t widths[6] = {s->hidden_size};
    for (int64_t i = 0; i < s->num_layers; i++) {
        const layer *l = s->layers + i;
        const product *products[] = {&l->qkv, &l->o, &l->gate_up, &l->down};
        int64_t gate_up = width_of(&l->gate_up);
        widths[1] = max64(widths[1], width_of(&l->qkv));
        widths[2] = max64(widths[2], l->num_heads * l->head_dim);
        widths[3] = max64(widths[3], gate_up);
        widths[4] = max64(widths[4], gate_up / 2);
        for (int j = 0; j < 4; j++)
            for (int64_t k = 0; k < products[j]->num_parts && products[j]->num_parts > 1; k++)
                widths[5] = max64(widths[5], products[j]->out_features[k]);
    }
    int64_t offsets[6], total = 0;
    for (int i = 0; i < 6; i++) {
        offsets[i] = total;
        total += (s->num_tokens * widths[i] * size_of(s->dtype) + 63) / 64 * 64;
    }
    char *memory = aligned_alloc(64, total);
    if (!memory) return OUT_OF_MEMORY;
    buffers b = {memory + offsets[0], memory + offsets[1], memory + offsets[2],
                 memory + offsets[3], memory + offsets[4], memory + offsets[5]};
    int status = run_layers(s, &b);
    free(memory);
    return status;
}
