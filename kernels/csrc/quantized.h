/* What a weight of 4 or 8 bits is in memory, and its factors: see quantized.c. */
#ifndef OCTAVO_QUANTIZED_H
#define OCTAVO_QUANTIZED_H

#include "vector.h"

#define BLOCK_K 1024 /* inputs; fixed, as the order of sums depends on it */
#define PAD 64 /* inputs: rows of codes are filled up to a multiple of it */
#define SEGMENT 16 /* inputs that share their factors, at least: so many have one entry in `factors` */
#define PASS_ROWS 768 /* rows laid out at once: what bounds the scratch memory; a multiple of the rows that a thread takes */

typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef int32_t i8_mem __attribute__((vector_size(32), aligned(1), may_alias));
typedef float v8_mem __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    const uint8_t *codes;
    const void *scales;   /* [out_features, num_groups] */
    const int16_t *zeros; /* the same, or NULL: 8 for 4 bits, 0 for 8 bits */
    const void *offsets;  /* the same, in place of zeros; or NULL */
    const uint16_t *superblocks; /* float16 [out_features, num_groups >> superblock_shift, 1 or 2 with offsets], by which
                                  * scales and negative offsets are multiplied, whole numbers of 8 bits; or NULL */
    int64_t out_features, padded_in, group_size, num_groups, row_bytes;
    int bits, shift, scale_dtype, offset_dtype, superblock_shift;
} quantized;

/* Of a weight row's inputs [k, k + BLOCK_K): those of input k + i stand at i >> shift. For codes of 4 bits four scales
 * stand there, times 1, 1/16, 1/256 and 1/4096: for a code that was left where it lies in its word. */
typedef struct {
    float scale[4 * BLOCK_K / 32], offset[BLOCK_K / SEGMENT];
} factors;

INLINE v8 splat8(float x) { return x - (v8){0}; }

INLINE v8 fma8(v8 a, v8 b, v8 c) {
#if defined(__FMA__)
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    UNROLL for (int i = 0; i < 8; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE float widen_half(const uint16_t *p) {
#ifdef __F16C__
    return _cvtsh_ss(*p);
#else
    _Float16 x;
    memcpy(&x, p, sizeof x);
    return (float)x;
#endif
}

/* Two of the superblock that group `at`, of all rows', belongs to: of scales, and of offsets where there are any. */
INLINE const uint16_t *superblock_of(const quantized *w, int64_t at) {
    return w->superblocks + (at >> w->superblock_shift) * (w->offsets ? 2 : 1);
}

/* n elements to float32. */
INLINE void widen_some(float *to, const void *base, int64_t first, int64_t n, int dtype) {
    int64_t i = 0;
    switch (dtype) {
    case F32:
        for (; i + VL <= n; i += VL) store(to, i, load(base, first + i, F32), F32);
        break;
    case BF16:
        for (; i + VL <= n; i += VL) store(to, i, load(base, first + i, BF16), F32);
        break;
    default:
        for (; i + VL <= n; i += VL) store(to, i, load(base, first + i, F16), F32);
    }
    for (; i < n; i++) {
        const uint16_t *half = (const uint16_t *)base + first + i;
        if (dtype == F32) {
            to[i] = ((const float *)base)[first + i];
        } else if (dtype == BF16) {
            uint32_t bits = (uint32_t)*half << 16;
            memcpy(to + i, &bits, sizeof bits);
        } else {
            to[i] = widen_half(half);
        }
    }
}

/* n scales and offsets, which stand from `at` on in the weight's tensors. */
INLINE void widen_factors(factors *f, const quantized *w, int64_t at, int64_t n) {
    if (w->superblocks) { /* one for eight groups, or sixteen */
        const int8_t *scales = (const int8_t *)w->scales + at, *offsets = (const int8_t *)w->offsets + at;
        for (int64_t i = 0; i < n; i++) {
            const uint16_t *by = superblock_of(w, at + i);
            f->scale[i] = widen_half(by) * (float)scales[i];
            f->offset[i] = w->offsets ? -(widen_half(by + 1) * (float)offsets[i]) : 0.0f;
        }
        return;
    }
    widen_some(f->scale, w->scales, at, n, w->scale_dtype);
    float zero = w->bits == 4 ? 8.0f : 0.0f;
    if (w->offsets) {
        widen_some(f->offset, w->offsets, at, n, w->offset_dtype);
    } else if (w->zeros) {
        for (int64_t i = 0; i < n; i++) f->offset[i] = -(f->scale[i] * (float)w->zeros[at + i]);
    } else {
        for (int64_t i = 0; i < n; i++) f->offset[i] = -(f->scale[i] * zero);
    }
}

/* Factors of inputs [k, k + size) of a weight row. Not inlined: it is called in many places, and compiles for seconds. */
static __attribute__((noinline, unused)) void load_factors(factors *f, const quantized *w, int64_t row, int64_t k,
                                                           int64_t size, int bits) {
    int64_t first = row * w->num_groups, group = k / w->group_size, n = ((size - 1) >> w->shift) + 1;
    if (w->group_size == (int64_t)1 << w->shift || w->num_groups == 1) {
        int64_t some = min64(n, w->num_groups - group);
        widen_factors(f, w, first + group, some);
        if (some < n) f->scale[some] = f->offset[some] = 0.0f; /* a group of padding alone */
    } else { /* groups that blocks of inputs cut */
        for (int64_t i = 0; i < n; i++) {
            factors one;
            widen_factors(&one, w, first + min64((k + (i << w->shift)) / w->group_size, w->num_groups - 1), 1);
            f->scale[i] = one.scale[0];
            f->offset[i] = one.offset[0];
        }
    }
    if (bits == 4)
        while (n--) *(v4_mem *)(f->scale + 4 * n) = f->scale[n] * (v4){1.0f, 1.0f / 16, 1.0f / 256, 1.0f / 4096};
}

/* Tiles differ in height by one row at most. */
INLINE int64_t tile_start(int64_t tile, int64_t num_rows, int64_t num_tiles) {
    return tile * (num_rows / num_tiles) + min64(tile, num_rows % num_tiles);
}

/* out[0 .. num_rows, :] with x rounded to whole numbers: see quantized_whole.c. Returns 0, or -1 when out of memory. */
int octavo_linear_whole(const void *x, int dtype, const quantized *w, void *out, int64_t num_rows, int64_t in_features,
                        int num_threads);

#define FEW_ROWS 8 /* at most, whose codes octavo_linear_whole unpacks in registers: see most_few */
/* Rows up to which that is quicker than a panel. */
INLINE int64_t most_few(const quantized *w) { return w->bits == 8 && w->group_size % 32 == 0 ? FEW_ROWS : FEW_ROWS / 2; }

/* Whether octavo_linear_whole can do it, and is quicker: for many rows floats have wider vectors with AVX-512. */
INLINE int whole_is_quick(const quantized *w, int64_t num_rows) {
#if defined(__AVX2__)
    return VL == 8 || (w->group_size % 32 == 0 && num_rows <= most_few(w));
#else
    (void)w;
    (void)num_rows;
    return 0;
#endif
}

#endif
