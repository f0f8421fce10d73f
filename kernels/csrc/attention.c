/* Paged attention and the write of new keys and values: see paged_attention.py for what they mean.
 *
 * A task is one KV head of one tile of a row's queries: its whole group of query heads reads K and V once. Keys come in
 * tiles of KEYS counted from position 0, whatever the block size; each sum is made in the order
 *   logit:  over head_dim, VL lanes, then a fixed tree;  weights: lane by lane over tiles;  output: key after key.
 * So the bits of a query's output depend on its own query, keys and values, not on the batch, the block size, the block
 * table, the chunk it was computed in, or the number of threads: a key that is masked adds an exact zero.
 *
 * Of a quantised cache the codes are multiplied as they are; a key's scale goes into its logits, a value's into its
 * weights. So reading it costs a conversion, and less memory traffic.
 */
#include <math.h>

#include "kv_quantize.h"
#include "vector.h"

#define KEYS 64 /* keys in a tile: a multiple of VL and 8 */
#define MAX_ROWS 32 /* (query, head) pairs that a tile aims at: their float32 queries stay in the L1 cache */

typedef struct {
    const void *q, *k_cache, *v_cache;
    void *out;
    const int32_t *query_start, *context_lens, *block_tables;
    const float *sinks, *alibi_slopes; /* [num_heads] or NULL */
    int64_t q_stride_token, q_stride_head, block_table_stride;
    int64_t num_rows, num_tokens, num_heads, num_kv_heads, k_dim, v_dim, block_size, window, num_threads;
    float scale, softcap;
    int32_t q_dtype, cache_dtype;
} attention_args; /* mirrored by _AttentionArgs in paged_attention.py */

typedef struct {
    float *q; /* [rows, k_dim rounded up] */
    float *acc; /* [rows, v_dim rounded up] */
    float *logits; /* [rows, KEYS] */
    float *sums; /* [rows, VL], the lanes of the denominator */
    float *maxima, *rescale; /* [rows] */
    float *k, *v; /* [KEYS, dim rounded up], where keys are widened for many rows */
    void *memory;
} scratch;

static int scratch_init(scratch *s, int64_t rows, int64_t k_dim, int64_t v_dim) {
    int64_t sizes[] = {rows * k_dim, rows * v_dim, rows * KEYS, rows * VL, rows, rows, KEYS * k_dim, KEYS * v_dim};
    int64_t total = 0;
    for (int i = 0; i < 8; i++) total += (sizes[i] + 15) / 16 * 16;
    s->memory = malloc(total * 4 + 64);
    if (!s->memory) return -1;
    float *next = (float *)(((uintptr_t)s->memory + 63) / 64 * 64);
    float **fields[] = {&s->q, &s->acc, &s->logits, &s->sums, &s->maxima, &s->rescale, &s->k, &s->v};
    for (int i = 0; i < 8; i++) {
        *fields[i] = next;
        next += (sizes[i] + 15) / 16 * 16;
    }
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

static void (*const dot_tile[])(float *, const float *, const void *const *, int64_t, int64_t,
                                int64_t) = {dot_f32, dot_bf16, dot_f16, dot_int8, dot_fp8};
static void (*const weigh_tile[])(float *, const float *, const float *, const void *const *, int64_t, int64_t,
                                  int64_t) = {weigh_f32, weigh_bf16, weigh_f16, weigh_int8, weigh_fp8};

/* Turns a row's logits into weights relative to the maximum so far, and says how to rescale what came before.
 * k_scales, v_scales: [KEYS], what each logit and each weight is multiplied by; NULL for none. */
static void softmax_tile(const attention_args *a, float *logits, float *maximum, float *rescale, float *sums,
                         int64_t first_key, int64_t num_vectors, int64_t position, float slope, const float *k_scales,
                         const float *v_scales) {
    vf lane;
    for (int i = 0; i < VL; i++) lane[i] = (float)i;
    const vf minus_inf = splat(-INFINITY);
    /* Positions relative to the tile: small, thus exact in float32. */
    int64_t last = position - first_key;
    int64_t first = a->window > 0 ? last - a->window + 1 : 0;
    int all_visible = last >= num_vectors * VL - 1 && first <= 0;
    float last_f = (float)min64(last, KEYS), first_f = (float)max64(first, 0);
    vf top = minus_inf;
    for (int64_t i = 0; i < num_vectors; i++) {
        vf x = load(logits, i * VL, F32) * a->scale;
        if (k_scales) x = x * load(k_scales, i * VL, F32);
        vf key = lane + (float)(i * VL);
        if (a->softcap > 0) x = tanh_f(x / a->softcap) * a->softcap;
        if (a->alibi_slopes) x = x + slope * (key - (float)last);
        if (!all_visible) x = select_f((key <= last_f) & (key >= first_f), x, minus_inf);
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

static void attend(const attention_args *a, scratch *s, int64_t row, int64_t kv_head, int64_t first_query,
                   int64_t num_queries) {
    int dtype = a->cache_dtype;
    int64_t group = a->num_heads / a->num_kv_heads, rows = num_queries * group;
    int64_t k_pad = round_up(a->k_dim), v_pad = round_up(a->v_dim);
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
    int widen_k = (dtype != F32 && rows >= 4) || a->k_dim != k_pad;
    int widen_v = (dtype != F32 && rows >= 4) || a->v_dim != v_pad;

    for (int64_t r = 0; r < rows; r++) {
        int64_t head = kv_head * group + r % group;
        int64_t from = (token + r / group) * a->q_stride_token + head * a->q_stride_head;
        if (a->q_dtype == F32) widen(s->q + r * k_pad, at(a->q, from, F32), a->k_dim, F32);
        if (a->q_dtype == BF16) widen(s->q + r * k_pad, at(a->q, from, BF16), a->k_dim, BF16);
        if (a->q_dtype == F16) widen(s->q + r * k_pad, at(a->q, from, F16), a->k_dim, F16);
        memset(s->acc + r * v_pad, 0, v_pad * 4);
        memset(s->sums + r * VL, 0, VL * 4);
        s->maxima[r] = a->sinks ? a->sinks[head] : -INFINITY;
        if (a->sinks) s->sums[r * VL] = 1.0f;
    }

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
        int64_t num_vectors = (num_keys + VL - 1) / VL;
        if (widen_k) {
            for (int64_t j = 0; j < num_keys; j++) {
                widen(s->k + j * k_pad, keys[j], a->k_dim, dtype);
                keys[j] = s->k + j * k_pad;
            }
            for (int64_t j = num_keys; j < KEYS; j++) keys[j] = s->k;
            dot_tile[F32](s->logits, s->q, keys, num_vectors * VL, k_pad, rows);
        } else {
            dot_tile[dtype](s->logits, s->q, keys, num_vectors * VL, k_pad, rows);
        }
        for (int64_t r = 0; r < rows; r++) {
            float slope = a->alibi_slopes ? a->alibi_slopes[kv_head * group + r % group] : 0.0f;
            softmax_tile(a, s->logits + r * KEYS, s->maxima + r, s->rescale + r, s->sums + r * VL, first_key,
                         num_vectors, position + r / group, slope, quantized ? k_scales : NULL,
                         quantized ? v_scales : NULL);
        }
        if (widen_v) {
            for (int64_t j = 0; j < num_keys; j++) {
                widen(s->v + j * v_pad, values[j], a->v_dim, dtype);
                values[j] = s->v + j * v_pad;
            }
            weigh_tile[F32](s->acc, s->logits, s->rescale, values, num_keys, v_pad, rows);
        } else {
            weigh_tile[dtype](s->acc, s->logits, s->rescale, values, num_keys, v_pad, rows);
        }
    }

    for (int64_t r = 0; r < rows; r++) {
        int64_t head = kv_head * group + r % group;
        int64_t to = ((token + r / group) * a->num_heads + head) * a->v_dim;
        float sum = sum_lanes(load(s->sums, r * VL, F32));
        for (int64_t d = 0; d < a->v_dim; d += VL) {
            vf x = load(s->acc, r * v_pad + d, F32) / sum;
            if (a->q_dtype == F32) store_upto(a->out, to + d, x, a->v_dim - d, F32);
            if (a->q_dtype == BF16) store_upto(a->out, to + d, x, a->v_dim - d, BF16);
            if (a->q_dtype == F16) store_upto(a->out, to + d, x, a->v_dim - d, F16);
        }
    }
}

/* Returns 0, or -1 when out of memory. */
int octavo_paged_attention(const attention_args *a) {
    int64_t group = a->num_heads / a->num_kv_heads;
    int64_t tile = max64(1, MAX_ROWS / group); /* queries in a tile */
    int64_t num_tiles = 0, work = 0;
    for (int64_t row = 0; row < a->num_rows; row++) {
        int64_t num_new = a->query_start[row + 1] - a->query_start[row];
        num_tiles += (num_new + tile - 1) / tile;
        work += num_new * a->context_lens[row];
    }
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
        int ok = scratch_init(&s, tile * group, round_up(a->k_dim), round_up(a->v_dim)) == 0;
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
