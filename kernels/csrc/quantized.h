/* What a weight of 4 or 8 bits is in memory, and its factors: see quantized.c. */
#ifndef OCTAVO_QUANTIZED_H
#define OCTAVO_QUANTIZED_H

#include "vector.h"

#define BLOCK_K 1024 /* inputs; fixed, as the order of sums depends on it */
#define PAD 64 /* inputs: rows of codes are filled up to a multiple of it */
#define NIBBLE_ROWS 8 /* weight rows whose codes of 4 bits lie among each other */
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

/* The first codes of a weight row. */
INLINE uint8_t *codes_of(uint8_t *codes, int64_t row, int64_t padded_in, int bits) {
    if (bits == 8) return codes + row * padded_in;
    return codes + row / NIBBLE_ROWS * NIBBLE_ROWS * (padded_in / 2) + row % NIBBLE_ROWS * 4;
}

/* Bytes between the codes of one input of a row and of one that is `inputs` behind it, multiples of PAD. */
INLINE int64_t codes_between(int64_t inputs, int bits) { return bits == 8 ? inputs : inputs / 2 * NIBBLE_ROWS; }

/* Of a weight row's inputs [k, k + BLOCK_K): those of input k + i stand at i >> shift. For codes of 4 bits four scales
 * stand there, times 1, 1/16, 1/256 and 1/4096: for a code that was left where it lies in its word. */
typedef struct {
    float scale[4 * BLOCK_K / 32], offset[BLOCK_K / SEGMENT];
} factors;

/* A weight as quantized_weight.py describes it; fields in its order. */
typedef struct {
    const uint8_t *codes;
    const void *scales;
    const int16_t *zeros;
    const void *offsets;
    const uint16_t *superblocks;
    int64_t in_features, out_features, group_size, num_groups, superblock_groups;
    int32_t bits, scale_dtype, offset_dtype;
} weight;

INLINE quantized describe(const weight *from) {
    int64_t padded_in = (from->in_features + PAD - 1) / PAD * PAD;
    int shift = 0; /* of the largest power of two that divides the group size */
    while (!(from->group_size >> shift & 1)) shift++;
    if (from->num_groups == 1)
        while ((int64_t)1 << shift < BLOCK_K) shift++;
    return (quantized){.codes = from->codes,
                       .scales = from->scales,
                       .zeros = from->zeros,
                       .offsets = from->offsets,
                       .superblocks = from->superblocks,
                       .out_features = from->out_features,
                       .padded_in = padded_in,
                       .group_size = from->group_size,
                       .num_groups = from->num_groups,
                       .row_bytes = padded_in * from->bits / 8,
                       .bits = from->bits,
                       .shift = shift,
                       .scale_dtype = from->scale_dtype,
                       .offset_dtype = from->offset_dtype,
                       .superblock_shift = from->superblock_groups == 16 ? 4 : 3};
}

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

/* Where a factor of a superblock's weights stands: with 4 bits those of NIBBLE_ROWS rows lie beside each other. */
INLINE int64_t whole_factor(int64_t row, int64_t group, int64_t num_groups, int bits) {
    if (bits == 8) return row * num_groups + group;
    return (row / NIBBLE_ROWS * num_groups + group) * NIBBLE_ROWS + row % NIBBLE_ROWS;
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
        const int8_t *scales = w->scales, *offsets = w->offsets;
        int64_t row = at / w->num_groups, group = at % w->num_groups;
        for (int64_t i = 0; i < n; i++) {
            const uint16_t *by = superblock_of(w, at + i);
            int64_t from = whole_factor(row, group + i, w->num_groups, w->bits);
            f->scale[i] = widen_half(by) * (float)scales[from];
            f->offset[i] = offsets ? -(widen_half(by + 1) * (float)offsets[from]) : 0.0f;
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
        for (; some < n; some++) f->scale[some] = f->offset[some] = 0.0f; /* groups of padding alone */
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

#if VL == 16 && defined(__AVX512VNNI__)
#define HAS_WIDE_PRODUCTS 1 /* of whole numbers, twice as many at once as of floats */
#else
#define HAS_WIDE_PRODUCTS 0
#endif

#define REGISTER_ROWS 8 /* at most, whose codes octavo_linear_whole unpacks in registers: see most_few */
/* Rows up to which that is quicker than a panel. */
INLINE int64_t most_few(const quantized *w) {
    return w->bits == 8 && w->group_size % 32 == 0 ? REGISTER_ROWS : REGISTER_ROWS / 2;
}

/* Whether octavo_linear_whole can do it, and is quicker: with AVX-512 alone floats have wider vectors for many rows. */
INLINE int whole_is_quick(const quantized *w, int64_t num_rows) {
#if defined(__AVX2__)
    return VL == 8 || HAS_WIDE_PRODUCTS || (w->group_size % 32 == 0 && num_rows <= most_few(w));
#else
    (void)w;
    (void)num_rows;
    return 0;
#endif
}

#endif
