/* Weights of 4 or 8 bits as floats of 16 bits, some rows at a time: see linear_widened.py. Each is rounded once, from
 * fma(code, scale, offset), which is what quantized.c multiplies by. */
#include "quantized.h"

/* Codes j .. j + VL - 1 of PAD of a row, which begin at `block`: for where they stand see quantized.c. */
INLINE vf load_codes(const uint8_t *block, int j, int bits) {
    if (bits == 8) return load(block, j, INT8);
    uint32_t words[VL / 4];
    UNROLL for (int n = 0; n < VL / 4; n++) {
        memcpy(words + n, block + 4 * NIBBLE_ROWS * (j % 32 / 4 + n), sizeof *words);
        words[n] = words[n] >> (j / 32 * 4) & 0x0f0f0f0f;
    }
    return load(words, 0, INT8);
}

/* Weight row `row` to out[to..]. */
INLINE void widen_row(void *out, int64_t to, const quantized *w, int64_t row, int64_t in_features, int bits, int dtype) {
    factors f;
    for (int64_t k = 0; k < in_features; k += BLOCK_K) {
        int64_t rest = min64(BLOCK_K, in_features - k);
        const uint8_t *codes = codes_of((uint8_t *)w->codes, row, w->padded_in, bits) + codes_between(k, bits);
        load_factors(&f, w, row, k, min64(BLOCK_K, w->padded_in - k), bits);
        for (int64_t i = 0; i < rest; i += PAD) {
            int is_whole = i + PAD <= rest;
            UNROLL for (int j = 0; j < PAD; j += VL) {
                int64_t at = (i + j) >> w->shift;
                vf scale = splat(f.scale[bits == 4 ? 4 * at : at]);
                vf x = fma_f(load_codes(codes + codes_between(i, bits), j, bits), scale, splat(f.offset[at]));
                if (is_whole)
                    store(out, to + k + i + j, x, dtype);
                else if (i + j < rest)
                    store_upto(out, to + k + i + j, x, rest - i - j, dtype);
            }
        }
    }
}

/* out: [num_rows, in_features] of `dtype`, BF16 or F16: of the weight's rows, those from `first` on. */
void octavo_widen(const weight *from, int64_t first, int64_t num_rows, void *out, int dtype, int num_threads) {
    int64_t in = from->in_features;
    int bits = from->bits;
    quantized w = describe(from);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t r = 0; r < num_rows; r++) {
        if (bits == 4 && dtype == BF16) widen_row(out, r * in, &w, first + r, in, 4, BF16);
        if (bits == 4 && dtype == F16) widen_row(out, r * in, &w, first + r, in, 4, F16);
        if (bits == 8 && dtype == BF16) widen_row(out, r * in, &w, first + r, in, 8, BF16);
        if (bits == 8 && dtype == F16) widen_row(out, r * in, &w, first + r, in, 8, F16);
    }
}
