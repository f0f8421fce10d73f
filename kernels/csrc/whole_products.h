/* Sums of products of whole numbers, of a few rows by a panel: the inner loops of linear_whole.c. */
#ifndef OCTAVO_WHOLE_PRODUCTS_H
#define OCTAVO_WHOLE_PRODUCTS_H

#include "whole_numbers.h"

#define PANEL_VECTORS (PANEL / VL)
#define STREAMS 4 /* panels that are read side by side at most, */
#define MAX_SUMS 6 /* with so many rows of sums */
#define STREAM_AHEAD 128 /* pairs of one of them, behind those that are read, to ask for */

typedef int32_t vi_mem __attribute__((vector_size(4 * VL), aligned(4), may_alias));

/* sum + a * b, of each pair of numbers of 16 bits. */
INLINE vi add_products(vi sum, vi a, vi b) {
#if VL == 16
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    return (vi)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
}

#if VL == 16
#define TILE 12 /* rows */

/* Sums of up to 12 rows, as many as hide how long one takes; numbers of x are broadcast as they are read. */
#define GROUP_KERNEL(rows, name, ahead) \
    INLINE void name##rows(vi *sums, const int32_t *x, const int32_t *w) { \
        vi acc[rows] = {{0}}; \
        for (int i = 0; i < GROUP / 2; i++, x += rows, w += PANEL) { \
            if (ahead) __builtin_prefetch(w + ahead / 4); \
            vi pairs = *(const vi_mem *)w; \
            UNROLL for (int r = 0; r < rows; r++) acc[r] = add_products(acc[r], pairs, (vi){0} + x[r]); \
        } \
        UNROLL for (int r = 0; r < rows; r++) sums[r] = acc[r]; \
    }
#define ASK 2048 /* bytes of a panel that is read alone */
#define ASK_NOT 0
#else
#define TILE 6 /* rows; with two vectors of columns 12 sums, which fill the registers */

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
#define GROUP_KERNEL(rows, name, ahead) \
    static void name##rows(vi *sums, const int32_t *x, const int32_t *w) { \
        int64_t n = GROUP / 2; \
        __asm__ volatile(EACH_SUM(ZERO) ".p2align 5\n1:\n\t" ahead "vmovdqu (%[w]), %%ymm0\n\tvmovdqu 32(%[w]), %%ymm1\n\t" \
                         ROWS_##rows "add $4*" #rows ", %[x]\n\tadd $64, %[w]\n\tdec %[n]\n\tjnz 1b\n\t" EACH_SUM(KEEP_SUM) \
                         : [x] "+r"(x), [w] "+r"(w), [n] "+r"(n) \
                         : [sums] "r"(sums) \
                         : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                           "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"); \
    }
#define ASK "prefetcht0 2048(%[w])\n\t" /* bytes of a panel that is read alone */
#define ASK_NOT ""
#endif

/* sums[r][PANEL] += x[r] . w over num_groups groups. x_scales: [groups], x_step apart; w_scales: [groups][PANEL]. */
INLINE void multiply_rows(float *sums, const int32_t *x, const int32_t *w, const float *x_scales, int64_t x_step,
                          const uint16_t *w_scales, int64_t num_groups, int rows,
                          void multiply_group(vi *, const int32_t *, const int32_t *)) {
    for (int64_t g = 0; g < num_groups; g++) {
        vi acc[PANEL_VECTORS * TILE];
        multiply_group(acc, x + g * (GROUP / 2) * rows, w + g * (GROUP / 2 * PANEL));
        UNROLL for (int c = 0; c < PANEL_VECTORS; c++) {
            vf w_scale = load(w_scales, g * PANEL + c * VL, BF16);
            UNROLL for (int r = 0; r < rows; r++) {
                vf exact = __builtin_convertvector(acc[PANEL_VECTORS * r + c], vf);
                vf sum = fma_f(exact, w_scale * x_scales[g * x_step + r], load(sums, r * PANEL + c * VL, F32));
                store(sums, r * PANEL + c * VL, sum, F32);
            }
        }
    }
}

typedef void tile_kernel(float *, const int32_t *, const int32_t *, const float *, int64_t, const uint16_t *, int64_t);
#define TILE_KERNEL(rows, name, group_name) \
    static void name##rows(float *sums, const int32_t *x, const int32_t *w, const float *x_scales, int64_t x_step, \
                           const uint16_t *w_scales, int64_t num_groups) { \
        multiply_rows(sums, x, w, x_scales, x_step, w_scales, num_groups, rows, group_name##rows); \
    }
#define TILE_KERNELS(rows) \
    GROUP_KERNEL(rows, multiply_group_, ASK_NOT) TILE_KERNEL(rows, multiply_, multiply_group_) \
    GROUP_KERNEL(rows, multiply_far_group_, ASK) TILE_KERNEL(rows, multiply_far_, multiply_far_group_)
TILE_KERNELS(1) TILE_KERNELS(2) TILE_KERNELS(3) TILE_KERNELS(4) TILE_KERNELS(5) TILE_KERNELS(6)
#if TILE == 12
TILE_KERNELS(7) TILE_KERNELS(8) TILE_KERNELS(9) TILE_KERNELS(10) TILE_KERNELS(11) TILE_KERNELS(12)
#define MORE_TILES(name) , name##7, name##8, name##9, name##10, name##11, name##12
#else
#define MORE_TILES(name)
#endif
#define TILES_OF(name) {name##1, name##2, name##3, name##4, name##5, name##6 MORE_TILES(name)}
static tile_kernel *const multiply_rows_of[] = TILES_OF(multiply_);
static tile_kernel *const multiply_far_rows_of[] = TILES_OF(multiply_far_); /* for weights in memory */

/* sums[p][r][PANEL] = x[r] . w[p], of panels that are read side by side: few rows wait for memory alone, and one stream
 * does not keep it busy. x: of one tile. */
INLINE void stream_rows(float *sums, const rows_of_x *of_x, const int32_t *const *w, const uint16_t *const *w_scales,
                        int rows, int panels) {
    const int32_t *x = (const int32_t *)of_x->integers;
    int64_t groups = of_x->in_features / GROUP, at_pair = 0;
    memset(sums, 0, panels * rows * PANEL * sizeof *sums);
    for (int64_t g = 0; g < groups; g++) {
        vi acc[PANEL_VECTORS * MAX_SUMS] = {{0}};
        for (int i = 0; i < GROUP / 2; i++, x += rows, at_pair += PANEL)
            UNROLL for (int p = 0; p < panels; p++) {
                __builtin_prefetch(w[p] + at_pair + STREAM_AHEAD);
                UNROLL for (int c = 0; c < PANEL_VECTORS; c++) {
                    vi pairs = *(const vi_mem *)(w[p] + at_pair + c * VL);
                    UNROLL for (int r = 0; r < rows; r++) {
                        vi *sum = &acc[(p * rows + r) * PANEL_VECTORS + c];
                        *sum = add_products(*sum, pairs, (vi){0} + x[r]);
                    }
                }
            }
        UNROLL for (int p = 0; p < panels; p++) UNROLL for (int c = 0; c < PANEL_VECTORS; c++) {
            vf w_scale = load(w_scales[p], g * PANEL + c * VL, BF16);
            UNROLL for (int r = 0; r < rows; r++) {
                int64_t at_sum = (p * rows + r) * PANEL + c * VL;
                vf scale = w_scale * of_x->scales[g * rows + r];
                vf exact = __builtin_convertvector(acc[(p * rows + r) * PANEL_VECTORS + c], vf);
                store(sums, at_sum, fma_f(exact, scale, load(sums, at_sum, F32)), F32);
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

#endif
