/* Rows of x in whole numbers, and what is done to them a few at a time: see quantized_whole.c. */
#ifndef OCTAVO_QUANTIZED_WHOLE_H
#define OCTAVO_QUANTIZED_WHOLE_H

#include "quantized.h"

#ifdef __AVX2__
#define X_BLOCK 32 /* inputs of x that share a scale */
#define FEW_COLS 960 /* columns that a thread takes at once, of a few rows: long streams in the order of memory */
#define FEW_TILE 4 /* rows that are multiplied at once, likewise */
#define AHEAD 1024 /* bytes of codes, behind those that are read, to ask for */
#define LINE 64 /* bytes */

/* Rows in whole numbers: x = integers * scale. */
typedef struct {
    int16_t *integers; /* of a few rows [rows, padded_in]; int8_t beside codes of 4 bits; of many see quantized_whole.c */
    float *scale;      /* [rows, padded_in / X_BLOCK] */
    int32_t *zero;     /* the same: the sum of whole numbers times the zero of plain codes of 4 bits */
    float *sum;        /* [rows, sums_stride] of x: inputs' [k, k + block_of(x)) from k / SEGMENT on, as in `factors` */
    int64_t num_rows, num_tiles, padded_in, sums_stride;
    int few, bits;
} whole;

/* Factors of the 8 weight rows from `row` on, a lane each, of inputs [k, k + size): those of input k + i stand at
 * scale[(i >> shift) * stride], and so do offsets where the weight has zeros or offsets. Rows behind the last count as it. */
void octavo_quantized_columns(float *scale, float *offset, int64_t stride, const quantized *w, int64_t row, int64_t k,
                              int64_t size);

/* sums[r * FEW_COLS + c] = x[r] . w[col + c] for codes of 4 bits, all rows of x, and num_cols columns up to the next
 * multiple of NIBBLE_ROWS; col is such a multiple. */
void octavo_few_nibbles(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols);

/* Element j of v[i] to element i of v[j]. */
INLINE void transpose(v8 v[8]) {
    v8 a[8], b[8];
    UNROLL for (int i = 0; i < 4; i++) {
        a[i] = (v8)_mm256_unpacklo_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
        a[4 + i] = (v8)_mm256_unpackhi_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* columns i % 2 of 4 rows, then those behind */
        v8 low = a[i / 2 * 4 + i % 2 * 2], high = a[i / 2 * 4 + i % 2 * 2 + 1];
        b[2 * i] = (v8)_mm256_unpacklo_pd((__m256d)low, (__m256d)high);
        b[2 * i + 1] = (v8)_mm256_unpackhi_pd((__m256d)low, (__m256d)high);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        v8 low = b[i / 2 * 4 + i % 2], high = b[i / 2 * 4 + 2 + i % 2];
        v[i] = (v8)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x20);
        v[4 + i] = (v8)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x31);
    }
}

/* Eight factors as floats, or each of four twice. */
INLINE v8 load_eight(const void *base, int64_t element, int dtype, int twice) {
    v8 x;
    if (dtype == F32) {
        const float *from = (const float *)base + element;
        x = twice ? (v8)_mm256_castps128_ps256(_mm_loadu_ps(from)) : (v8)_mm256_loadu_ps(from);
    } else {
        if (dtype == INT8) /* beside superblocks, where nothing stands twice */
            return (v8)_mm256_cvtepi32_ps(
                _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)base + element))));
        const __m128i *from = (const __m128i *)((const uint16_t *)base + element);
        __m128i half = twice ? _mm_loadl_epi64(from) : _mm_loadu_si128(from);
        x = (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#ifdef __F16C__
        if (dtype == F16) x = (v8)_mm256_cvtph_ps(half);
#endif
    }
    return twice ? SHUFFLE(x, x, 0, 0, 1, 1, 2, 2, 3, 3) : x;
}

/* Whether `load_eight` knows the factors' dtypes. */
#ifdef __F16C__
#define HAS_HALVES 1
#else
#define HAS_HALVES 0
#endif
INLINE int can_load_eight(const quantized *w) {
    return HAS_HALVES || (w->scale_dtype != F16 && !(w->offsets && w->offset_dtype == F16));
}

/* sum += code * x of four, as two of 16 bits. GCC left alone makes many products before it adds them, and moves them to
 * memory. */
INLINE void add_fours(__m256i *sum, __m256i code, __m256i x) {
    __m256i product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(code), "x"(x));
}
#endif
#endif
