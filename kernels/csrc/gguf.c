/* ggml's blocks to codes and factors as quantized_weight.py lays them out, or to numbers: see gguf_blocks.py.
 *
 * Source: `dequantize_row_*` in ggml-quants.c and the block structures in ggml-common.h of ggml-org/ggml. Each product
 * and sum is rounded by itself, as there.
 */
#include "quantized.h"

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 }; /* enum ggml_type */

#define MAX_BLOCK 256
#define MAX_GROUPS 16

typedef struct {
    int8_t codes[MAX_BLOCK]; /* less their zero, where there is no offset: code * scale, or code * scale + offset */
    float scales[MAX_GROUPS], offsets[MAX_GROUPS];
    int8_t whole_scales[MAX_GROUPS], whole_mins[MAX_GROUPS]; /* of K types: times factors of the block, those above */
} decoded;

/* Eight scales and minima of 6 bits from 12 bytes: the last four have their high bits in the first eight. */
INLINE void scales_and_mins(const uint8_t *p, float d, float dmin, decoded *to) {
    for (int i = 0; i < 8; i++) {
        int scale = i < 4 ? p[i] & 63 : (p[i + 4] & 15) | (p[i - 4] >> 6 << 4);
        int min = i < 4 ? p[i + 4] & 63 : (p[i + 4] >> 4) | (p[i] >> 6 << 4);
        to->whole_scales[i] = (int8_t)scale;
        to->whole_mins[i] = (int8_t)min;
        to->scales[i] = d * (float)scale;
        to->offsets[i] = -(dmin * (float)min);
    }
}

INLINE void decode_block(const uint8_t *p, int kind, decoded *to) {
    switch (kind) {
    case Q8_0:
        to->scales[0] = widen_half(p);
        memcpy(to->codes, p + 2, 32);
        break;
    case Q4_0:
    case Q4_1: {
        const uint8_t *q = p + (kind == Q4_0 ? 2 : 4);
        to->scales[0] = widen_half(p);
        if (kind == Q4_1) to->offsets[0] = widen_half(p + 2);
        int zero = kind == Q4_0 ? 8 : 0;
        for (int i = 0; i < 16; i++) {
            to->codes[i] = (int8_t)((q[i] & 15) - zero);
            to->codes[16 + i] = (int8_t)((q[i] >> 4) - zero);
        }
        break;
    }
    case Q5_0:
    case Q5_1: {
        const uint8_t *h = p + (kind == Q5_0 ? 2 : 4), *q = h + 4;
        to->scales[0] = widen_half(p);
        if (kind == Q5_1) to->offsets[0] = widen_half(p + 2);
        int zero = kind == Q5_0 ? 16 : 0;
        uint32_t high;
        memcpy(&high, h, sizeof high);
        for (int i = 0; i < 16; i++) {
            to->codes[i] = (int8_t)(((q[i] & 15) | (high >> i & 1) << 4) - zero);
            to->codes[16 + i] = (int8_t)(((q[i] >> 4) | (high >> (16 + i) & 1) << 4) - zero);
        }
        break;
    }
    case Q4_K:
    case Q5_K: {
        scales_and_mins(p + 4, widen_half(p), widen_half(p + 2), to);
        const uint8_t *h = p + 16, *q = p + (kind == Q4_K ? 16 : 48);
        for (int g = 0; g < 8; g++)
            for (int i = 0; i < 32; i++) {
                int low = q[g / 2 * 32 + i] >> g % 2 * 4 & 15;
                to->codes[g * 32 + i] = (int8_t)(kind == Q4_K ? low : low | (h[i] >> g & 1) << 4);
            }
        break;
    }
    default: { /* Q6_K: low halves of 128 elements in 64 bytes, upper two bits of them in 32 */
        const uint8_t *low = p, *high = p + 128;
        float d = widen_half(p + 208);
        memcpy(to->whole_scales, p + 192, 16);
        for (int i = 0; i < 16; i++) to->scales[i] = d * (float)to->whole_scales[i];
        for (int n = 0; n < 2; n++)
            for (int g = 0; g < 4; g++)
                for (int i = 0; i < 32; i++) {
                    int q = low[n * 64 + g % 2 * 32 + i] >> g / 2 * 4 & 15;
                    to->codes[n * 128 + g * 32 + i] = (int8_t)((q | (high[n * 32 + i] >> 2 * g & 3) << 4) - 32);
                }
    }
    }
}

typedef struct {
    int64_t size, bytes, groups; /* of a block */
    int bits, has_offsets, superblock_at; /* byte of a K type's float16 factors; -1: factors are float16, at byte 0 */
} layout;

static layout layout_of(int kind) {
    switch (kind) {
    case Q4_0: return (layout){32, 18, 1, 4, 0, -1};
    case Q4_1: return (layout){32, 20, 1, 4, 1, -1};
    case Q5_0: return (layout){32, 22, 1, 8, 0, -1};
    case Q5_1: return (layout){32, 24, 1, 8, 1, -1};
    case Q8_0: return (layout){32, 34, 1, 8, 0, -1};
    case Q4_K: return (layout){256, 144, 8, 4, 1, 0};
    case Q5_K: return (layout){256, 176, 8, 8, 1, 0};
    default: return (layout){256, 210, 16, 8, 0, 208};
    }
}

/* 32 codes of 4 bits, from input `at` on, a multiple of 32, into a row that is zeros: see quantized.c for where they stand. */
INLINE void pack_nibbles(uint8_t *row, int64_t at, const int8_t *codes, int zero) {
    uint8_t *to = row + codes_between(at / PAD * PAD, 4);
    for (int i = 0; i < 32; i++)
        to[i / 4 * 4 * NIBBLE_ROWS + i % 4] |= (uint8_t)(codes[i] + zero) << (at % PAD ? 4 : 0);
}

/* rows: [num_rows, num_blocks, bytes of a block]; codes: zeros, for rows of padded_in inputs; scales and offsets: [num_rows,
 * groups of a row], float16; of K types whole numbers (see `whole_factor`), times `superblocks` [num_rows, num_blocks, 1 or 2] of float16. */
void octavo_gguf_pack(int kind, const uint8_t *rows, int64_t num_rows, int64_t num_blocks, uint8_t *codes,
                      int64_t padded_in, void *scales, void *offsets, uint16_t *superblocks, int num_threads) {
    layout l = layout_of(kind);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < num_rows; row++) {
        uint8_t *to = codes_of(codes, row, padded_in, l.bits);
        for (int64_t b = 0; b < num_blocks; b++) {
            decoded d;
            const uint8_t *block = rows + (row * num_blocks + b) * l.bytes;
            switch (kind) { /* constants, so that the loops are unrolled */
#define DECODE(K) case K: decode_block(block, K, &d); break
            DECODE(Q4_0);
            DECODE(Q4_1);
            DECODE(Q5_0);
            DECODE(Q5_1);
            DECODE(Q8_0);
            DECODE(Q4_K);
            DECODE(Q5_K);
            default: decode_block(block, Q6_K, &d);
            }
            if (l.bits == 4)
                for (int64_t i = 0; i < l.size; i += 32)
                    pack_nibbles(to, b * l.size + i, d.codes + i, l.has_offsets ? 0 : 8);
            else
                memcpy(to + b * l.size, d.codes, l.size);
            int64_t at = (row * num_blocks + b) * l.groups;
            int64_t num_scales = 1 + l.has_offsets;
            if (l.superblock_at < 0) {
                memcpy((uint16_t *)scales + at, block, 2);
                if (l.has_offsets) memcpy((uint16_t *)offsets + at, block + 2, 2);
            } else {
                for (int64_t g = 0; g < l.groups; g++) {
                    int64_t to_factor = whole_factor(row, b * l.groups + g, num_blocks * l.groups, l.bits);
                    ((int8_t *)scales)[to_factor] = d.whole_scales[g];
                    if (l.has_offsets) ((int8_t *)offsets)[to_factor] = d.whole_mins[g];
                }
                memcpy(superblocks + (row * num_blocks + b) * num_scales, block + l.superblock_at, 2 * num_scales);
            }
        }
    }
}

/* blocks: [num_blocks, bytes of a block] to out: [num_blocks, size of a block] of any of the three float types. */
void octavo_gguf_decode(int kind, const uint8_t *blocks, int64_t num_blocks, void *out, int dtype, int num_threads) {
    layout l = layout_of(kind);
    int64_t group = l.size / l.groups;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_blocks > 1024)
    for (int64_t b = 0; b < num_blocks; b++) {
        decoded d;
        const uint8_t *block = blocks + b * l.bytes;
        switch (kind) {
        DECODE(Q4_0);
        DECODE(Q4_1);
        DECODE(Q5_0);
        DECODE(Q5_1);
        DECODE(Q8_0);
        DECODE(Q4_K);
        DECODE(Q5_K);
        default: decode_block(block, Q6_K, &d);
        }
        for (int64_t i = 0; i < l.size; i += VL) {
            vf y = load(d.codes, i, INT8) * d.scales[i / group];
            if (l.has_offsets) y = y + d.offsets[i / group];
            if (dtype == F32) store(out, b * l.size + i, y, F32);
            if (dtype == BF16) store(out, b * l.size + i, y, BF16);
            if (dtype == F16) store(out, b * l.size + i, y, F16);
        }
    }
}
