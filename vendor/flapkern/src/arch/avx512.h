/* What the sets with AVX-512 share. The file that includes this defines FK_VNNI (1 if there is VNNI, else 0), FK_BF16 (1 if
 * there are BF16, VBMI and VBMI2), FK_AMX (1 if there is AMX), FK_TABLE and FK_NAME. A vector of 64 bytes holds two blocks. */
#include <immintrin.h>

#ifndef FK_VNNI
#error "define FK_VNNI"
#endif

#define FK_LANES 16
#define FK_OWN_REDUCTIONS
#define FK_OWN_WIDTHS
#define FK_OWN_SUM_EACH
#define FK_OWN_TRANSPOSE
#define FK_OWN_TRANSPOSE
#define FK_OWN_EXP
#include "../lanes.h"
#include "../half.h"
#include "flapkern.h"

INLINE vi widen_bytes(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi widen_signed(const uint8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi widen_shorts(const void *p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE void narrow_to_bytes(int8_t *p, vi v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v)); }

INLINE float sum_lanes(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float max_lane(vf v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE int32_t sum_ints(vi v) { return _mm512_reduce_add_epi32((__m512i)v); }
INLINE float max_bits(vi v) { return bits_to_float((uint32_t)_mm512_reduce_max_epi32((__m512i)v)); }

/* e^x as in lanes.h, except that results below 2^-126 are subnormal numbers instead of 0. NaN passes through both limits. */
INLINE vf vexp(vf x) {
    __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-104), _mm512_min_ps(_mm512_set1_ps(89), (__m512)x));
    __m512 n = _mm512_roundscale_ps((__m512)((vf)clamped * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = (vf)clamped - (vf)n * 0.693145752f;
    r = r - (vf)n * 1.42860677e-6f;
    vf p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, n);
}

/* Pairs of vectors are added crosswise until every lane has one vector's sum. */
INLINE vf sum_each(const vf *v) {
    __m512 x[4], y[2];
    UNROLL for (int i = 0; i < 4; i++) {
        __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1], c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
        __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        y[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
    return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
}

INLINE void transpose(vf v[16]) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    }
    /* Column 4 l + c of rows 4 q to 4 q + 3 in lane l of a[4 q + c]. */
    UNROLL for (int q = 0; q < 16; q += 4) {
        a[q] = _mm512_unpacklo_epi64(b[q], b[q + 2]);
        a[q + 1] = _mm512_unpackhi_epi64(b[q], b[q + 2]);
        a[q + 2] = _mm512_unpacklo_epi64(b[q + 1], b[q + 3]);
        a[q + 3] = _mm512_unpackhi_epi64(b[q + 1], b[q + 3]);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88),
                odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        v[c] = (vf)_mm512_shuffle_i32x4(even, even2, 0x88);
        v[4 + c] = (vf)_mm512_shuffle_i32x4(odd, odd2, 0x88);
        v[8 + c] = (vf)_mm512_shuffle_i32x4(even, even2, 0xdd);
        v[12 + c] = (vf)_mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

#define GEMM_TOKENS 12
#define GEMM_VECTORS 2

INLINE vf load_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

INLINE void store_half(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE float half_at(const uint8_t *p) { return _cvtsh_ss(load_u16(p)); }

/* Sixteen sums of four products each. */
INLINE vf dot_bytes(__m512i u, __m512i s) {
#if FK_VNNI
    return (vf)_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), u, s));
#else
    __m512i pairs = _mm512_maddubs_epi16(u, s);
    return (vf)_mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

INLINE __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

/* A vector with a in the lanes of the first block and b in those of the second. */
INLINE vf pair(float a, float b) {
    return (vf)_mm512_mask_broadcastss_ps(_mm512_set1_ps(a), 0xff00, _mm_set_ss(b));
}

/* The nibbles of two blocks as bytes: the low and the high ones of the first, then of the second. */
INLINE __m512i unpack_nibbles(const uint8_t *first, const uint8_t *second) {
    __m256i raw = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)first)),
                                          _mm_loadu_si128((const __m128i *)second), 1);
    __m512i spread = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), _mm512_castsi256_si512(raw));
    __m512i shifted = _mm512_mask_srli_epi16(spread, 0xff00ff00, spread, 4);
    return _mm512_and_si512(shifted, _mm512_set1_epi8(15));
}

/* The nibbles of one block as bytes, and 32 zeros. */
INLINE __m512i unpack_nibbles_once(const uint8_t *packed) {
    __m128i raw = _mm_loadu_si128((const __m128i *)packed);
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(raw), _mm_srli_epi16(raw, 4), 1);
    return _mm512_zextsi256_si512(_mm256_and_si256(both, _mm256_set1_epi8(15)));
}

/* 32 bytes from memory, and 32 zeros. */
INLINE __m512i load_once(const void *p) { return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p)); }

/* Sixteen sums of four products of signed weights and activations. With VNNI 128 is added to the weights, and callers
 * subtract what this adds; without it the product is that of |w| and of x with the sign of w, so that pairs of products stay
 * within 16 bits. */
INLINE vf dot_signed_bytes(__m512i w, __m512i x) {
#if FK_VNNI
    return dot_bytes(_mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)), x);
#else
    __mmask64 negative = _mm512_movepi8_mask(w);
    return dot_bytes(_mm512_abs_epi8(w), _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x));
#endif
}

static float dot_q8_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    size_t b = 0;
    for (; b + 2 <= blocks; b += 2, row += 68, q += 64) {
        float d = half_at(row), e = half_at(row + 34);
        __m512i w = join(_mm256_loadu_si256((const __m256i *)(row + 2)), _mm256_loadu_si256((const __m256i *)(row + 36)));
        total += pair(d * scales[b], e * scales[b + 1]) * dot_signed_bytes(w, _mm512_loadu_si512(q));
        offset += d * sums[b] + e * sums[b + 1];
    }
    if (b < blocks) {
        float d = half_at(row);
        total += d * scales[b] * dot_signed_bytes(load_once(row + 2), load_once(q));
        offset += d * sums[b];
    }
    return sum_lanes(total) - (FK_VNNI ? 128 * offset : 0);
}

static float dot_q4_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    size_t b = 0;
    for (; b + 2 <= blocks; b += 2, row += 36, q += 64) {
        float d = half_at(row), e = half_at(row + 18);
        total += pair(d * scales[b], e * scales[b + 1]) *
                 dot_bytes(unpack_nibbles(row + 2, row + 20), _mm512_loadu_si512(q));
        offset += d * sums[b] + e * sums[b + 1];
    }
    if (b < blocks) {
        float d = half_at(row);
        total += d * scales[b] * dot_bytes(unpack_nibbles_once(row + 2), load_once(q));
        offset += d * sums[b];
    }
    return sum_lanes(total) - 8 * offset;
}

static float dot_q4_1(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    size_t b = 0;
    for (; b + 2 <= blocks; b += 2, row += 40, q += 64) {
        total += pair(half_at(row) * scales[b], half_at(row + 20) * scales[b + 1]) *
                 dot_bytes(unpack_nibbles(row + 4, row + 24), _mm512_loadu_si512(q));
        offset += half_at(row + 2) * sums[b] + half_at(row + 22) * sums[b + 1];
    }
    if (b < blocks) {
        total += half_at(row) * scales[b] * dot_bytes(unpack_nibbles_once(row + 4), load_once(q));
        offset += half_at(row + 2) * sums[b];
    }
    return sum_lanes(total) + offset;
}

/* The greatest lane of each of four vectors. */
INLINE __m128i peaks_of_four(const __m512i v[4]) {
    /* Side by side, in each quarter of a vector those of its lanes, and then of all. */
    __m512i low = _mm512_max_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    __m512i high = _mm512_max_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    __m512i four = _mm512_max_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    four = _mm512_max_epi32(four, _mm512_shuffle_i32x4(four, four, 0x4e));
    four = _mm512_max_epi32(four, _mm512_shuffle_i32x4(four, four, 0xb1));
    return _mm512_castsi512_si128(four);
}

/* Lane i of each quarter in all lanes of that quarter. */
INLINE __m512 spread_lane(__m512 quarters, int i) {
    switch (i) {
    case 0: return _mm512_permute_ps(quarters, 0x00);
    case 1: return _mm512_permute_ps(quarters, 0x55);
    case 2: return _mm512_permute_ps(quarters, 0xaa);
    default: return _mm512_permute_ps(quarters, 0xff);
    }
}

/* Four blocks of activations in 8 bits; see ops/activations.h. Peaks of four, and the sums of halves, are found side by side. */
#define FK_OWN_FOUR_BLOCKS
INLINE int quantize_four(int parts, const float *x, const fk_plane *to) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512 values[8];
    __m512i sizes[8];
    __m512 inverses[2];
    __m128 scales[2];
    UNROLL for (int i = 0; i < 8; i++) {
        values[i] = _mm512_loadu_ps(x + 16 * i);
        sizes[i] = _mm512_and_si512((__m512i)values[i], magnitude);
    }
    /* The vectors that have a scale, four at a time. */
    if (parts == 1)
        UNROLL for (int b = 0; b < 4; b++) sizes[b] = _mm512_max_epi32(sizes[2 * b], sizes[2 * b + 1]);
    UNROLL for (int some = 0; some < parts; some++) {
        const __m128i bits = peaks_of_four(sizes + 4 * some);
        if (_mm_cmpge_epi32_mask(bits, _mm_set1_epi32(0x7f800000))) return 0;
        const __m128 peak = _mm_castsi128_ps(bits);
        const __mmask8 counts = _mm_cmp_ps_mask(peak, _mm_set1_ps(FK_LEAST_PEAK), _CMP_GE_OQ);
        scales[some] = _mm_maskz_div_ps(counts, peak, _mm_set1_ps(127));
        inverses[some] = _mm512_broadcast_f32x4(_mm_maskz_div_ps(counts, _mm_set1_ps(127), peak));
    }
    __m512i codes[8];
    /* As round_to_int rounds, of the product that is not rounded before. */
    const __m512 rounder = _mm512_set1_ps(ROUNDER);
    UNROLL for (int i = 0; i < 8; i++) {
        const __m512 by = parts == 1 ? spread_lane(inverses[0], i / 2) : spread_lane(inverses[i / 4], i % 4);
        codes[i] = _mm512_sub_epi32((__m512i)_mm512_fmadd_ps(values[i], by, rounder), (__m512i)rounder);
    }
    /* Narrowing leaves four bytes of each of four vectors in a quarter. */
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i halves[2];
    UNROLL for (int pair = 0; pair < 2; pair++) {
        const __m512i *c = codes + 4 * pair;
        __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3]));
        _mm512_storeu_si512(to->quantized + 64 * pair, _mm512_permutexvar_epi32(in_order, bytes));
#if FK_VNNI
        __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
#else
        __m512i sums = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_set1_epi8(1), bytes), _mm512_set1_epi16(1));
#endif
        sums = _mm512_add_epi32(sums, _mm512_shuffle_i32x4(sums, sums, 0x4e));
        sums = _mm512_add_epi32(sums, _mm512_shuffle_i32x4(sums, sums, 0xb1));
        halves[pair] = _mm512_castsi512_si128(sums);
        _mm_storeu_si128((__m128i *)(to->code_sums + 4 * pair), halves[pair]);
    }
    if (parts == 1) halves[0] = _mm_hadd_epi32(halves[0], halves[1]);
    UNROLL for (int some = 0; some < parts; some++) {
        _mm_storeu_ps(to->scales + 4 * some, scales[some]);
        _mm_storeu_ps(to->scaled_sums + 4 * some, _mm_mul_ps(scales[some], _mm_cvtepi32_ps(halves[some])));
    }
    return 1;
}

/* The same four activations in every lane. */
INLINE __m512i four_of(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE vw look_up(const int8_t *table, vw codes) {
    __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (vw)_mm512_shuffle_epi8(all, (__m512i)codes);
}

/* As in ops/packed.h. With VBMI each byte of the result takes the eight bits that begin four below its own; otherwise it looks
 * up the byte that has its bit, and tests the bit. */
#define FK_OWN_SPREAD
INLINE vw spread_fifth_bits(vu bits, int j) {
#if FK_BF16
    const __m512i first = _mm512_set1_epi64(0x2322212003020100 + 0x0101010101010101 * 60);
    const __m512i from = _mm512_add_epi8(first, _mm512_set1_epi8((char)(4 * j)));
    return (vw)_mm512_and_si512(_mm512_multishift_epi64_epi8(from, (__m512i)bits), _mm512_set1_epi8(16));
#else
    const __m512i byte = _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)),
                                         _mm512_set1_epi8((char)(j / 2)));
    const __m512i bit = _mm512_set1_epi32(j % 2 ? (int)0x80402010 : 0x08040201);
    __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8((__m512i)bits, byte), bit);
    return (vw)_mm512_maskz_set1_epi8(set, 16);
#endif
}

#if FK_VNNI
#define PACKED_TOKENS 12
#define SIGNED_OFFSET 128

INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    (void)bits;
    UNROLL for (int j = 0; j < words; j++)
        sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes[j], four_of(x + 4 * j));
    return sum;
}

/* The codes are 128 too large, and the sum was begun with what makes up for that. */
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    return dot_unsigned(sum, codes, words, 8, x);
}
#else
#define PACKED_TOKENS 8
#define SIGNED_OFFSET 0

/* Sums of two products stay within 16 bits, and of those sums as many are added up as the width of the codes allows. */
INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    const int together = bits <= 4 ? 8 : bits == 5 ? 4 : 2;
    UNROLL for (int first = 0; first < words; first += together) {
        __m512i pairs = _mm512_maddubs_epi16((__m512i)codes[first], four_of(x + 4 * first));
        const int end = first + together < words ? first + together : words;
        UNROLL for (int j = first + 1; j < end; j++)
            pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16((__m512i)codes[j], four_of(x + 4 * j)));
        sum += (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    return sum;
}

/* |w| * (x with the sign of w) */
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    UNROLL for (int j = 0; j < words; j++) {
        __m512i w = (__m512i)codes[j], s = four_of(x + 4 * j);
        s = _mm512_mask_sub_epi8(s, _mm512_movepi8_mask(w), _mm512_setzero_si512(), s);
        __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), s);
        sum += (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    return sum;
}
#endif

#define FK_OWN_MASK_LINE
INLINE void mask_line(uint64_t mask, vw *line) { *line = (vw)_mm512_maskz_set1_epi8(mask, 1); }

/* Sixteen numbers of 16 bits. */
INLINE vf widen_half(fk_type type, __m256i halves) {
    if (type == FK_TYPE_F16) return (vf)_mm512_cvtph_ps(halves);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

#if FK_BF16
/* Zeros, as a target for an expanding instruction. Zen 4 waits for what the target held before, even where all of it is replaced, and
 * compilers give successive instructions the same one. That these are zeros is hidden from the compiler, which would leave them out. */
INLINE __m512i fresh_zeros(void) {
    __m512i zeros = _mm512_setzero_si512();
    __asm__("" : "+v"(zeros));
    return zeros;
}

/* The mask of 16 bits at p, without the way through a general register, which takes Zen 4 two cycles. */
INLINE __mmask16 load_mask16(const uint8_t *p) {
    __mmask16 mask;
    __asm__("kmovw %1, %0" : "=k"(mask) : "m"(*(const uint8_t(*)[2])p));
    return mask;
}

/* A column: the numbers at p one after the other, in those rows whose bits of the 16 at `mask` are set; 0 in the others. */
INLINE vf expand_half(fk_type type, const uint8_t *p, const uint8_t *mask) {
    const __m256i zeros = _mm512_castsi512_si256(fresh_zeros()), halves = _mm256_loadu_si256((const __m256i *)p);
    return widen_half(type, _mm256_mask_expand_epi16(zeros, load_mask16(mask), halves));
}
#else
/* The same; numbers are widened before they are spread. */
INLINE vf expand_half(fk_type type, const uint8_t *p, const uint8_t *mask) {
    __mmask16 rows;
    memcpy(&rows, mask, sizeof rows);
    return (vf)_mm512_maskz_expand_ps(rows, (__m512)widen_half(type, _mm256_loadu_si256((const __m256i *)p)));
}
#endif

#define FK_OWN_HALVES_LINE
typedef struct halves_line {
    vf column[4];
} halves_line;

/* Each column is found by itself, so that none waits for the one before. */
INLINE void expand_halves(fk_type type, const uint8_t *p, const uint8_t *masks, halves_line *line) {
    uint64_t all;
    memcpy(&all, masks, sizeof all);
    UNROLL for (int c = 0; c < 4; c++)
        line->column[c] = expand_half(type, c > 0 ? p + 2 * _mm_popcnt_u64(all << (64 - 16 * c)) : p, masks + 2 * c);
}

INLINE vf column_of(fk_type type, const halves_line *line, int c, int v) {
    (void)type, (void)v;
    return line->column[c];
}

#if FK_BF16
#define FK_OWN_EXPAND_LINE
INLINE void expand_line(const uint8_t *p, uint64_t mask, vw *line) {
    *line = (vw)_mm512_mask_expand_epi8(fresh_zeros(), mask, _mm512_loadu_si512(p));
}

#define FK_OWN_SETTLE
INLINE void settle(vw *codes) {
    __asm__("" : "+v"(codes[0]), "+v"(codes[1]), "+v"(codes[2]), "+v"(codes[3]), "+v"(codes[4]), "+v"(codes[5]),
                 "+v"(codes[6]), "+v"(codes[7]));
}
#else
INLINE sixteen_bytes shuffle_bytes(sixteen_bytes bytes, sixteen_bytes from) {
    return (sixteen_bytes)_mm_shuffle_epi8((__m128i)bytes, (__m128i)from);
}

INLINE vw join_sixteens(const sixteen_bytes *parts) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)parts[0]), (__m128i)parts[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)parts[2]), (__m128i)parts[3], 1);
    return (vw)join(low, high);
}
#endif

#include "../ops/table.h"
