/* Weights of 4 or 8 bits times x in whole numbers: the quick way of quantized.c, for x of 16-bit floats.
 *
 * x is rounded to whole numbers with a scale for each X_BLOCK inputs, and multiplied by codes exactly. Beside codes of 8
 * bits it has 16 and its scale is a power of two: one instruction for 16 products, where floats take two. Beside codes of
 * 4 bits, whose own rounding is a hundred times coarser, it has 8: one for 32, and sums of 16 bits hold those of a whole
 * X_BLOCK. Sums over X_BLOCK inputs, or SEGMENT where groups are as small, become floats, and are multiplied by both scales.
 *
 * A few rows wait for memory and for codes to be unpacked, which is done in registers; the lanes of a vector are inputs,
 * or columns with codes of 4 bits (quantized_nibbles.c). For more rows codes are unpacked once, into a panel in the L1
 * cache, by which all tiles are multiplied. There lanes are columns, so that products of a whole segment become one float,
 * and as many inputs as a word of 32 bits holds lie beside each other, pairs of 16 bits, or four of 8 bits:
 *
 *   x [in / PANEL_K][tiles][words of PANEL_K][rows of the tile]
 *   w [words of PANEL_K][PANEL_COLS]
 *
 * An output's bits depend on its own row and column, and on whether there are a few rows or many.
 */
#include "quantized_whole.h"
#include "work_queue.h"

#ifdef __AVX2__
#define COLS 4 /* at most, multiplied at once, for a few rows */
#define FEW_PARTS 4 /* of a thread's columns, or more: enough for it to find more when another is held up */
#define PANEL_COLS 16
#define PANEL_K 512 /* inputs of a panel, which is half an L1 cache; divides BLOCK_K */
#define MAX_ROWS 96 /* that a thread takes at once */

/* Inputs whose factors are taken at once. */
INLINE int64_t block_of(const whole *x) { return x->few ? BLOCK_K : PANEL_K; }

/* X_BLOCK numbers to whole ones times the scale that is returned; NaN where one is not finite. With 16 bits they are
 * below 2^15 and the scale is a power of two; with 8 bits the largest becomes 127. */
INLINE float round_block(int16_t *integers, const float *x, int bits) {
    float largest = 0.0f, up, scale, most[8];
    __m256 all = _mm256_setzero_ps(), outside = all, sign = _mm256_set1_ps(-0.0f);
    for (int j = 0; j < X_BLOCK; j += 8) {
        __m256 magnitude = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + j));
        all = _mm256_max_ps(all, magnitude);
        outside = _mm256_or_ps(outside, _mm256_cmp_ps(magnitude, _mm256_set1_ps(3.4e38f), _CMP_NLE_UQ));
    }
    int finite = !_mm256_movemask_ps(outside);
    _mm256_storeu_ps(most, all);
    for (int j = 0; j < 8; j++) largest = most[j] > largest ? most[j] : largest;
    if (bits == 8) {
        largest = largest < 0x1p-119f ? 0x1p-119f : largest; /* neither number below may leave the normal ones */
        up = 127.0f / largest;
        scale = largest / 127.0f;
    } else {
        uint32_t word;
        memcpy(&word, &largest, sizeof word);
        int64_t up_by = 14 - ((int64_t)(word >> 23) - 127); /* largest * 2^up_by is from 2^14 to 2^15 */
        up_by = min64(up_by, 126);
        uint32_t up_word = (uint32_t)(up_by + 127) << 23;
        memcpy(&up, &up_word, sizeof up);
        scale = 1.0f / up;
    }
    for (int j = 0; j < X_BLOCK; j++) {
        float shifted = x[j] * up + 12582912.0f; /* 1.5 * 2^23: rounds, and leaves the number in the low bits */
        uint32_t low;
        memcpy(&low, &shifted, sizeof low);
        integers[j] = (int16_t)(low & 0xffff);
    }
    if (!finite) memset(integers, 0, X_BLOCK * sizeof *integers);
    return finite ? scale : __builtin_nanf("");
}

/* Input of the pair that stands at inputs j and j + 1. Of four codes of 8 bits in a word the even and the odd ones are pairs,
 * which a mask and a shift take out. */
INLINE int first_of_pair(int j) { return j / 4 * 4 + j % 4 / 2; }

/* Where X_BLOCK inputs from i on of row `first` + `r` go, the first rows of whose tile is `first`. */
INLINE void put_block(const whole *to, const int16_t *integers, int64_t first, int64_t r, int64_t height, int64_t i) {
    if (to->few && to->bits == 8) {
        memcpy(to->integers + (first + r) * to->padded_in + i, integers, X_BLOCK * sizeof *integers);
        return;
    }
    if (to->few) {
        int8_t *bytes = (int8_t *)to->integers + (first + r) * to->padded_in + i;
        for (int j = 0; j < X_BLOCK; j++) bytes[j] = (int8_t)integers[j];
        return;
    }
    int64_t k = i / PANEL_K * PANEL_K, dim = min64(PANEL_K, to->padded_in - k);
    if (to->bits == 4) {
        int8_t *tile = (int8_t *)to->integers + k * to->num_rows + first * dim;
        for (int j = 0; j < X_BLOCK; j++) tile[((i - k + j) / 4 * height + r) * 4 + j % 4] = (int8_t)integers[j];
        return;
    }
    int16_t *tile = to->integers + k * to->num_rows + first * dim;
    for (int j = 0; j < X_BLOCK; j += 2) {
        int16_t *pair = tile + (i - k + j) * height + 2 * r;
        pair[0] = integers[first_of_pair(j)];
        pair[1] = integers[first_of_pair(j) + 2];
    }
}

/* Rounds row `first` + `r` of a tile of `height` rows. */
INLINE void round_row(const whole *to, int64_t first, int64_t r, int64_t height, const void *from, int64_t size, int shift,
                      int dtype) {
    float *scales = to->scale + (first + r) * (to->padded_in / X_BLOCK), *sums = to->sum + (first + r) * to->sums_stride;
    int64_t block = block_of(to);
    memset(sums, 0, to->sums_stride * sizeof *sums);
    for (int64_t i = 0; i < to->padded_in; i += X_BLOCK) {
        int16_t integers[X_BLOCK];
        float x[X_BLOCK];
        for (int64_t j = 0; j < X_BLOCK; j += VL)
            store(x, j, i + j < size ? load_upto(from, (first + r) * size + i + j, size - i - j, dtype) : (vf){0}, F32);
        float scale = round_block(integers, x, to->bits == 4 ? 8 : 16);
        put_block(to, integers, first, r, height, i);
        scales[i / X_BLOCK] = scale;
        int32_t all = 0;
        for (int64_t j = 0; j < X_BLOCK; j += SEGMENT) {
            int32_t sum = 0;
            for (int n = 0; n < SEGMENT; n++) sum += integers[j + n];
            sums[i / block * block / SEGMENT + ((i % block + j) >> shift)] += (float)sum * scale;
            all += sum;
        }
        to->zero[(first + r) * (to->padded_in / X_BLOCK) + i / X_BLOCK] = 8 * all;
    }
}

static void round_tile(const whole *to, int64_t tile, const void *from, int64_t size, int shift, int dtype) {
    int64_t first = tile_start(tile, to->num_rows, to->num_tiles);
    int64_t height = tile_start(tile + 1, to->num_rows, to->num_tiles) - first;
    for (int64_t r = 0; r < height; r++) {
        if (dtype == BF16) round_row(to, first, r, height, from, size, shift, BF16);
        if (dtype == F16) round_row(to, first, r, height, from, size, shift, F16);
    }
}

INLINE __m256i multiply_add(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

INLINE v8 each_twice(v4 x) {
    v8 wide = (v8)_mm256_castps128_ps256((__m128)x);
    return SHUFFLE(wide, wide, 0, 0, 1, 1, 2, 2, 3, 3);
}

#define MAX_SEGMENTS (BLOCK_K / SEGMENT)

/* What sums of rows [row, row + rows) of x times weight rows col, col + apart, .. begin with. */
typedef struct {
    float scale[FEW_TILE * COLS][MAX_SEGMENTS]; /* of x's whole numbers times codes: [row * num_cols + column][segment] */
    v8 sums[FEW_TILE * COLS]; /* what offsets add, in lanes; and what is left of it */
    float extra[FEW_TILE * COLS];
} products;

typedef struct {
    int64_t row, col, last_col, apart, k, size;
    int rows, num_cols;
} tile;

enum { NO_OFFSETS, ZEROS, OFFSETS };

/* Where a vector's lanes are segments with factors of their own, or pairs of them: as `--quantization` and GGUF files have
 * them. */
INLINE void direct_scales(products *to, const whole *x, const quantized *w, const tile *t, int twice, int segment,
                          int scale_dtype, int kind) {
    int64_t x_stride = w->padded_in / X_BLOCK, num = t->size / segment, num_groups = w->num_groups;
    for (int r = 0; r < t->rows; r++) {
        const float *x_scales = x->scale + (t->row + r) * x_stride + t->k / X_BLOCK;
        const float *x_sums = x->sum + (t->row + r) * x->sums_stride + t->k / SEGMENT;
        for (int c = 0; c < t->num_cols; c++) {
            int64_t first = min64(t->col + c * t->apart, t->last_col) * num_groups + (t->k / segment >> twice);
            float *scale = to->scale[r * t->num_cols + c];
            v8 sum = {0};
            __builtin_prefetch(at(w->scales, first + 4 * num_groups, scale_dtype));
            for (int64_t n = 0; n < num; n += 8) {
                v8 scales = load_eight(w->scales, first + (n >> twice), scale_dtype, twice), offsets, x_scale;
                const uint16_t *superblock = scale_dtype == INT8 ? superblock_of(w, first + n) : NULL;
                if (superblock) scales *= widen_half(superblock);
                if (segment == X_BLOCK) {
                    x_scale = *(const v8_mem *)(x_scales + n);
                } else {
                    v4 four = *(const v4_mem *)(x_scales + n / 2);
                    x_scale = each_twice(four);
                }
                *(v8_mem *)(scale + n) = scales * x_scale;
                if (kind == NO_OFFSETS) continue;
                if (kind == OFFSETS) offsets = load_eight(w->offsets, first + n, w->offset_dtype, 0);
                if (kind == OFFSETS && superblock) offsets *= -widen_half(superblock + 1);
                if (kind == ZEROS) {
                    __m128i zeros = _mm_loadu_si128((const __m128i *)(w->zeros + first + n));
                    offsets = -scales * (v8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(zeros));
                }
                sum = fma8(offsets, *(const v8_mem *)(x_sums + n), sum);
            }
            to->sums[r * t->num_cols + c] = sum;
        }
    }
}

/* Any other factors. */
INLINE void other_scales(products *to, const whole *x, const quantized *w, const tile *t, int segment) {
    int64_t x_stride = w->padded_in / X_BLOCK, num = t->size / segment, num_groups = ((t->size - 1) >> w->shift) + 1;
    int spread = w->shift - (segment == X_BLOCK ? 5 : 4); /* a segment's factors stand at n >> spread */
    __m256i lane = _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm_cvtsi32_si128(spread));
    for (int c = 0; c < t->num_cols; c++) {
        factors f;
        load_factors(&f, w, min64(t->col + c * t->apart, t->last_col), t->k, t->size, 8);
        for (int r = 0; r < t->rows; r++) {
            int i = r * t->num_cols + c;
            const float *x_scales = x->scale + (t->row + r) * x_stride + t->k / X_BLOCK;
            const float *x_sums = x->sum + (t->row + r) * x->sums_stride + t->k / SEGMENT;
            int64_t n = 0, g = 0;
            for (; n + 8 <= num && segment == X_BLOCK; n += 8) {
                __m256 scales = _mm256_permutevar8x32_ps(_mm256_loadu_ps(f.scale + (n >> spread)), lane);
                *(v8_mem *)(to->scale[i] + n) = (v8)scales * *(const v8_mem *)(x_scales + n);
            }
            for (; n < num; n++) to->scale[i][n] = f.scale[n >> spread] * x_scales[n * segment / X_BLOCK];
            to->sums[i] = (v8){0};
            to->extra[i] = 0.0f;
            if (!w->zeros && !w->offsets) continue;
            for (; g + 8 <= num_groups; g += 8)
                to->sums[i] = fma8(*(const v8_mem *)(f.offset + g), *(const v8_mem *)(x_sums + g), to->sums[i]);
            for (; g < num_groups; g++) to->extra[i] += f.offset[g] * x_sums[g];
        }
    }
}

INLINE void find_scales(products *to, const whole *x, const quantized *w, const tile *t, int segment) {
    int twice = segment == X_BLOCK && w->group_size == 2 * X_BLOCK && !w->zeros && !w->offsets;
    int64_t group = segment << twice;
    int is_direct = t->size / segment % 8 == 0 && w->group_size == group && t->k + t->size <= w->num_groups * group;
    if (!is_direct || !can_load_eight(w)) {
        other_scales(to, x, w, t, segment);
        return;
    }
    memset(to->extra, 0, sizeof to->extra);
#define DIRECT(dtype, kind) \
    if (w->scale_dtype == dtype) direct_scales(to, x, w, t, kind == NO_OFFSETS && twice, segment, dtype, kind)
#define EACH_DTYPE(kind) DIRECT(F32, kind); DIRECT(BF16, kind); DIRECT(F16, kind); DIRECT(INT8, kind)
    if (w->offsets) {
        EACH_DTYPE(OFFSETS);
    } else if (w->zeros) {
        EACH_DTYPE(ZEROS);
    } else {
        EACH_DTYPE(NO_OFFSETS);
    }
}

/* Not inlined: they are called in many places, which would have fewer registers. */
#define FIND_SCALES(segment) \
    static __attribute__((noinline)) void find_scales_##segment(products *to, const whole *x, const quantized *w, \
                                                                const tile *t) { \
        find_scales(to, x, w, t, segment); \
    }
FIND_SCALES(32)
FIND_SCALES(16)

/* sums[r * FEW_COLS + c * apart] += x[row + r] . w[col + c * apart] over size inputs; of columns from col on there are
 * `cols`. */
INLINE void dot_whole(float *sums, const whole *x, int64_t row, const quantized *w, int64_t col, int64_t cols,
                      int64_t apart, int64_t k, int64_t size, int segment, int rows, int num_cols) {
    products p;
    tile t = {row, col, col + cols - 1, apart, k, size, rows, num_cols};
    v8 acc[FEW_TILE * COLS] = {{0}};
    const uint8_t *codes[COLS];
    const int16_t *integers = x->integers + row * w->padded_in + k;
    int64_t plain_group = 2 * X_BLOCK, first_group = k / plain_group;
    int is_plain = segment == X_BLOCK && !w->zeros && !w->offsets && w->scale_dtype == BF16 &&
                   w->group_size == plain_group && size % (8 * X_BLOCK) == 0 &&
                   first_group + size / plain_group <= w->num_groups;
    if (!is_plain) {
        if (segment == X_BLOCK)
            find_scales_32(&p, x, w, &t);
        else
            find_scales_16(&p, x, w, &t);
        UNROLL for (int i = 0; i < rows * num_cols; i++) acc[i] = p.sums[i];
    }
    UNROLL for (int c = 0; c < num_cols; c++) {
        int64_t out = min64(col + c * apart, t.last_col);
        codes[c] = w->codes + out * w->row_bytes + k;
        if (!is_plain) continue;
        /* As `--quantization` makes weights, the same in registers of this function. */
        const uint16_t *from = (const uint16_t *)w->scales + out * w->num_groups + first_group;
        __builtin_prefetch(from + 4 * w->num_groups);
        for (int64_t n = 0; n < size / X_BLOCK; n += 8) {
            v8 scales = load_eight(from, n / 2, BF16, 1);
            UNROLL for (int r = 0; r < rows; r++) {
                const float *x_scale = x->scale + (row + r) * (w->padded_in / X_BLOCK) + k / X_BLOCK;
                *(v8_mem *)(p.scale[r * num_cols + c] + n) = scales * *(const v8_mem *)(x_scale + n);
            }
        }
    }
    for (int64_t i = 0; i < size; i += PAD) {
        UNROLL for (int c = 0; c < num_cols; c++) __builtin_prefetch(codes[c] + i + AHEAD);
        UNROLL for (int half = 0; half < 2; half++) {
            __m256i code[COLS][2];
            UNROLL for (int c = 0; c < num_cols && rows > 1; c++) {
                const __m128i *from = (const __m128i *)(codes[c] + i + X_BLOCK * half);
                code[c][0] = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
                code[c][1] = _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1));
                KEEP(code[c][0]);
                KEEP(code[c][1]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256i *a = (const __m256i *)(integers + r * w->padded_in + i + half * X_BLOCK);
                __m256i a0 = _mm256_loadu_si256(a), a1 = _mm256_loadu_si256(a + 1);
                if (num_cols > 1) {
                    KEEP(a0);
                    KEEP(a1);
                }
                UNROLL for (int c = 0; c < num_cols; c++) {
                    v8 *to = acc + r * num_cols + c;
                    const float *by = p.scale[r * num_cols + c] + (i + half * X_BLOCK) / segment;
                    if (rows == 1) { /* each is used once: no register holds it for longer */
                        const __m128i *from = (const __m128i *)(codes[c] + i + X_BLOCK * half);
                        code[c][0] = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
                        code[c][1] = _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1));
                    }
                    if (segment == X_BLOCK) {
                        __m256i sum = multiply_add(_mm256_madd_epi16(code[c][0], a0), code[c][1], a1);
                        *to = fma8((v8)_mm256_cvtepi32_ps(sum), splat8(by[0]), *to);
                    } else {
                        *to = fma8((v8)_mm256_cvtepi32_ps(_mm256_madd_epi16(code[c][0], a0)), splat8(by[0]), *to);
                        *to = fma8((v8)_mm256_cvtepi32_ps(_mm256_madd_epi16(code[c][1], a1)), splat8(by[1]), *to);
                    }
                }
            }
        }
    }
    float result[FEW_TILE * COLS];
    UNROLL for (int i = 0; i < rows * num_cols; i += 4) {
        v8 a = add_pairs(add_pairs(acc[i], acc[i + 1]), add_pairs(acc[i + 2], acc[i + 3]));
        *(v4_mem *)(result + i) = low_four(a) + high_four(a);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < num_cols; c++)
            sums[r * FEW_COLS + c * apart] += result[r * num_cols + c] + (is_plain ? 0.0f : p.extra[r * num_cols + c]);
}

/* out[all rows, col ..] of a few rows, for at most FEW_COLS. Columns that are multiplied at once stand far apart: so each
 * is one of a few streams in the order of memory, which is what the processor's prefetcher follows. */
INLINE void few_rows(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols, int segment) {
    int64_t num_rows = x->num_rows;
    memset(sums, 0, num_rows * FEW_COLS * sizeof *sums);
    int64_t step = num_rows == 1 ? COLS : 2, apart = (num_cols + step - 1) / step;
    int64_t tiles = (num_rows + FEW_TILE - 1) / FEW_TILE;
    for (int64_t c = 0; c < apart; c++)
        for (int64_t k = 0; k < w->padded_in; k += BLOCK_K) /* as the codes lie in memory */
            for (int64_t t = 0; t < tiles; t++) {
                int64_t size = min64(BLOCK_K, w->padded_in - k), row = num_rows * t / tiles;
                float *to = sums + row * FEW_COLS + c;
                int64_t rows = num_rows * (t + 1) / tiles - row, cols = num_cols - c;
                if (step == COLS) dot_whole(to, x, row, w, col + c, cols, apart, k, size, segment, 1, COLS);
                if (step != COLS && rows == 2) dot_whole(to, x, row, w, col + c, cols, apart, k, size, segment, 2, 2);
                if (step != COLS && rows == 3) dot_whole(to, x, row, w, col + c, cols, apart, k, size, segment, 3, 2);
                if (step != COLS && rows == 4) dot_whole(to, x, row, w, col + c, cols, apart, k, size, segment, 4, 2);
            }
}

typedef void few(const whole *, const quantized *, float *, int64_t, int64_t);
#define FEW(segment) \
    static void few_##segment(const whole *x, const quantized *w, float *sums, int64_t col, int64_t num_cols) { \
        few_rows(x, w, sums, col, num_cols, segment); \
    }
FEW(32)
FEW(16)

/* PANEL_COLS columns of at most PANEL_K inputs, unpacked, and what comes out of it. */
typedef struct {
    int32_t codes[PANEL_K / 2 * PANEL_COLS]; /* pairs of int16, or four of uint8 */
    float scale[PANEL_K / SEGMENT][PANEL_COLS], offset[PANEL_K / SEGMENT][PANEL_COLS]; /* in the order of `factors` */
    float sums[MAX_ROWS * PANEL_COLS];
} panel;

/* to[PANEL_COLS * pair]: pairs of PAD inputs of 8 rows of codes of 8 bits. */
INLINE void unpack_bytes(int32_t *to, const uint8_t *const from[8]) {
    for (int half = 0; half < 2; half++) {
        v8 words[8];
        UNROLL for (int c = 0; c < 8; c++) words[c] = *(const v8_mem *)(from[c] + 32 * half);
        transpose(words);
        UNROLL for (int j = 0; j < 8; j++) {
            __m256i word = _mm256_xor_si256((__m256i)words[j], _mm256_set1_epi8(-128)); /* from 0 to 255, until 128 less */
            UNROLL for (int s = 0; s < 2; s++) {
                __m256i codes = _mm256_and_si256(_mm256_srli_epi16(word, 8 * s), _mm256_set1_epi16(255));
                *(__m256i *)(to + (16 * half + 2 * j + s) * PANEL_COLS) = _mm256_sub_epi16(codes, _mm256_set1_epi16(128));
            }
        }
    }
}

/* to[PANEL_COLS * n]: the n-th four of PAD inputs of 8 rows of codes of 4 bits. */
INLINE void unpack_fours(int32_t *to, const uint8_t *from) {
    const __m256i nibble = _mm256_set1_epi8(15);
    UNROLL for (int v = 0; v < 8; v++) {
        __m256i words = _mm256_loadu_si256((const __m256i *)(from + 32 * v));
        *(__m256i *)(to + v * PANEL_COLS) = _mm256_and_si256(words, nibble);
        *(__m256i *)(to + (8 + v) * PANEL_COLS) = _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble);
    }
}

/* Unpacks inputs [k, k + size) of `num_cols` columns from col on; the last stands for those that are not there. */
INLINE void fill_panel(panel *p, const quantized *w, int64_t col, int64_t num_cols, int64_t k, int64_t size, int bits) {
    for (int64_t c = 0; c < PANEL_COLS; c += 8) {
        int64_t first = min64(c, (num_cols - 1) / 8 * 8); /* so that there is a row */
        octavo_quantized_columns(p->scale[0] + c, p->offset[0] + c, PANEL_COLS, w, col + first, k, size);
        const uint8_t *from[8];
        for (int i = 0; i < 8; i++)
            from[i] = w->codes + (col + (bits == 4 ? first : min64(c + i, num_cols - 1))) * w->row_bytes + codes_between(k, bits);
        for (int64_t i = 0; i < size; i += PAD) {
            if (bits == 4)
                unpack_fours(p->codes + i / 4 * PANEL_COLS + c, from[0] + codes_between(i, 4));
            else
                unpack_bytes(p->codes + i / 2 * PANEL_COLS + c, from);
            UNROLL for (int j = 0; j < 8 && bits == 8; j++) from[j] += PAD;
        }
    }
}

#if HAS_WIDE_PRODUCTS
#define TILE 12 /* rows, where there are many: as many sums as hide how long one takes */

/* sums[r] += x[r] . w, for PANEL_COLS columns and inputs [k, k + size); x and the scales of its segments are a tile's. */
INLINE void multiply_tile(float *sums, const panel *p, const whole *x, int64_t row, int64_t k, int64_t size, int shift,
                          int has_offsets, int bits, int segment, int rows) {
    int in_word = bits == 4 ? 4 : 2;
    const int32_t *words = bits == 4 ? (const int32_t *)((const int8_t *)x->integers + k * x->num_rows + row * size)
                                     : (const int32_t *)(x->integers + k * x->num_rows + row * size);
    const float *x_scales = x->scale + row * (x->padded_in / X_BLOCK) + k / X_BLOCK;
    const int32_t *zeros = x->zero + row * (x->padded_in / X_BLOCK) + k / X_BLOCK;
    vf total[TILE];
    UNROLL for (int r = 0; r < rows; r++) total[r] = load(sums, r * PANEL_COLS, F32);
    for (int64_t i = 0; i < size; i += segment) {
        __m512i acc[TILE];
        const int32_t *w = p->codes + i / in_word * PANEL_COLS, *a = words + i / in_word * rows;
        UNROLL for (int r = 0; r < rows; r++) {
            int64_t block = r * (x->padded_in / X_BLOCK) + i / X_BLOCK;
            acc[r] = _mm512_set1_epi32(bits == 4 && !has_offsets ? -zeros[block] : 0);
        }
        UNROLL for (int j = 0; j < segment / in_word; j++, w += PANEL_COLS, a += rows) {
            __m512i codes = _mm512_loadu_si512(w);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512i both = _mm512_set1_epi32(a[r]);
                acc[r] = bits == 4 ? _mm512_dpbusd_epi32(acc[r], codes, both) : _mm512_dpwssd_epi32(acc[r], codes, both);
            }
        }
        vf scale = load(p->scale[i >> shift], 0, F32);
        UNROLL for (int r = 0; r < rows; r++) {
            float x_scale = x_scales[r * (x->padded_in / X_BLOCK) + i / X_BLOCK];
            total[r] = fma_f((vf)_mm512_cvtepi32_ps(acc[r]), scale * x_scale, total[r]);
        }
    }
    for (int64_t n = 0; has_offsets && n <= (size - 1) >> shift; n++)
        UNROLL for (int r = 0; r < rows; r++) {
            vf sum = (vf){0} + x->sum[(row + r) * x->sums_stride + k / SEGMENT + n];
            total[r] = fma_f(load(p->offset[n], 0, F32), sum, total[r]);
        }
    UNROLL for (int r = 0; r < rows; r++) store(sums, r * PANEL_COLS, total[r], F32);
}
#define EACH_HEIGHT(DO) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) /* of tiles: there are more rows than a few */
#else
#define TILE 4
#define EACH_HEIGHT(DO) DO(2) DO(3) DO(4)

/* sum += a * b of pairs. GCC left alone makes many products before it adds them, and moves them to memory. */
INLINE void add_products(__m256i *sum, __m256i a, __m256i b) {
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(a), "x"(b));
}

/* sums[r] += x[r] . w, for PANEL_COLS columns and inputs [k, k + size); x and the scales of its segments are a tile's. */
INLINE void multiply_tile(float *sums, const panel *p, const whole *x, int64_t row, int64_t k, int64_t size, int shift,
                          int has_offsets, int bits, int segment, int rows) {
    int in_word = bits == 4 ? 4 : 2;
    const int32_t *words = bits == 4 ? (const int32_t *)((const int8_t *)x->integers + k * x->num_rows + row * size)
                                     : (const int32_t *)(x->integers + k * x->num_rows + row * size);
    for (int64_t i = 0; i < size; i += segment) {
        __m256i acc[TILE][2] = {{{0}}};
        const __m256i *w = (const __m256i *)(p->codes + i / in_word * PANEL_COLS);
        const int32_t *a = words + i / in_word * rows;
        UNROLL for (int j = 0; j < segment / in_word; j++, w += 2, a += rows) {
            __m256i b0 = w[0], b1 = w[1];
            KEEP(b0);
            KEEP(b1);
            UNROLL for (int r = 0; r < rows; r++) {
                __m256i both = _mm256_set1_epi32(a[r]);
                if (bits == 4) {
                    add_fours(&acc[r][0], b0, both);
                    add_fours(&acc[r][1], b1, both);
                } else {
                    add_products(&acc[r][0], both, b0);
                    add_products(&acc[r][1], both, b1);
                }
            }
        }
        const float *scale = p->scale[i >> shift];
        UNROLL for (int r = 0; r < rows; r++) {
            int64_t block = (row + r) * (x->padded_in / X_BLOCK) + (k + i) / X_BLOCK;
            v8 x_scale = splat8(x->scale[block]);
            UNROLL for (int h = 0; h < 2; h++) {
                v8_mem *to = (v8_mem *)(sums + r * PANEL_COLS + 8 * h);
                __m256i sum = acc[r][h];
                if (bits == 4) sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); /* of 8 times 2 products below 15 * 127 */
                if (bits == 4 && !has_offsets) sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(x->zero[block]));
                *to = fma8((v8)_mm256_cvtepi32_ps(sum) * x_scale, *(const v8_mem *)(scale + 8 * h), *to);
            }
        }
    }
    if (!has_offsets) return;
    for (int64_t n = 0; n <= (size - 1) >> shift; n++)
        UNROLL for (int r = 0; r < rows; r++) {
            v8 sum = splat8(x->sum[(row + r) * x->sums_stride + k / SEGMENT + n]);
            UNROLL for (int h = 0; h < 2; h++) {
                v8_mem *to = (v8_mem *)(sums + r * PANEL_COLS + 8 * h);
                *to = fma8(*(const v8_mem *)(p->offset[n] + 8 * h), sum, *to);
            }
        }
}
#endif

/* Rows of the tiles by the PANEL_COLS columns from col on, to p->sums; asks for the codes of those from `next` on. */
INLINE void multiply_panel(panel *p, const whole *x, const quantized *w, int64_t first_tile, int64_t last_tile, int64_t col,
                           int64_t num_cols, int64_t next, int bits, int segment) {
    int64_t start = tile_start(first_tile, x->num_rows, x->num_tiles), num_tiles = last_tile - first_tile, share = 0;
    /* An equal share of the next columns' codes with each block of inputs and tile. */
    int64_t lines = num_cols * w->row_bytes / LINE, shares = (w->padded_in + PANEL_K - 1) / PANEL_K * num_tiles, asked = 0;
    int has_offsets = w->zeros || w->offsets;
    memset(p->sums, 0, sizeof p->sums);
    for (int64_t k = 0; k < w->padded_in; k += PANEL_K) {
        int64_t size = min64(PANEL_K, w->padded_in - k);
        fill_panel(p, w, col, num_cols, k, size, bits);
        for (int64_t t = first_tile; t < last_tile; t++) {
            int64_t row = tile_start(t, x->num_rows, x->num_tiles);
            float *sums = p->sums + (row - start) * PANEL_COLS;
            for (share++; asked < lines * share / shares; asked++)
                __builtin_prefetch(w->codes + next * w->row_bytes + asked * LINE);
            switch (tile_start(t + 1, x->num_rows, x->num_tiles) - row) {
#define TILE_OF(rows) \
    case rows: multiply_tile(sums, p, x, row, k, size, w->shift, has_offsets, bits, segment, rows); break;
                EACH_HEIGHT(TILE_OF)
            }
        }
    }
}

typedef void multiply(panel *, const whole *, const quantized *, int64_t, int64_t, int64_t, int64_t, int64_t);
#define MULTIPLY(bits, segment) \
    static void multiply_##bits##_##segment(panel *p, const whole *x, const quantized *w, int64_t first_tile, \
                                            int64_t last_tile, int64_t col, int64_t num_cols, int64_t next) { \
        multiply_panel(p, x, w, first_tile, last_tile, col, num_cols, next, bits, segment); \
    }
MULTIPLY(4, 32)
MULTIPLY(8, 32)
MULTIPLY(8, 16)

static void store_columns(void *out, int dtype, int64_t out_features, const float *sums, int64_t stride, int64_t first,
                          int64_t num_rows, int64_t col, int64_t num_cols) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < num_cols; c += VL)
            store_upto(out, (first + r) * out_features + col + c, load(sums, r * stride + c, F32), num_cols - c, dtype);
}

INLINE int64_t num_passes(int64_t num_rows) { return (num_rows + PASS_ROWS - 1) / PASS_ROWS; }

static void work_few(const whole *x, const quantized *w, void *out, int dtype, work_queue *queues, int num_queues,
                     int64_t parts) {
    few *by = w->bits == 4 ? octavo_few_nibbles : w->group_size % X_BLOCK ? few_16 : few_32;
    int64_t unit = w->bits == 4 ? NIBBLE_ROWS : 1, units = (w->out_features + unit - 1) / unit;
    float sums[REGISTER_ROWS * FEW_COLS];
    for (int64_t part; (part = take_task(queues, num_queues, thread_index())) >= 0;) {
        int64_t col = units * part / parts * unit, end = units * (part + 1) / parts * unit;
        int64_t num_cols = min64(end, w->out_features) - col;
        if (num_cols <= 0) continue;
        by(x, w, sums, col, num_cols);
        store_columns(out, dtype, w->out_features, sums, FEW_COLS, 0, x->num_rows, col, num_cols);
    }
}

static void work_many(const whole *x, const quantized *w, void *out, int dtype, work_queue *queues, int num_queues,
                      int64_t row_parts, panel *p) {
    multiply *by = w->bits == 4 ? multiply_4_32 : w->group_size % X_BLOCK ? multiply_8_16 : multiply_8_32;
    for (int64_t task; (task = take_task(queues, num_queues, thread_index())) >= 0;) {
        int64_t part = task % row_parts, col = task / row_parts * PANEL_COLS;
        int64_t num_cols = min64(PANEL_COLS, w->out_features - col);
        int64_t first_tile = x->num_tiles * part / row_parts, last_tile = x->num_tiles * (part + 1) / row_parts;
        int64_t first = tile_start(first_tile, x->num_rows, x->num_tiles);
        int64_t num_rows = tile_start(last_tile, x->num_rows, x->num_tiles) - first;
        by(p, x, w, first_tile, last_tile, col, num_cols, part + 1 == row_parts ? col + num_cols : col);
        store_columns(out, dtype, w->out_features, p->sums, PANEL_COLS, first, num_rows, col, num_cols);
    }
}

int octavo_linear_whole(const void *x, int dtype, const quantized *w, void *out, int64_t num_rows, int64_t in_features,
                        int num_threads) {
    int few = num_rows <= most_few(w);
    int64_t passes = num_passes(num_rows), pass_rows = (num_rows + passes - 1) / passes, padded_in = w->padded_in;
    int64_t sums_stride = (padded_in + BLOCK_K - 1) / BLOCK_K * (BLOCK_K / SEGMENT);
    int64_t row_size = padded_in * 2 + padded_in / X_BLOCK * 8 + sums_stride * 4;
    char *memory = aligned_alloc(64, (num_threads * sizeof(work_queue) + pass_rows * row_size + 127) / 64 * 64);
    if (!memory) return -1;
    work_queue *queues = (work_queue *)memory;
    int16_t *integers = (int16_t *)(queues + num_threads);
    float *scale = (float *)(integers + pass_rows * padded_in), *sums = scale + pass_rows * (padded_in / X_BLOCK);
    int32_t *zero = (int32_t *)(sums + pass_rows * sums_stride);
    int64_t parts = few ? num_parts(w->out_features, FEW_COLS - 2 * NIBBLE_ROWS, FEW_PARTS, num_threads)
                        : (w->out_features + PANEL_COLS - 1) / PANEL_COLS;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        panel *p = few ? NULL : aligned_alloc(64, (sizeof(panel) + 63) / 64 * 64);
        if (!few && !p) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t pass = 0; pass < passes; pass++) {
            int64_t first = num_rows * pass / passes, rows = num_rows * (pass + 1) / passes - first;
            int64_t row_parts = few ? 1 : (rows + MAX_ROWS - 1) / MAX_ROWS;
            int64_t tiles = (rows + TILE - 1) / TILE;
            whole rounded = {integers, scale, zero, sums, rows, tiles, padded_in, sums_stride, few, w->bits};
#pragma omp for
            for (int64_t t = 0; t < rounded.num_tiles; t++)
                round_tile(&rounded, t, at(x, first * in_features, dtype), in_features, w->shift, dtype);
#pragma omp for
            for (int i = 0; i < num_threads; i++) fill_queue(queues, num_threads, i, parts * row_parts);
            void *to = (char *)out + first * w->out_features * size_of(dtype);
            if (few) work_few(&rounded, w, to, dtype, queues, num_threads, parts);
            if (p) work_many(&rounded, w, to, dtype, queues, num_threads, row_parts, p);
#pragma omp barrier
        }
        free(p);
    }
    free(memory);
    return failed ? -1 : 0;
}
#else
int octavo_linear_whole(const void *x, int dtype, const quantized *w, void *out, int64_t num_rows, int64_t in_features,
                        int num_threads) {
    (void)x, (void)dtype, (void)w, (void)out, (void)num_rows, (void)in_features, (void)num_threads;
    return -1; /* not reached: see whole_is_quick */
}
#endif
