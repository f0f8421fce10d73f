/* Rows of x and of weights of bfloat16, rounded to whole numbers of 16 bits: what linear_whole.c multiplies. */
#ifndef OCTAVO_WHOLE_NUMBERS_H
#define OCTAVO_WHOLE_NUMBERS_H

#include <math.h>

#include "vector.h"

#define GROUP 64 /* inputs that share a power of two */
#define BLOCK_K 512 /* inputs; a multiple of GROUP */
#define PANEL 16 /* columns */
#define X_BITS 13 /* together they make 31 */
#define W_SUM_BITS 18

/* Eight at a time, whatever VL is: what is laid out is of 16 bits, and not much of the time goes here. */
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h8_mem __attribute__((vector_size(16), aligned(2), may_alias));

/* The power of two that numbers below 2^(exponent + 1) are multiplied by to be below 2^bits: its bits, for both ways. */
INLINE i8 power_up(i8 exponent, int bits) {
    i8 power = bits - 1 - exponent;
    i8 most = power > 126;
    return (most & 126) | (~most & power);
}
INLINE v8 two_to(i8 power) { return (v8)((power + 127) << 23); }
INLINE i8 exponent_of(v8 x) { return (((i8)x >> 23) & 255) - 127; }

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
        i8 power = power_up((i8){0} + ((largest >> 7) - 127), X_BITS);
        v8 up = two_to(power), down = two_to(-power);
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
    v8 sums[8];
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
        sums[c] = (v8)sum;
        tops[c] = largest_bits(top);
    }
    i8 top;
    memcpy(&top, tops, sizeof top);
    /* Rounded up, as are the numbers: by half each at most, which is GROUP / 2 of 2^W_SUM_BITS. */
    v8 sum = sum_eight(sums) * 1.001f;
    i8 by_sum = power_up(exponent_of(sum), W_SUM_BITS);
    i8 by_top = power_up((top >> 7) - 127, 15);
    i8 less = by_sum < by_top, power = (less & by_sum) | (~less & by_top);
    i8 finite = (top < 0x7f80) & (sum < INFINITY);
    i8 down = ((finite & (i8)two_to(-power)) | (~finite & 0x7fc00000)) >> 16; /* a power of two is exact, or NaN */
    *(h8_mem *)scales = __builtin_convertvector(down, h8);
    v8 up = (v8)(finite & (i8)two_to(power)); /* what comes of NaN times it is multiplied by NaN again */
    for (int i = 0; i < GROUP / 16; i++) {
        __m256i x[8];
        UNROLL for (int c = 0; c < 8; c++)
            x[c] = round_pairs(_mm256_loadu_si256((const __m256i *)(w[c] + 16 * i)), _mm256_set1_ps(up[c]));
        transpose(x);
        UNROLL for (int j = 0; j < 8; j++) _mm256_storeu_si256((__m256i *)(pairs + (8 * i + j) * PANEL), x[j]);
    }
}

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

#endif
