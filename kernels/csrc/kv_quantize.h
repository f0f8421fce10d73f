/* A row of a quantised KV cache: head_dim codes of one byte, then their float32 scale: see kv_quantization.py.
 *
 * A row's bytes depend on its own numbers alone. A number that is not finite makes the scale NaN, and with it all that
 * is computed from the row: nothing wrong is ever read as a number.
 */
#ifndef OCTAVO_KV_QUANTIZE_H
#define OCTAVO_KV_QUANTIZE_H

#include <math.h>

#include "vector.h"

#define SCALE_BYTES 4
#define SMALLEST_SCALE 0x1p-100f /* keeps the division below exact; numbers as small as that are zeros */

INLINE int is_quantized(int dtype) { return dtype == INT8 || dtype == FP8; }

/* Bytes of one head of one token. */
INLINE int64_t row_bytes(int64_t dim, int dtype) {
    return is_quantized(dtype) ? dim + SCALE_BYTES : dim * size_of(dtype);
}

INLINE vi round_int8(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, ties to even, in the low bits */
    return (vi)(x + magic) - (vi)magic;
}

/* |x| <= 448 and a little: rounds to nearest, ties to even. */
INLINE vi round_fp8(vf x) {
    vi sign = (vi)(((vu)x >> 24) & 0x80);
    vf y = (vf)((vi)x & 0x7fffffff);
    vi normal = (vi)(((vu)y + 0x7ffff + (((vu)y >> 20) & 1)) >> 20) - (120 << 3);
    vi subnormal = (vi)(y + 16384.0f) - (vi)splat(16384.0f); /* in steps of 2^-9 */
    vi small = y < 0x1p-6f;
    return ((small & subnormal) | (~small & normal)) | sign;
}

INLINE void quantize_row(void *to, const void *x, int64_t element, int64_t dim, int x_dtype, int dtype) {
    int8_t *codes = to;
    vi most = {0}; /* the bits of absolute values are ordered as these are, NaN above all */
    for (int64_t d = 0; d < dim; d += VL) {
        vi bits = (vi)load_upto(x, element + d, dim - d, x_dtype) & 0x7fffffff;
        vi more = bits > most;
        most = (more & bits) | (~more & most);
    }
    int32_t top = 0;
    for (int i = 0; i < VL; i++) top = most[i] > top ? most[i] : top;
    float largest, scale;
    memcpy(&largest, &top, sizeof largest);
    scale = largest / (dtype == INT8 ? 127.0f : 448.0f);
    if (scale < SMALLEST_SCALE) scale = SMALLEST_SCALE;
    if (top >= 0x7f800000) {
        scale = NAN;
        memset(codes, 0, dim);
    } else {
        for (int64_t d = 0; d < dim; d += VL) {
            vf y = load_upto(x, element + d, dim - d, x_dtype) / scale;
            vi code = dtype == INT8 ? round_int8(y) : round_fp8(y);
            vb bytes = __builtin_convertvector(code, vb);
            memcpy(codes + d, &bytes, min64(VL, dim - d));
        }
    }
    memcpy(codes + dim, &scale, sizeof scale);
}

/* One head of one token to its place in a cache of any dtype; element counts x's numbers. */
INLINE void write_row(void *to, const void *x, int64_t element, int64_t dim, int x_dtype, int dtype) {
    if (dtype == x_dtype) {
        memcpy(to, at(x, element, x_dtype), dim * size_of(dtype));
    } else if (is_quantized(dtype)) {
        quantize_row(to, x, element, dim, x_dtype, dtype);
    } else {
        for (int64_t d = 0; d < dim; d += VL)
            store_upto(to, d, load_upto(x, element + d, dim - d, x_dtype), dim - d, dtype);
    }
}

/* write_row with both dtypes as constants. */
INLINE void write_row_of(void *to, const void *x, int64_t element, int64_t dim, int x_dtype, int dtype) {
#define WRITE(X) \
    switch (dtype) { \
    case F32: write_row(to, x, element, dim, X, F32); break; \
    case BF16: write_row(to, x, element, dim, X, BF16); break; \
    case F16: write_row(to, x, element, dim, X, F16); break; \
    case INT8: write_row(to, x, element, dim, X, INT8); break; \
    default: write_row(to, x, element, dim, X, FP8); break; \
    }
    if (x_dtype == F32) {
        WRITE(F32);
    } else if (x_dtype == BF16) {
        WRITE(BF16);
    } else {
        WRITE(F16);
    }
#undef WRITE
}

#endif
