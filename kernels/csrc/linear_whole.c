/* y = x w^T of bfloat16 in whole numbers: the quick way of linear_dense.py for more than a few rows, and that of
 * linear_rounded.py for any number of them.
 *
 * GROUP inputs of a row of x, and of a row of w, are rounded to whole numbers of 16 bits times a power of two of their own,
 * multiplied and summed exactly in 32 bits, and become floats: two instructions for 16 products, which AVX2 does in two
 * thirds of the time of the two that floats take. The sum stays below 2^31, as numbers of x are below 2^13 and those of w
 * are below 2^18 all together. A bfloat16 number has 8 bits: so those of x within 2^5 of the largest of their group are
 * taken as they are, and smaller ones are at most 2^-13 of the largest beside what they were. For w that is 2^4 and 2^-12
 * where all are alike, better by 2 or 4 where they are not. Up to 2^-9 of each was lost when it was stored.
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
#include <math.h>

#include "operations.h"
#include "vector.h"
#include "work_queue.h"

#define GROUP 64 /* inputs that share a power of two */
#define BLOCK_K 512 /* inputs; a multiple of GROUP */
#define PANEL 16 /* columns */
#define MAX_PANELS 6 /* of a task */
#define TASKS_OF_THREAD 8 /* at least: enough for each thread to find more when another is held up */
#define TILE 6 /* rows; with two vectors of columns 12 sums, which fill the registers */
#define NEAR_TILES 32 /* whose block of x stays in the L2 cache while a task's panels go by */
#define PASS_ROWS 768 /* rows laid out at once: what bounds the scratch memory */
#define LEAST_ROWS 24 /* fewer do not pay for weights to be rounded */
#define FEW_TILES 4 /* for which stored panels are read one after the other, as they lie */
#define FEW_ROWS 3 /* for which several of those are read side by side, */
#define STREAMS 4 /* so many at most, */
#define MAX_SUMS 6 /* with so many rows of sums */
#define FEW_TASKS 4 /* of each thread then, or more, */
#define MOST_STREAMED 60 /* which are of so many panels at most */
#define STREAM_AHEAD 128 /* pairs of one of them, behind those that are read, to ask for */
#define AHEAD "2048" /* bytes of a panel that is read alone, likewise */
#define PARALLEL_PRODUCTS 400000 /* below, waking threads costs more than they save; where weights are stored */
#define X_BITS 13 /* together they make 31 */
#define W_SUM_BITS 18

#if defined(__AVX2__) && defined(__FMA__) && VL == 8

/* The power of two that numbers below 2^(exponent + 1) are multiplied by to be below 2^bits: its bits, for both ways. */
INLINE vi power_up(vi exponent, int bits) {
    vi power = bits - 1 - exponent;
    vi most = power > 126;
    return (most & 126) | (~most & power);
}
INLINE vf two_to(vi power) { return (vf)((power + 127) << 23); }
INLINE vi exponent_of(vf x) { return (vi)(((vu)x >> 23) & 255) - 127; }

typedef struct {
    int16_t *integers; /* as above */
    float *scales;     /* [in / GROUP][tiles][rows of the tile], powers of two; NaN where a number is not finite */
    int64_t num_rows, num_tiles, in_features;
} rows_of_x;

INLINE int64_t tile_start(int64_t tile, int64_t num_rows, int64_t num_tiles) {
    return tile * (num_rows / num_tiles) + min64(tile, num_rows % num_tiles);
}

/* 16 bfloat16 numbers times `up` to pairs of whole numbers: a sum with 1.5 * 2^23 is rounded, and has them in its low bits. */
INLINE __m256i round_pairs(__m256i raw, __m256 up) {
    const __m256 magic = _mm256_set1_ps(12582912.0f);
    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32((int32_t)0xffff0000)));
    __m256i low = _mm256_castps_si256(_mm256_fmadd_ps(even, up, magic));
    __m256i high = _mm256_castps_si256(_mm256_fmadd_ps(odd, up, magic));
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}

INLINE int32_t largest_bits(__m256i absolute) {
    __m128i top = _mm_max_epu16(_mm256_castsi256_si128(absolute), _mm256_extracti128_si256(absolute, 1));
    return 0xffff ^ _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(top, _mm_set1_epi16(-1))), 0);
}

static void round_row(const rows_of_x *to, int64_t first, int64_t r, int64_t height, const uint16_t *from) {
    for (int64_t g = 0; g < to->in_features; g += GROUP) {
        int64_t k = g / BLOCK_K * BLOCK_K, dim = min64(BLOCK_K, to->in_features - k);
        int32_t *pairs = (int32_t *)(to->integers + k * to->num_rows + first * dim) + (g - k) / 2 * height + r;
        __m256i raw[GROUP / 16], top = _mm256_setzero_si256();
        for (int i = 0; i < GROUP / 16; i++) {
            raw[i] = _mm256_loadu_si256((const __m256i *)(from + g + 16 * i));
            top = _mm256_max_epu16(top, _mm256_and_si256(raw[i], _mm256_set1_epi16(0x7fff)));
        }
        int32_t largest = largest_bits(top);
        int is_finite = largest < 0x7f80;
        vi power = power_up((vi){0} + ((largest >> 7) - 127), X_BITS);
        vf up = two_to(power), down = two_to(-power);
        to->scales[g / GROUP * to->num_rows + first + r] = is_finite ? down[0] : __builtin_nanf("");
        for (int i = 0; i < GROUP / 16; i++) {
            int32_t some[8] = {0};
            if (is_finite) _mm256_storeu_si256((__m256i *)some, round_pairs(raw[i], (__m256)up));
            for (int j = 0; j < 8; j++) pairs[(8 * i + j) * height] = some[j];
        }
    }
}

/* 8 x 8 numbers of 32 bits, rows become columns. */
INLINE void transpose(__m256i x[8]) {
    __m256i a[8];
    UNROLL for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    __m256i b[8];
    UNROLL for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        x[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
}

/* GROUP inputs of 8 columns: to `pairs` [GROUP / 2][PANEL], and their scales. Asks for those `ahead`. */
static void round_columns(int32_t *pairs, uint16_t *scales, const uint16_t *const w[8], int64_t ahead) {
    vf sums[8];
    int32_t tops[8];
    const __m256i absolute = _mm256_set1_epi16(0x7fff);
    for (int c = 0; c < 8; c++) {
        __m256 sum = _mm256_setzero_ps();
        __m256i top = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < GROUP; i += 32) __builtin_prefetch(w[c] + ahead + i);
        UNROLL for (int i = 0; i < GROUP / 16; i++) {
            __m256i raw = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(w[c] + 16 * i)), absolute);
            __m256i odd = _mm256_and_si256(raw, _mm256_set1_epi32((int32_t)0xffff0000));
            top = _mm256_max_epu16(top, raw);
            sum = _mm256_add_ps(sum, _mm256_add_ps(_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
                                                   _mm256_castsi256_ps(odd)));
        }
        sums[c] = (vf)sum;
        tops[c] = largest_bits(top);
    }
    vi top;
    memcpy(&top, tops, sizeof top);
    /* Rounded up, as are the numbers: by half each at most, which is GROUP / 2 of 2^W_SUM_BITS. */
    vf sum = (vf)sum_each(sums) * 1.001f;
    vi by_sum = power_up(exponent_of(sum), W_SUM_BITS);
    vi by_top = power_up((top >> 7) - 127, 15);
    vi less = by_sum < by_top, power = (less & by_sum) | (~less & by_top);
    vf up = two_to(power), down = two_to(-power);
    vi finite = (top < 0x7f80) & (sum < INFINITY);
    store(scales, 0, select_f(finite, down, splat(__builtin_nanf(""))), BF16); /* exact */
    up = select_f(finite, up, (vf){0}); /* what comes of NaN times it is multiplied by NaN again */
    for (int i = 0; i < GROUP / 16; i++) {
        __m256i x[8];
        UNROLL for (int c = 0; c < 8; c++)
            x[c] = round_pairs(_mm256_loadu_si256((const __m256i *)(w[c] + 16 * i)), _mm256_set1_ps(up[c]));
        transpose(x);
        UNROLL for (int j = 0; j < 8; j++) _mm256_storeu_si256((__m256i *)(pairs + (8 * i + j) * PANEL), x[j]);
    }
}

/* The inner loop, written out, as compilers put sums into memory: sums of up to 6 rows by two vectors of columns, two
 * vectors of weights, one of x, and one for what becomes of them are all of the 16 registers. */
#define EACH_SUM(DO) \
    DO(0, 4) DO(1, 5) DO(2, 6) DO(3, 7) DO(4, 8) DO(5, 9) DO(6, 10) DO(7, 11) DO(8, 12) DO(9, 13) DO(10, 14) DO(11, 15)
#define ZERO(i, ymm) "vpxor %%xmm" #ymm ", %%xmm" #ymm ", %%xmm" #ymm "\n\t"
#define KEEP_SUM(i, ymm) "vmovdqa %%ymm" #ymm ", 32*" #i "(%[sums])\n\t"
#ifdef __AVXVNNI__
#define ADD_PAIRS(w, ymm) "%{vex%} vpdpwssd %%ymm" #w ", %%ymm2, %%ymm" #ymm "\n\t"
#else
#define ADD_PAIRS(w, ymm) "vpmaddwd %%ymm" #w ", %%ymm2, %%ymm3\n\tvpaddd %%ymm3, %%ymm" #ymm ", %%ymm" #ymm "\n\t"
#endif
#define ROW(r, ymm_0, ymm_1) "vpbroadcastd 4*" #r "(%[x]), %%ymm2\n\t" ADD_PAIRS(0, ymm_0) ADD_PAIRS(1, ymm_1)
#define ROWS_1 ROW(0, 4, 5)
#define ROWS_2 ROWS_1 ROW(1, 6, 7)
#define ROWS_3 ROWS_2 ROW(2, 8, 9)
#define ROWS_4 ROWS_3 ROW(3, 10, 11)
#define ROWS_5 ROWS_4 ROW(4, 12, 13)
#define ROWS_6 ROWS_5 ROW(5, 14, 15)
#define GROUP_KERNEL(rows, name, ASK) \
    static void name##rows(__m256i *sums, const int32_t *x, const int32_t *w) { \
        int64_t n = GROUP / 2; \
        __asm__ volatile(EACH_SUM(ZERO) ".p2align 5\n1:\n\t" ASK "vmovdqu (%[w]), %%ymm0\n\tvmovdqu 32(%[w]), %%ymm1\n\t" \
                         ROWS_##rows "add $4*" #rows ", %[x]\n\tadd $64, %[w]\n\tdec %[n]\n\tjnz 1b\n\t" EACH_SUM(KEEP_SUM) \
                         : [x] "+r"(x), [w] "+r"(w), [n] "+r"(n) \
                         : [sums] "r"(sums) \
                         : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                           "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"); \
    }
#define GROUP_KERNELS(rows) \
    GROUP_KERNEL(rows, multiply_group_, "") \
    GROUP_KERNEL(rows, multiply_far_group_, "prefetcht0 " AHEAD "(%[w])\n\t")
GROUP_KERNELS(1)
GROUP_KERNELS(2)
GROUP_KERNELS(3)
GROUP_KERNELS(4)
GROUP_KERNELS(5)
GROUP_KERNELS(6)

/* sums[r][PANEL] += x[r] . w over num_groups groups. x_scales: [groups], x_step apart; w_scales: [groups][PANEL]. */
INLINE void multiply_rows(float *sums, const int32_t *x, const int32_t *w, const float *x_scales, int64_t x_step,
                          const uint16_t *w_scales, int64_t num_groups, int rows,
                          void multiply_group(__m256i *, const int32_t *, const int32_t *)) {
    for (int64_t g = 0; g < num_groups; g++) {
        __m256i acc[2 * TILE];
        multiply_group(acc, x + g * (GROUP / 2) * rows, w + g * (GROUP / 2 * PANEL));
        vf w_scale[2] = {load(w_scales, g * PANEL, BF16), load(w_scales, g * PANEL + VL, BF16)};
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < 2; c++) {
            vf scale = w_scale[c] * x_scales[g * x_step + r];
            vf sum = fma_f((vf)_mm256_cvtepi32_ps(acc[2 * r + c]), scale, load(sums, r * PANEL + c * VL, F32));
            store(sums, r * PANEL + c * VL, sum, F32);
        }
    }
}

typedef void tile_kernel(float *, const int32_t *, const int32_t *, const float *, int64_t, const uint16_t *, int64_t);
#define TILE_KERNEL(rows, name, group_name) \
    static void name##rows(float *sums, const int32_t *x, const int32_t *w, const float *x_scales, int64_t x_step, \
                           const uint16_t *w_scales, int64_t num_groups) { \
        multiply_rows(sums, x, w, x_scales, x_step, w_scales, num_groups, rows, group_name##rows); \
    }
#define TILE_KERNELS(name, group_name) \
    TILE_KERNEL(1, name, group_name) TILE_KERNEL(2, name, group_name) TILE_KERNEL(3, name, group_name) \
    TILE_KERNEL(4, name, group_name) TILE_KERNEL(5, name, group_name) TILE_KERNEL(6, name, group_name) \
    static tile_kernel *const name##rows_of[] = {name##1, name##2, name##3, name##4, name##5, name##6};
TILE_KERNELS(multiply_, multiply_group_)
TILE_KERNELS(multiply_far_, multiply_far_group_) /* for weights in memory */

INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

/* sums[p][r][PANEL] = x[r] . w[p], of panels that are read side by side: few rows wait for memory alone, and one stream
 * does not keep it busy. x: of one tile. */
INLINE void stream_rows(float *sums, const rows_of_x *of_x, const int32_t *const *w, const uint16_t *const *w_scales,
                        int rows, int panels) {
    const int32_t *x = (const int32_t *)of_x->integers;
    int64_t groups = of_x->in_features / GROUP, at_pair = 0;
    memset(sums, 0, panels * rows * PANEL * sizeof *sums);
    for (int64_t g = 0; g < groups; g++) {
        __m256i acc[2 * MAX_SUMS];
        UNROLL for (int i = 0; i < 2 * rows * panels; i++) acc[i] = _mm256_setzero_si256();
        for (int i = 0; i < GROUP / 2; i++, x += rows, at_pair += PANEL)
            UNROLL for (int p = 0; p < panels; p++) {
                __builtin_prefetch(w[p] + at_pair + STREAM_AHEAD);
                UNROLL for (int c = 0; c < 2; c++) {
                    __m256i pairs = _mm256_loadu_si256((const __m256i *)(w[p] + at_pair + c * VL));
                    UNROLL for (int r = 0; r < rows; r++)
                        acc[(p * rows + r) * 2 + c] = add_products(acc[(p * rows + r) * 2 + c], pairs,
                                                                   _mm256_set1_epi32(x[r]));
                }
            }
        UNROLL for (int p = 0; p < panels; p++) UNROLL for (int c = 0; c < 2; c++) {
            vf w_scale = load(w_scales[p], g * PANEL + c * VL, BF16);
            UNROLL for (int r = 0; r < rows; r++) {
                int64_t at_sum = (p * rows + r) * PANEL + c * VL;
                vf scale = w_scale * of_x->scales[g * rows + r];
                vf sum = (vf)_mm256_cvtepi32_ps(acc[(p * rows + r) * 2 + c]);
                store(sums, at_sum, fma_f(sum, scale, load(sums, at_sum, F32)), F32);
            }
        }
    }
}

typedef void stream_kernel(float *, const rows_of_x *, const int32_t *const *, const uint16_t *const *);
#define STREAM_KERNEL(rows, panels) \
    static void stream_##rows(float *sums, const rows_of_x *x, const int32_t *const *w, \
                              const uint16_t *const *w_scales) { \
        stream_rows(sums, x, w, w_scales, rows, panels); \
    }
STREAM_KERNEL(1, 4)
STREAM_KERNEL(2, 3)
STREAM_KERNEL(3, 2)
static stream_kernel *const stream_kernels[] = {stream_1, stream_2, stream_3};
static const int streams_of[] = {4, 3, 2}; /* whose sums, and what they are made from, fit the registers */

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

/* num_groups groups from input k on of the PANEL columns from col on: as a panel, and their scales. */
static void round_panel(int32_t *panel, uint16_t *scales, const uint16_t *w, int64_t in, int64_t out_features, int64_t col,
                        int64_t k, int64_t num_groups) {
    for (int64_t half = 0; half < PANEL; half += 8) {
        const uint16_t *columns[8];
        for (int64_t c = 0; c < 8; c++) columns[c] = w + min64(col + half + c, out_features - 1) * in + k;
        for (int64_t g = 0; g < num_groups; g++) {
            round_columns(panel + g * (GROUP / 2 * PANEL) + half, scales + g * PANEL + half, columns, 8 * in);
            for (int64_t c = 0; c < 8; c++) columns[c] += GROUP;
        }
    }
}

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

void octavo_round_weights(const void *w, void *packed, int64_t in_features, int64_t out_features, int num_threads) {
    uint16_t *scales = scales_behind(packed, in_features, out_features);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t p = 0; p < panels_of(out_features); p++)
        round_panel((int32_t *)packed + p * in_features / 2 * PANEL, scales + p * in_features / GROUP * PANEL, w,
                    in_features, out_features, p * PANEL, 0, in_features / GROUP);
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
void octavo_round_weights(const void *w, void *packed, int64_t in_features, int64_t out_features, int num_threads) {
    (void)w, (void)packed, (void)in_features, (void)out_features, (void)num_threads;
}
int octavo_linear_rounded(const void *x, const void *packed, void *out, int64_t num_rows, int64_t in_features,
                        int64_t out_features, int num_threads) {
    (void)x, (void)packed, (void)out, (void)num_rows, (void)in_features, (void)out_features, (void)num_threads;
    return -1;
}
#endif
