/* Paged attention and the write of new keys and values: see paged_attention.py for what they mean.
 *
 * A task is one KV head of one tile of a row's queries: its whole group of query heads reads K and V once. Keys come in
 * tiles of KEYS counted from position 0, whatever the block size. For few rows, as in decoding, they are multiplied
 * where they lie. For many a tile of them is laid out in float32, in the L2 cache with the queries and the output so
 * far, and multiplied by BATCH rows at once, whose sums fill the registers. Either way each sum is made in the order
 *   logit:  over head_dim, VL lanes, then a fixed tree;  weights: lane by lane over tiles;  output: key after key.
 * So the bits of a query's output depend on its own query, keys and values, not on the batch, the block size, the block
 * table, the chunk it was computed in, or the number of threads: a key that is masked adds an exact zero.
 *
 * Of a quantised cache the codes are multiplied as they are; a key's scale goes into its logits, a value's into its
 * weights. So reading it costs a conversion, and less memory traffic.
 */
#include <math.h>

#include "kv_quantize.h"
#include "operations.h"
#include "vector.h"

#define KEYS 64 /* keys in a tile: a multiple of VL and 8 */
#define MAX_ROWS 192 /* (query, head) pairs that a tile aims at, so that keys are laid out for many ... */
#define MAX_NUMBERS (192 * 256) /* ... but no more of their queries' and outputs' numbers than stay in the L2 cache */
#define SMALL_ROWS 24 /* what it may be cut down to, lest there are too few tiles for all threads */
#define TASKS_OF_THREAD 4 /* enough for each thread to find more when another is held up */
#define MANY_ROWS 12 /* as many pay for keys and values to be laid out */
#define BATCH 6 /* of those rows are multiplied at once: by two keys, or two vectors of a value, which is 12 sums */
#define PANEL (2 * VL) /* numbers of a value that lie together where it is laid out */

INLINE int64_t round_up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

typedef struct {
    float *q; /* [rows, k_dim rounded up]; many rows: [rows / BATCH, k_dim / VL, BATCH, VL] */
    float *acc; /* [rows, v_dim rounded up]; many rows: [v_dim / PANEL, rows, PANEL] */
    float *logits; /* [rows, KEYS] */
    float *sums; /* [rows, VL], the lanes of the denominator */
    float *maxima, *rescale; /* [rows] */
    int32_t *seen; /* [rows / BATCH], many rows: how many keys of the tile a batch looks at */
    float *k, *v; /* [KEYS, dim rounded up], where they are widened; many rows: v is [v_dim / PANEL, KEYS, PANEL] */
    void *memory;
} scratch;

static int scratch_init(scratch *s, int64_t rows, int64_t k_dim, int64_t v_dim) {
    int64_t sizes[] = {rows * k_dim, rows * v_dim, rows * KEYS, rows * VL, rows, rows, KEYS * k_dim, KEYS * v_dim};
    int64_t total = rows; /* seen */
    for (int i = 0; i < 8; i++) total += (sizes[i] + 15) / 16 * 16;
    s->memory = malloc(total * 4 + 64);
    if (!s->memory) return -1;
    float *next = (float *)(((uintptr_t)s->memory + 63) / 64 * 64);
    float **fields[] = {&s->q, &s->acc, &s->logits, &s->sums, &s->maxima, &s->rescale, &s->k, &s->v};
    for (int i = 0; i < 8; i++) {
        *fields[i] = next;
        next += (sizes[i] + 15) / 16 * 16;
    }
    s->seen = (int32_t *)next;
    return 0;
}

/* logits[row, key] for all rows and the first num_keys (rounded up to 8) of a tile. */
INLINE void dot_tile_of(float *logits, const float *q, const void *const *keys, int64_t num_keys, int64_t dim, int64_t rows,
                     int dtype) {
    if (rows == 1) {
        for (int64_t j = 0; j < num_keys; j += 8) dot_block(logits + j, KEYS, q, keys + j, dim, 1, 8, dtype);
        return;
    }
    for (int64_t j = 0; j < num_keys; j += 4) {
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) dot_block(logits + r * KEYS + j, KEYS, q + r * dim, keys + j, dim, 2, 4, dtype);
    }
    if (rows % 2)
        for (int64_t j = 0; j < num_keys; j += 8)
            dot_block(logits + (rows - 1) * KEYS + j, KEYS, q + (rows - 1) * dim, keys + j, dim, 1, 8, dtype);
}

/* acc[row, d...] = acc * rescale[row] + sum over keys of weights[row, key] * values[key][d...]. */
INLINE void weigh_block(float *acc, const float *weights, const float *rescale, const void *const *values,
                        int64_t num_keys, int64_t dim, int64_t d, int rows, int cols, int dtype) {
    vf a[8];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < cols; c++) a[r * cols + c] = load(acc, r * dim + d + c * VL, F32) * rescale[r];
    for (int64_t j = 0; j < num_keys; j++) {
        vf value[8];
        UNROLL for (int c = 0; c < cols; c++) {
            value[c] = load(values[j], d + c * VL, dtype);
            KEEP(value[c]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vf weight = splat(weights[r * KEYS + j]);
            UNROLL for (int c = 0; c < cols; c++) a[r * cols + c] = fma_f(weight, value[c], a[r * cols + c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < cols; c++) store(acc, r * dim + d + c * VL, a[r * cols + c], F32);
}

INLINE void weigh_rows(float *acc, const float *weights, const float *rescale, const void *const *values,
                       int64_t num_keys, int64_t dim, int64_t d, int64_t num_rows, int cols, int dtype) {
    int64_t r = 0;
#define WEIGH(n) weigh_block(acc + r * dim, weights + r * KEYS, rescale + r, values, num_keys, dim, d, n, cols, dtype)
    if (cols <= 2)
        for (; r + 4 <= num_rows; r += 4) WEIGH(4);
    if (cols <= 4)
        for (; r + 2 <= num_rows; r += 2) WEIGH(2);
    for (; r < num_rows; r++) WEIGH(1);
#undef WEIGH
}

INLINE void weigh_tile_of(float *acc, const float *weights, const float *rescale, const void *const *values,
                       int64_t num_keys, int64_t dim, int64_t rows, int dtype) {
    int64_t d = 0;
#define STRIPE(n) \
    for (; d + n * VL <= dim; d += n * VL) \
        weigh_rows(acc, weights, rescale, values, num_keys, dim, d, rows, n, dtype)
    if (rows == 1) STRIPE(8);
    if (rows <= 3) STRIPE(4);
    STRIPE(2);
    STRIPE(1);
#undef STRIPE
}

/* logits[row, key] of BATCH rows for the first num_keys (rounded up to 4) of a tile, with the sums of dot_block.
 * q: [dim / VL, BATCH, VL], k: [KEYS, dim]. */
static void dot_batch(float *logits, const float *q, const float *k, int64_t num_keys, int64_t dim) {
    for (int64_t j = 0; j < num_keys; j += 4) {
        vf sums[BATCH][4];
        UNROLL for (int pair = 0; pair < 4; pair += 2) {
            vf acc[2 * BATCH] = {{0}};
            const float *qi = q, *ki = k + (j + pair) * dim, *end = ki + dim;
            for (; ki < end; ki += VL, qi += BATCH * VL) {
                vf k0 = load(ki, 0, F32), k1 = load(ki, dim, F32);
                KEEP(k0);
                KEEP(k1);
                UNROLL for (int r = 0; r < BATCH; r++) {
                    vf x = load(qi, r * VL, F32);
                    KEEP(x);
                    ADD_PRODUCT(acc[2 * r], x, k0);
                    ADD_PRODUCT(acc[2 * r + 1], x, k1);
                }
            }
            UNROLL for (int r = 0; r < BATCH; r++) {
                sums[r][pair] = acc[2 * r];
                sums[r][pair + 1] = acc[2 * r + 1];
            }
        }
        UNROLL for (int r = 0; r < BATCH; r++) *(v4_mem *)(logits + r * KEYS + j) = sum_four(sums[r]);
    }
}

/* acc, values: one panel, [BATCH, PANEL] and [num_keys, PANEL], of what weigh_block adds in the same order. */
static void weigh_batch(float *acc, const float *weights, const float *rescale, const float *values,
                        int64_t num_keys) {
    vf a[2 * BATCH];
    UNROLL for (int i = 0; i < 2 * BATCH; i++) a[i] = load(acc, i * VL, F32) * rescale[i / 2];
    const float *end = weights + num_keys;
    for (; weights < end; weights++, values += PANEL) {
        vf v0 = load(values, 0, F32), v1 = load(values, VL, F32);
        KEEP(v0);
        KEEP(v1);
        UNROLL for (int r = 0; r < BATCH; r++) {
            vf weight = splat(weights[r * KEYS]);
            KEEP(weight);
            ADD_PRODUCT(a[2 * r], weight, v0);
            ADD_PRODUCT(a[2 * r + 1], weight, v1);
        }
    }
    UNROLL for (int i = 0; i < 2 * BATCH; i++) store(acc, i * VL, a[i], F32);
}

/* One instance of the two loops for each dtype of the cache, so that they do not branch within. */
#define TILES(name, T) \
    static void dot_##name(float *logits, const float *q, const void *const *keys, int64_t num_keys, int64_t dim, \
                           int64_t rows) { \
        dot_tile_of(logits, q, keys, num_keys, dim, rows, T); \
    } \
    static void weigh_##name(float *acc, const float *weights, const float *rescale, const void *const *values, \
                             int64_t num_keys, int64_t dim, int64_t rows) { \
        weigh_tile_of(acc, weights, rescale, values, num_keys, dim, rows, T); \
    }
TILES(f32, F32)
TILES(bf16, BF16)
TILES(f16, F16)
TILES(int8, INT8)
TILES(fp8, FP8)
#undef TILES

static void (*const dot_tile[])(float *, const float *, const void *const *, int64_t, int64_t,
                                int64_t) = {dot_f32, dot_bf16, dot_f16, dot_int8, dot_fp8};
static void (*const weigh_tile[])(float *, const float *, const float *, const void *const *, int64_t, int64_t,
                                  int64_t) = {weigh_f32, weigh_bf16, weigh_f16, weigh_int8, weigh_fp8};

/* Rows of a tile's keys to [num_keys, dim], filled up with zeros. */
INLINE void widen_rows(float *to, const void *const *rows, int64_t num_keys, int64_t dim, int dtype) {
    for (int64_t j = 0; j < num_keys; j++) widen(to + j * round_up(dim), rows[j], dim, dtype);
}

/* Values to [dim / PANEL, KEYS, PANEL], filled up with zeros: the panels that weigh_batch reads. */
INLINE void panel_rows(float *to, const void *const *rows, int64_t num_keys, int64_t dim, int dtype) {
    for (int64_t j = 0; j < num_keys; j++)
        for (int64_t d = 0; d < dim; d += PANEL)
            for (int64_t i = 0; i < PANEL; i += VL) {
                int64_t rest = dim - d - i;
                vf x = rest >= VL ? load(rows[j], d + i, dtype) : load_some(rows[j], d + i, max64(rest, 0), dtype);
                store(to, d * KEYS + j * PANEL + i, x, F32);
            }
}

#define LAYOUTS(name, T) \
    static void widen_##name(float *to, const void *const *rows, int64_t num_keys, int64_t dim) { \
        widen_rows(to, rows, num_keys, dim, T); \
    } \
    static void panel_##name(float *to, const void *const *rows, int64_t num_keys, int64_t dim) { \
        panel_rows(to, rows, num_keys, dim, T); \
    }
LAYOUTS(f32, F32)
LAYOUTS(bf16, BF16)
LAYOUTS(f16, F16)
LAYOUTS(int8, INT8)
LAYOUTS(fp8, FP8)
#undef LAYOUTS

typedef void layout(float *, const void *const *, int64_t, int64_t);
static layout *const widen_tile[] = {widen_f32, widen_bf16, widen_f16, widen_int8, widen_fp8};
static layout *const panel_tile[] = {panel_f32, panel_bf16, panel_f16, panel_int8, panel_fp8};

/* Turns a row's logits into weights relative to the maximum so far, and says how to rescale what came before.
 * k_scales, v_scales: [KEYS], what each logit and each weight is multiplied by; NULL for none.
 * first, last: the keys that the query sees, relative to the tile: small, thus exact in float32.
 * simple: no softcap or slopes; all_visible: no key is hidden. */
INLINE void softmax_of(const attention_args *a, float *logits, float *maximum, float *rescale, float *sums,
                       int64_t num_vectors, int64_t first, int64_t last, float slope, const float *k_scales,
                       const float *v_scales, int simple, int all_visible) {
    vf lane, top = splat(-INFINITY);
    UNROLL for (int i = 0; i < VL; i++) lane[i] = (float)i;
    float first_f = (float)max64(first, 0), last_f = (float)min64(last, KEYS), scale = a->scale;
    for (int64_t i = 0; i < num_vectors; i++) {
        vf x = load(logits, i * VL, F32) * scale, key = lane + (float)(i * VL);
        if (k_scales) x = x * load(k_scales, i * VL, F32);
        if (!simple) {
            if (a->softcap > 0) x = tanh_f(x / a->softcap) * a->softcap;
            if (a->alibi_slopes) x = x + slope * (key - (float)last);
        }
        if (!all_visible) x = select_f((key <= last_f) & (key >= first_f), x, splat(-INFINITY));
        store(logits, i * VL, x, F32);
        top = max_f(x, top); /* a NaN logit is passed over here and shows in the weights */
    }
    float before = *maximum, now = max_lanes(top);
    now = now > before ? now : before;
    float reference = now == -INFINITY ? 0.0f : now; /* nothing visible yet: all weights 0, not NaN */
    vf sum = {0};
    for (int64_t i = 0; i < num_vectors; i++) {
        vf weight = exp_f(load(logits, i * VL, F32) - reference);
        sum += weight;
        if (v_scales) weight = weight * load(v_scales, i * VL, F32);
        store(logits, i * VL, weight, F32);
    }
    vf factor = exp_f(splat(before - reference));
    store(sums, 0, load(sums, 0, F32) * factor + sum, F32);
    *maximum = now;
    *rescale = factor[0];
}

static void softmax_tile(const attention_args *a, float *logits, float *maximum, float *rescale, float *sums,
                         int64_t first_key, int64_t num_vectors, int64_t position, float slope, const float *k_scales,
                         const float *v_scales) {
    int64_t last = position - first_key;
    int64_t first = a->window > 0 ? last - a->window + 1 : 0;
    int simple = !(a->softcap > 0) && !a->alibi_slopes;
    int all_visible = last >= num_vectors * VL - 1 && first <= 0;
#define SOFTMAX(n, simple, all_visible) \
    softmax_of(a, logits, maximum, rescale, sums, n, first, last, slope, k_scales, v_scales, simple, all_visible)
    if (simple && all_visible && num_vectors == KEYS / VL)
        SOFTMAX(KEYS / VL, 1, 1);
    else if (simple)
        SOFTMAX(num_vectors, 1, 0);
    else
        SOFTMAX(num_vectors, 0, all_visible);
#undef SOFTMAX
}

/* A tile's queries to s->q, in float32, and the state before its first key. */
static void start_rows(const attention_args *a, scratch *s, int64_t token, int64_t kv_head, int64_t rows,
                       int64_t all_rows, int many) {
    int64_t group = a->num_heads / a->num_kv_heads, k_pad = round_up(a->k_dim);
    memset(s->sums, 0, rows * VL * 4);
    if (all_rows > rows) { /* these fill the last batch, and what comes of them is not read */
        memset(s->q + (all_rows - BATCH) * k_pad, 0, BATCH * k_pad * 4);
        memset(s->rescale + rows, 0, (all_rows - rows) * 4);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t head = kv_head * group + r % group;
        int64_t from = (token + r / group) * a->q_stride_token + head * a->q_stride_head;
        float *q = many ? s->k : s->q + r * k_pad;
        if (a->q_dtype == F32) widen(q, at(a->q, from, F32), a->k_dim, F32);
        if (a->q_dtype == BF16) widen(q, at(a->q, from, BF16), a->k_dim, BF16);
        if (a->q_dtype == F16) widen(q, at(a->q, from, F16), a->k_dim, F16);
        if (many) {
            float *to = s->q + r / BATCH * BATCH * k_pad + r % BATCH * VL;
            for (int64_t d = 0; d < k_pad; d += VL) store(to, d * BATCH, load(q, d, F32), F32);
        }
        s->maxima[r] = a->sinks ? a->sinks[head] : -INFINITY;
        if (a->sinks) s->sums[r * VL] = 1.0f;
    }
}

/* How many of the keys from first_key on, KEYS at most, the queries at positions first to last look at: up to the last
 * one's own. None where all are hidden from each query: what those add is zero, exactly. */
INLINE int64_t keys_seen(const attention_args *a, int64_t first, int64_t last, int64_t first_key) {
    if (a->window > 0 && first - a->window + 1 >= first_key + KEYS) return 0;
    return max64(0, min64(KEYS, last + 1 - first_key));
}

static void attend(const attention_args *a, scratch *s, int64_t row, int64_t kv_head, int64_t first_query,
                   int64_t num_queries) {
    int dtype = a->cache_dtype;
    int64_t group = a->num_heads / a->num_kv_heads, rows = num_queries * group;
    int many = rows >= MANY_ROWS;
    int64_t batch = many ? BATCH : rows, all_rows = round_up_to(rows, batch);
    int64_t k_pad = round_up(a->k_dim), v_pad = round_up_to(a->v_dim, many ? PANEL : VL);
    int64_t token = a->query_start[row] + first_query;
    int64_t num_new = a->query_start[row + 1] - a->query_start[row];
    int64_t position = a->context_lens[row] - num_new + first_query; /* of the tile's first query */
    const int32_t *blocks = a->block_tables + row * a->block_table_stride;
    int quantized = is_quantized(dtype);
    int64_t k_bytes = row_bytes(a->k_dim, dtype), k_head = a->block_size * k_bytes, k_block = a->num_kv_heads * k_head;
    int64_t v_bytes = row_bytes(a->v_dim, dtype), v_head = a->block_size * v_bytes, v_block = a->num_kv_heads * v_head;
    float code_unit = dtype == FP8 ? 256.0f : 1.0f; /* what a code is loaded as is so much too small */
    float k_scales[KEYS], v_scales[KEYS];
    /* Widening pays for itself once a key is used by several rows; a ragged head_dim needs its padding. */
    int widen_k = many || (dtype != F32 && rows >= 4) || a->k_dim != k_pad;
    int widen_v = !many && ((dtype != F32 && rows >= 4) || a->v_dim != v_pad);

    start_rows(a, s, token, kv_head, rows, all_rows, many);
    memset(s->acc, 0, all_rows * v_pad * 4);
    int64_t last_position = position + num_queries - 1;
    int64_t begin = a->window > 0 ? max64(0, position - a->window + 1) / KEYS * KEYS : 0;
    for (int64_t first_key = begin; first_key <= last_position; first_key += KEYS) {
        int64_t num_keys = min64(KEYS, last_position + 1 - first_key);
        const void *keys[KEYS], *values[KEYS];
        for (int64_t j = 0; j < num_keys;) {
            int64_t key = first_key + j, block = blocks[key / a->block_size], offset = key % a->block_size;
            int64_t run = min64(a->block_size - offset, num_keys - j);
            const char *k = (const char *)a->k_cache + block * k_block + kv_head * k_head + offset * k_bytes;
            const char *v = (const char *)a->v_cache + block * v_block + kv_head * v_head + offset * v_bytes;
            for (int64_t i = 0; i < run; i++, j++) {
                keys[j] = k + i * k_bytes;
                values[j] = v + i * v_bytes;
                if (many) continue; /* they would leave the L1 cache before they are read */
                for (int64_t byte = 0; byte < v_bytes; byte += 64) __builtin_prefetch(v + i * v_bytes + byte);
            }
        }
        for (int64_t j = num_keys; j < KEYS; j++) keys[j] = keys[0]; /* masked, but read */
        if (quantized)
            for (int64_t j = 0; j < KEYS; j++) {
                float scales[2] = {0}; /* of a masked key: its weight is zero, and so must be what that is multiplied by */
                if (j < num_keys) {
                    memcpy(scales, (const char *)keys[j] + a->k_dim, sizeof *scales);
                    memcpy(scales + 1, (const char *)values[j] + a->v_dim, sizeof *scales);
                }
                k_scales[j] = scales[0] * code_unit;
                v_scales[j] = scales[1] * code_unit;
            }
        if (widen_k) {
            widen_tile[dtype](s->k, keys, round_up(num_keys), a->k_dim);
            for (int64_t j = 0; j < KEYS; j++) keys[j] = s->k + (j < num_keys ? j : 0) * k_pad;
        }
        for (int64_t first = 0; first < rows; first += batch) {
            int64_t end = min64(first + batch, rows), seen = num_keys;
            if (many) seen = keys_seen(a, position + first / group, position + (end - 1) / group, first_key);
            int64_t num_vectors = (seen + VL - 1) / VL;
            if (many)
                dot_batch(s->logits + first * KEYS, s->q + first * k_pad, s->k, num_vectors * VL, k_pad);
            else
                dot_tile[widen_k ? F32 : dtype](s->logits, s->q, keys, num_vectors * VL, k_pad, rows);
            if (many) s->seen[first / BATCH] = (int32_t)seen;
        }
        for (int64_t first = 0; first < rows; first += batch) {
            int64_t end = min64(first + batch, rows), seen = many ? s->seen[first / BATCH] : num_keys;
            for (int64_t r = first; r < end && seen; r++) {
                float slope = a->alibi_slopes ? a->alibi_slopes[kv_head * group + r % group] : 0.0f;
                softmax_tile(a, s->logits + r * KEYS, s->maxima + r, s->rescale + r, s->sums + r * VL, first_key,
                             (seen + VL - 1) / VL, position + r / group, slope, quantized ? k_scales : NULL,
                             quantized ? v_scales : NULL);
            }
        }
        if (many) {
            panel_tile[dtype](s->v, values, num_keys, a->v_dim);
            for (int64_t d = 0; d < v_pad; d += PANEL)
                for (int64_t first = 0; first < rows; first += BATCH)
                    if (s->seen[first / BATCH])
                        weigh_batch(s->acc + d * all_rows + first * PANEL, s->logits + first * KEYS,
                                    s->rescale + first, s->v + d * KEYS, s->seen[first / BATCH]);
            continue;
        }
        if (widen_v) {
            widen_tile[dtype](s->v, values, num_keys, a->v_dim);
            for (int64_t j = 0; j < num_keys; j++) values[j] = s->v + j * v_pad;
        }
        weigh_tile[widen_v ? F32 : dtype](s->acc, s->logits, s->rescale, values, num_keys, v_pad, rows);
    }

    for (int64_t r = 0; r < rows; r++) {
        int64_t head = kv_head * group + r % group;
        int64_t to = ((token + r / group) * a->num_heads + head) * a->v_dim;
        float sum = sum_lanes(load(s->sums, r * VL, F32));
        if (sum == 0) sum = 1; /* of a row without keys, which is padding: zeros */
        for (int64_t d = 0; d < a->v_dim; d += VL) {
            int64_t from = many ? d / PANEL * PANEL * all_rows + r * PANEL + d % PANEL : r * v_pad + d;
            vf x = load(s->acc, from, F32) / sum;
            if (a->q_dtype == F32) store_upto(a->out, to + d, x, a->v_dim - d, F32);
            if (a->q_dtype == BF16) store_upto(a->out, to + d, x, a->v_dim - d, BF16);
            if (a->q_dtype == F16) store_upto(a->out, to + d, x, a->v_dim - d, F16);
        }
    }
}

INLINE int64_t num_tiles_of(const attention_args *a, int64_t queries) {
    int64_t num_tiles = 0;
    for (int64_t row = 0; row < a->num_rows; row++)
        num_tiles += (a->query_start[row + 1] - a->query_start[row] + queries - 1) / queries;
    return num_tiles;
}

/* Queries of a tile, `most` at most: as many as leave some tiles for each thread, and make whole batches of rows. */
static int64_t queries_of_tile(const attention_args *a, int64_t most) {
    int64_t group = a->num_heads / a->num_kv_heads, rows = min64(MAX_ROWS, MAX_NUMBERS / (a->k_dim + a->v_dim));
    if (most * group <= SMALL_ROWS) return max64(1, most);
    while (rows > SMALL_ROWS &&
           num_tiles_of(a, max64(1, rows / group)) * a->num_kv_heads < TASKS_OF_THREAD * a->num_threads)
        rows /= 2;
    int64_t queries = max64(1, rows / group);
    if (queries >= BATCH) queries -= queries % BATCH;
    return max64(1, min64(queries, most));
}

/* Returns 0, or -1 when out of memory. */
int octavo_paged_attention(const attention_args *a) {
    int64_t group = a->num_heads / a->num_kv_heads;
    int64_t most = 0, work = 0;
    for (int64_t row = 0; row < a->num_rows; row++) {
        int64_t num_new = a->query_start[row + 1] - a->query_start[row];
        most = max64(most, num_new);
        work += num_new * a->context_lens[row];
    }
    int64_t tile = queries_of_tile(a, most), num_tiles = num_tiles_of(a, tile);
    /* Tokens of no row are padding, behind all rows. */
    int64_t num_real = a->query_start[a->num_rows], out_token = a->num_heads * a->v_dim * size_of(a->q_dtype);
    if (num_real < a->num_tokens) memset((char *)a->out + num_real * out_token, 0, (a->num_tokens - num_real) * out_token);
    if (num_tiles == 0) return 0;
    int32_t *tiles = malloc(num_tiles * 2 * sizeof *tiles); /* (row, first query) */
    if (!tiles) return -1;
    /* The last first: rows with many queries stand behind the decodes, and a row's last tile sees most keys. */
    for (int64_t row = 0, i = num_tiles; row < a->num_rows; row++)
        for (int64_t q = 0; q < a->query_start[row + 1] - a->query_start[row]; q += tile) {
            i--;
            tiles[2 * i] = (int32_t)row;
            tiles[2 * i + 1] = (int32_t)q;
        }
    work *= a->num_heads * (a->k_dim + a->v_dim);
    int64_t num_tasks = num_tiles * a->num_kv_heads;
    int num_threads = work < 200000 ? 1 : (int)min64(a->num_threads, num_tasks); /* waking threads costs 5 us and more */
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        scratch s;
        int ok = scratch_init(&s, round_up_to(tile * group, BATCH), round_up(a->k_dim),
                              round_up_to(a->v_dim, PANEL)) == 0;
        if (!ok) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < num_tasks; task++) {
            int64_t row = tiles[2 * (task / a->num_kv_heads)], q = tiles[2 * (task / a->num_kv_heads) + 1];
            int64_t head = task % a->num_kv_heads;
            int64_t num_new = a->query_start[row + 1] - a->query_start[row], n = min64(tile, num_new - q);
            if (!ok) continue;
            attend(a, &s, row, head, q, n);
        }
        if (ok) free(s.memory);
    }
    free(tiles);
    return failed ? -1 : 0;
}

/* One of K and V: cache[slot] = x[token], converted or quantised. Returns -1 at a slot outside the cache. */
int octavo_write_kv(const void *x, void *cache, const int64_t *slots, int64_t num_tokens, int64_t num_kv_heads,
                    int64_t num_blocks, int64_t block_size, int64_t head_dim, int64_t stride_token, int64_t stride_head,
                    int x_dtype, int cache_dtype) {
    int64_t bytes = row_bytes(head_dim, cache_dtype);
    for (int64_t token = 0; token < num_tokens; token++) {
        int64_t slot = slots[token];
        if (slot < 0) continue;
        if (slot >= num_blocks * block_size) return -1;
        int64_t block = slot / block_size, offset = slot % block_size;
        for (int64_t head = 0; head < num_kv_heads; head++)
            write_row_of((char *)cache + ((block * num_kv_heads + head) * block_size + offset) * bytes, x,
                         token * stride_token + head * stride_head, head_dim, x_dtype, cache_dtype);
    }
    return 0;
}
