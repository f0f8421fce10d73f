/* Vectors of float32 in GCC's and Clang's portable extension, and loads and stores of the three storage types.
 *
 * Which sums are made in which order, and which products are fused into them, is written out, and the compiler is told
 * to change neither (-ffp-contract=off): so a result depends on its inputs alone, not on which loop it came out of.
 */
#ifndef OCTAVO_VECTOR_H
#define OCTAVO_VECTOR_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define VL 16 /* lanes of a vector */
#else
#define VL 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef int8_t vb __attribute__((vector_size(VL)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
/* As they lie in memory: no more aligned than their elements. */
typedef float vf_mem __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef int8_t vb_mem __attribute__((vector_size(VL), aligned(1), may_alias));
typedef float v4_mem __attribute__((vector_size(16), aligned(4), may_alias));

/* As in cpu_build.py and kv_quantization.py. FP8 is e4m3 and is loaded as 2^-8 of its value: see load. */
enum { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, FP8 = 4 };

INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : dtype == INT8 || dtype == FP8 ? 1 : 2; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n) { return (n + VL - 1) / VL * VL; }
INLINE const void *at(const void *base, int64_t element, int dtype) {
    return (const char *)base + element * size_of(dtype);
}

INLINE vf select_f(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf max_f(vf a, vf b) { return select_f(a > b, a, b); }
INLINE vf splat(float x) { return x - (vf){0}; }

/* Elements of two vectors, by their numbers, as a vector of the same type; and halves. GCC has Clang's name for it from
 * 12 on. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
INLINE v4 low_four(v8 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
INLINE v4 high_four(v8 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
#else
#define SHUFFLE(a, b, ...) \
    ({ \
        typedef int32_t numbers __attribute__((vector_size(sizeof(a)))); \
        __builtin_shuffle(a, b, (numbers){__VA_ARGS__}); \
    })
INLINE v4 low_four(v8 x) {
    v4 part;
    memcpy(&part, &x, sizeof part);
    return part;
}
INLINE v4 high_four(v8 x) {
    v4 part;
    memcpy(&part, (const char *)&x + sizeof part, sizeof part);
    return part;
}
#endif

/* Keeps x in a register: GCC would rather load it again for each of its uses. */
#ifdef __AVX512F__
#define KEEP(x) __asm__("" : "+v"(x))
#elif defined(__AVX__)
#define KEEP(x) __asm__("" : "+x"(x))
#else
#define KEEP(x) (void)(x)
#endif

/* a * b + c, rounded once where the CPU can do that. */
INLINE vf fma_f(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    UNROLL for (int i = 0; i < VL; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

/* float16 as bits, to and from float32, where neither CPU nor compiler has it: _Float16 is GCC 12's and Clang 15's on x86.
 */
INLINE vf widen_halves(vu bits) {
    vu rest = (bits & 0x7fff) << 13;
    vu special = (vu)(rest >= 31u << 23) & (255u << 23); /* infinite, or no number */
    return (vf)((vu)((vf)rest * 0x1p112f) | special | (bits & 0x8000) << 16);
}
INLINE vu narrow_to_halves(vf x) { /* to nearest, ties to even */
    vu bits = (vu)x & 0x7fffffff, is_large = (vu)((vf)bits >= 65536.0f), is_small = (vu)((vf)bits < 0x1p-14f);
    vu normal = ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112 << 10);
    vu small = (vu)((vf)bits + 0.5f) - (vu)splat(0.5f); /* in steps of 2^-24 */
    vu nan = (vu)(x != x) & (0x200 | ((bits >> 13) & 0x3ff));
    vu half = (is_large & 0x7c00) | (is_small & small) | (~(is_large | is_small | (vu)(x != x)) & normal);
    return half | nan | ((vu)(x != x) & 0x7c00) | ((vu)x >> 16 & 0x8000);
}

/* An e4m3 number's bits, moved to where float16 has them, are that number times 2^-8, subnormal ones too. */
INLINE vf load_byte(const int8_t *p, int dtype) {
#if defined(__AVX2__) && VL == 8
    __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
    if (dtype == INT8) return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#if defined(__F16C__)
    __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7); /* the sign is in bits 15 and 14 */
    return (vf)_mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16((int16_t)0xbfff)));
#endif
#elif VL == 16
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    if (dtype == INT8) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#if defined(__F16C__)
    __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((int16_t)0xbfff)));
#endif
#endif
    vi code = __builtin_convertvector((vb)(*(const vb_mem *)p), vi);
    if (dtype == INT8) return __builtin_convertvector(code, vf);
    return (vf)(((code & 0x7f) << 20) | (code & INT32_MIN)) * 0x1p112f;
}

/* c = a * b + c, as fma_f. In loops whose sums fill the registers GCC may overwrite a or b instead and move c to memory. */
#if defined(__AVX512F__)
#define ADD_PRODUCT(c, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b))
#elif defined(__FMA__)
#define ADD_PRODUCT(c, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b))
#else
#define ADD_PRODUCT(c, a, b) ((c) = fma_f(a, b, c))
#endif

INLINE vf load(const void *base, int64_t element, int dtype) {
    if (dtype == F32) return *(const vf_mem *)((const float *)base + element);
    if (dtype == INT8 || dtype == FP8) return load_byte((const int8_t *)base + element, dtype);
    const uint16_t *p = (const uint16_t *)base + element;
#if defined(__AVX2__) && VL == 8 /* for the general form below GCC 12 emits five instructions, not two */
    if (dtype == BF16) return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#endif
    if (dtype == BF16) return (vf)(__builtin_convertvector((vh)(*(const vh_mem *)p), vu) << 16);
#if defined(__F16C__) && VL == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__F16C__) && VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif !defined(__FLT16_MAX__)
    return widen_halves(__builtin_convertvector((vh)(*(const vh_mem *)p), vu));
#else
    _Float16 half[VL];
    memcpy(half, p, sizeof half);
    vf x;
    for (int i = 0; i < VL; i++) x[i] = (float)half[i];
    return x;
#endif
}

/* A float16 that need not be aligned. */
INLINE float widen_half(const void *p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#elif defined(__FLT16_MAX__)
    _Float16 x;
    memcpy(&x, &bits, sizeof x);
    return (float)x;
#else
    return widen_halves((vu){bits})[0];
#endif
}

/* Rounds to nearest, ties to even; a NaN stays one. */
INLINE void store(void *base, int64_t element, vf x, int dtype) {
    if (dtype == F32) {
        *(vf_mem *)((float *)base + element) = x;
        return;
    }
    uint16_t *p = (uint16_t *)base + element;
    if (dtype == BF16) {
        vu bits = (vu)x;
        vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        vu quiet = (bits >> 16) | 0x40;
        vu nan = (vu)(x != x);
        *(vh_mem *)p = __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
        return;
    }
#if defined(__F16C__) && VL == 8
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && VL == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif !defined(__FLT16_MAX__)
    *(vh_mem *)p = __builtin_convertvector(narrow_to_halves(x), vh);
#else
    _Float16 half[VL];
    for (int i = 0; i < VL; i++) half[i] = (_Float16)x[i];
    memcpy(p, half, sizeof half);
#endif
}

/* The first n < VL elements; the other lanes are zero. */
INLINE vf load_some(const void *base, int64_t element, int64_t n, int dtype) {
    char buffer[4 * VL] = {0};
    memcpy(buffer, at(base, element, dtype), n * size_of(dtype));
    return load(buffer, 0, dtype);
}

INLINE void store_some(void *base, int64_t element, vf x, int64_t n, int dtype) {
    char buffer[4 * VL];
    store(buffer, 0, x, dtype);
    memcpy((char *)base + element * size_of(dtype), buffer, n * size_of(dtype));
}

INLINE vf load_upto(const void *base, int64_t element, int64_t n, int dtype) {
    return n >= VL ? load(base, element, dtype) : load_some(base, element, n, dtype);
}

INLINE void store_upto(void *base, int64_t element, vf x, int64_t n, int dtype) {
    if (n >= VL)
        store(base, element, x, dtype);
    else
        store_some(base, element, x, n, dtype);
}

/* n elements to float32, with zeros up to the next multiple of VL. */
INLINE void widen(float *to, const void *from, int64_t n, int dtype) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to, i, load(from, i, dtype), F32);
    if (i < n) store(to, i, load_some(from, i, n - i, dtype), F32);
}

/* Lanes of a 16-lane vector folded onto 8; the identity where VL is 8. */
INLINE v8 fold(vf x) {
#if VL == 16
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    v8 halves[2];
    memcpy(halves, &x, sizeof halves);
    return halves[0] + halves[1];
#endif
#else
    return x;
#endif
}

INLINE v8 add_pairs(v8 a, v8 b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

/* Sums of the lanes of eight vectors; each is associated alike: ((0+1)+(2+3)) + ((4+5)+(6+7)). */
INLINE v8 sum_eight(const v8 x[8]) {
    v8 a = add_pairs(add_pairs(x[0], x[1]), add_pairs(x[2], x[3]));
    v8 b = add_pairs(add_pairs(x[4], x[5]), add_pairs(x[6], x[7]));
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE v8 sum_each(const vf x[8]) {
    v8 folded[8];
    UNROLL for (int i = 0; i < 8; i++) folded[i] = fold(x[i]);
    return sum_eight(folded);
}

/* Sums of the lanes of four vectors, associated as in sum_each. */
INLINE v4 sum_four(const vf x[4]) {
    v8 a = add_pairs(add_pairs(fold(x[0]), fold(x[1])), add_pairs(fold(x[2]), fold(x[3])));
    return low_four(a) + high_four(a);
}

/* rows * cols = 8 dot products: out[r * stride + c] = x[r] . y[c] over dim, a multiple of VL. Each is summed in VL lanes
 * and then by one tree, whatever rows and cols are. */
INLINE void dot_block(float *out, int64_t stride, const float *x, const void *const *y, int64_t dim, int rows, int cols,
                      int dtype) {
    vf acc[8] = {{0}};
    for (int64_t d = 0; d < dim; d += VL) {
        vf a[8];
        UNROLL for (int r = 0; r < rows; r++) {
            a[r] = load(x, r * dim + d, F32);
            KEEP(a[r]);
        }
        UNROLL for (int c = 0; c < cols; c++) {
            vf b = load(y[c], d, dtype);
            KEEP(b);
            UNROLL for (int r = 0; r < rows; r++) acc[r * cols + c] = fma_f(a[r], b, acc[r * cols + c]);
        }
    }
    v8 sums = sum_each(acc);
    float result[8];
    memcpy(result, &sums, sizeof result);
    for (int r = 0; r < rows; r++) memcpy(out + r * stride, result + r * cols, cols * sizeof *out);
}

INLINE float sum_lanes(vf x) {
    v8 a = fold(x);
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
}

INLINE float max_lanes(vf x) {
    float m = x[0];
    UNROLL for (int i = 1; i < VL; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* e^x within 2 ulp for -87.3 <= x <= 88; exactly 1 at 0, exactly 0 below -87.3 (and at -inf). NaN stays NaN.
 * Source: Cephes expf (Moshier). */
INLINE vf exp_f(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, held in the low bits */
    vi tiny = x < -87.3f;
    vf clamped = select_f(x > 88.0f, splat(88.0f), x);
    vf shifted = fma_f(clamped, splat(1.44269504088896341f), magic);
    vf n = shifted - magic;
    vf r = fma_f(n, splat(-0.693359375f), clamped);
    r = fma_f(n, splat(2.12194440e-4f), r);
    vf y = splat(1.9875691500e-4f);
    y = fma_f(y, r, splat(1.3981999507e-3f));
    y = fma_f(y, r, splat(8.3334519073e-3f));
    y = fma_f(y, r, splat(4.1665795894e-2f));
    y = fma_f(y, r, splat(1.6666665459e-1f));
    y = fma_f(y, r, splat(5.0000001201e-1f));
    y = fma_f(y, r * r, r) + 1.0f;
    vi scale = ((vi)shifted << 23) + (127 << 23);
    vf result = y * (vf)scale;
    return (vf)(~tiny & (vi)result);
}

/* tanh x within 2 ulp. Source: Cephes tanhf (Moshier). */
INLINE vf tanh_f(vf x) {
    vf z = x * x;
    vf y = splat(-5.70498872745e-3f);
    y = fma_f(y, z, splat(2.06390887954e-2f));
    y = fma_f(y, z, splat(-5.37397155531e-2f));
    y = fma_f(y, z, splat(1.33314422036e-1f));
    y = fma_f(y, z, splat(-3.33332819422e-1f));
    vf small = fma_f(y * z, x, x);
    vf magnitude = (vf)((vi)x & 0x7fffffff);
    vf large = 1.0f - 2.0f / (exp_f(magnitude + magnitude) + 1.0f);
    large = (vf)((vi)large | ((vi)x & (vi)splat(-0.0f)));
    return select_f(magnitude < 0.625f, small, large);
}

#endif
