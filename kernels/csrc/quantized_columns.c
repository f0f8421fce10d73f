/* Factors of codes of 4 or 8 bits with a lane for each of eight weight rows: see quantized_whole.c. */
#include "quantized_whole.h"

#ifdef __AVX2__
INLINE void put_columns(float *to, int64_t stride, int64_t n, v8 v[8]) {
    transpose(v);
    UNROLL for (int j = 0; j < 8; j++) *(v8_mem *)(to + (n + j) * stride) = v[j];
}

/* Where eight factors of a row stand side by side: num is a multiple of 8, and so are those before them. */
INLINE void direct_columns(float *scale, float *offset, int64_t stride, const quantized *w, const int64_t first[8],
                           int64_t num, int scale_dtype) {
    for (int i = 0; i < 8; i++) { /* those of the next eight rows, which are asked for next */
        int64_t next = first[i] + 8 * w->num_groups;
        __builtin_prefetch(at(w->scales, next, scale_dtype));
        if (w->offsets) __builtin_prefetch(at(w->offsets, next, scale_dtype));
        if (w->zeros) __builtin_prefetch(w->zeros + next);
    }
    for (int64_t n = 0; n < num; n += 8) {
        v8 scales[8], offsets[8] = {{0}};
        UNROLL for (int i = 0; i < 8; i++) {
            const uint16_t *superblock = scale_dtype == INT8 ? superblock_of(w, first[i] + n) : NULL;
            scales[i] = load_eight(w->scales, first[i] + n, scale_dtype, 0);
            if (superblock) scales[i] *= widen_half(superblock);
            if (w->offsets) offsets[i] = load_eight(w->offsets, first[i] + n, scale_dtype, 0);
            if (w->offsets && superblock) offsets[i] *= -widen_half(superblock + 1);
            if (w->zeros) {
                __m128i zeros = _mm_loadu_si128((const __m128i *)(w->zeros + first[i] + n));
                offsets[i] = -scales[i] * (v8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(zeros));
            }
        }
        put_columns(scale, stride, n, scales);
        if (w->offsets || w->zeros) put_columns(offset, stride, n, offsets);
    }
}

/* Where whole numbers for eight rows stand side by side, and superblocks have eight groups. */
INLINE void superblock_columns(float *scale, float *offset, int64_t stride, const quantized *w, const int64_t first[8],
                               int64_t from, int64_t num) {
    __builtin_prefetch(superblock_of(w, first[0] + 8 * w->num_groups)); /* of the next eight rows */
    for (int64_t n = 0; n < num; n += 8) {
        uint16_t halves[2][8];
        for (int i = 0; i < 8; i++) {
            const uint16_t *superblock = superblock_of(w, first[i] + n);
            halves[0][i] = superblock[0];
            halves[1][i] = w->offsets ? superblock[1] : 0;
        }
        v8 scale_by = load_eight(halves[0], 0, F16, 0), offset_by = -load_eight(halves[1], 0, F16, 0);
        for (int64_t j = n; j < n + 8; j++) {
            *(v8_mem *)(scale + j * stride) = load_eight(w->scales, from + j * 8, INT8, 0) * scale_by;
            if (w->offsets) *(v8_mem *)(offset + j * stride) = load_eight(w->offsets, from + j * 8, INT8, 0) * offset_by;
        }
    }
}

static void other_columns(float *scale, float *offset, int64_t stride, const quantized *w, int64_t row, int64_t k,
                          int64_t size) {
    factors f[8];
    for (int i = 0; i < 8; i++) load_factors(&f[i], w, min64(row + i, w->out_features - 1), k, size, 8);
    for (int64_t n = 0; n <= (size - 1) >> w->shift; n += 8) {
        v8 v[8];
        UNROLL for (int i = 0; i < 8; i++) v[i] = *(const v8_mem *)(f[i].scale + n);
        put_columns(scale, stride, n, v);
        if (!w->offsets && !w->zeros) continue;
        UNROLL for (int i = 0; i < 8; i++) v[i] = *(const v8_mem *)(f[i].offset + n);
        put_columns(offset, stride, n, v);
    }
}

void octavo_quantized_columns(float *scale, float *offset, int64_t stride, const quantized *w, int64_t row, int64_t k,
                              int64_t size) {
    int64_t num = ((size - 1) >> w->shift) + 1, group = k >> w->shift, first[8];
    int is_direct = w->group_size == (int64_t)1 << w->shift && num % 8 == 0 && group % 8 == 0 &&
                    group + num <= w->num_groups && can_load_eight(w) &&
                    (!w->offsets || w->offset_dtype == w->scale_dtype);
    if (!is_direct) {
        other_columns(scale, offset, stride, w, row, k, size);
        return;
    }
    for (int i = 0; i < 8; i++) first[i] = min64(row + i, w->out_features - 1) * w->num_groups + group;
    switch (w->scale_dtype) {
    case F32: direct_columns(scale, offset, stride, w, first, num, F32); break;
    case BF16: direct_columns(scale, offset, stride, w, first, num, BF16); break;
    case F16: direct_columns(scale, offset, stride, w, first, num, F16); break;
    default:
        if (w->bits == 4 && HAS_HALVES && w->superblock_shift == 3)
            superblock_columns(scale, offset, stride, w, first, whole_factor(row, group, w->num_groups, 4), num);
        else if (w->bits == 8)
            direct_columns(scale, offset, stride, w, first, num, INT8);
        else
            other_columns(scale, offset, stride, w, row, k, size);
    }
}
#endif
