/* What the sets with AVX2 share. The file that includes this defines FK_VNNI (1 if there is AVX-VNNI, else 0), FK_TABLE and
 * FK_NAME. */
#include <immintrin.h>

#ifndef FK_VNNI
#error "define FK_VNNI"
#endif

#define FK_LANES 8
#define FK_OWN_REDUCTIONS
#define FK_OWN_WIDTHS
#define FK_OWN_SUM_EACH
#define FK_OWN_TRANSPOSE
#include "../lanes.h"
#include "../half.h"
#include "flapkern.h"

INLINE vi widen_bytes(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vi widen_signed(const uint8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vi widen_shorts(const void *p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }

INLINE void narrow_to_bytes(int8_t *p, vi v) {
    __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(shorts, shorts));
}

INLINE float sum_lanes(vf v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

INLINE float max_lane(vf v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

INLINE int32_t sum_ints(vi v) {
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    x = _mm_add_epi32(x, _mm_unpackhi_epi64(x, x));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 1)));
}

INLINE float max_bits(vi v) {
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    x = _mm_max_epi32(x, _mm_unpackhi_epi64(x, x));
    return bits_to_float((uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 1))));
}

INLINE vf sum_each(const vf *v) {
    __m256 x[2];
    UNROLL for (int i = 0; i < 2; i++)
        x[i] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4 * i], (__m256)v[4 * i + 1]),
                              _mm256_hadd_ps((__m256)v[4 * i + 2], (__m256)v[4 * i + 3]));
    return (vf)_mm256_add_ps(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
}

INLINE void transpose(vf v[8]) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    /* Columns c and 4 + c of rows 4 q to 4 q + 3 in the halves of b[4 q + c]. */
    UNROLL for (int q = 0; q < 8; q += 4) {
        b[q] = _mm256_shuffle_ps(a[q], a[q + 2], 0x44);
        b[q + 1] = _mm256_shuffle_ps(a[q], a[q + 2], 0xee);
        b[q + 2] = _mm256_shuffle_ps(a[q + 1], a[q + 3], 0x44);
        b[q + 3] = _mm256_shuffle_ps(a[q + 1], a[q + 3], 0xee);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        v[c] = (vf)_mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        v[4 + c] = (vf)_mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}

#define GEMM_TOKENS 6
#define GEMM_VECTORS 2

INLINE vf load_half(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

INLINE void store_half(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE float half_at(const uint8_t *p) { return _cvtsh_ss(load_u16(p)); }

/* The 32 nibbles of 16 bytes as bytes: the low ones, then the high ones. */
INLINE __m256i unpack_nibbles(const uint8_t *packed) {
    __m128i raw = _mm_loadu_si128((const __m128i *)packed);
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(raw), _mm_srli_epi16(raw, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

/* Eight sums of four products each. The sum of a pair of products fits 16 bits: 2 * |u * s| <= 2 * 128 * 127. */
INLINE vf dot_bytes(__m256i u, __m256i s) {
#if FK_VNNI
    return (vf)_mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), u, s));
#endif
    __m256i pairs = _mm256_maddubs_epi16(u, s);
    return (vf)_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static float dot_q8_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    (void)sums;
    vf total = {0};
    for (size_t b = 0; b < blocks; b++, row += 34, q += 32) {
        __m256i w = _mm256_loadu_si256((const __m256i *)(row + 2));
        __m256i x = _mm256_loadu_si256((const __m256i *)q);
        /* |w| * (x with the sign of w) */
        total += half_at(row) * scales[b] * dot_bytes(_mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w));
    }
    return sum_lanes(total);
}

static float dot_q4_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    for (size_t b = 0; b < blocks; b++, row += 18, q += 32) {
        float d = half_at(row);
        total += d * scales[b] * dot_bytes(unpack_nibbles(row + 2), _mm256_loadu_si256((const __m256i *)q));
        offset += d * sums[b];
    }
    return sum_lanes(total) - 8 * offset;
}

static float dot_q4_1(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    for (size_t b = 0; b < blocks; b++, row += 20, q += 32) {
        total += half_at(row) * scales[b] * dot_bytes(unpack_nibbles(row + 4), _mm256_loadu_si256((const __m256i *)q));
        offset += half_at(row + 2) * sums[b];
    }
    return sum_lanes(total) + offset;
}

/* The same four activations in every lane. */
INLINE __m256i four_of(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

/* As in ops/packed.h: each byte of the result looks up the byte that has its bit, and tests the bit. */
#define FK_OWN_SPREAD
INLINE vw spread_fifth_bits(vu bits, int j) {
    const __m256i byte = _mm256_add_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)),
                                         _mm256_set1_epi8((char)(j / 2)));
    const __m256i bit = _mm256_set1_epi32(j % 2 ? (int)0x80402010 : 0x08040201);
    __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8((__m256i)bits, byte), bit), bit);
    return (vw)_mm256_and_si256(set, _mm256_set1_epi8(16));
}

#define PACKED_TOKENS 4

#if FK_VNNI
#define SIGNED_OFFSET 128

INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    (void)bits;
    UNROLL for (int j = 0; j < words; j++)
        sum = (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes[j], four_of(x + 4 * j));
    return sum;
}

/* The codes are 128 too large, and the sum was begun with what makes up for that. */
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    return dot_unsigned(sum, codes, words, 8, x);
}
#else
#define SIGNED_OFFSET 0

/* Sums of two products stay within 16 bits, and of those sums as many are added up as the width of the codes allows. */
INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    const int together = bits <= 4 ? 8 : bits == 5 ? 4 : 2;
    UNROLL for (int first = 0; first < words; first += together) {
        __m256i pairs = _mm256_maddubs_epi16((__m256i)codes[first], four_of(x + 4 * first));
        const int end = first + together < words ? first + together : words;
        UNROLL for (int j = first + 1; j < end; j++)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)codes[j], four_of(x + 4 * j)));
        sum += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return sum;
}

/* |w| * (x with the sign of w) */
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    UNROLL for (int j = 0; j < words; j++) {
        __m256i w = (__m256i)codes[j];
        __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(four_of(x + 4 * j), w));
        sum += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return sum;
}
#endif

INLINE vw look_up(const int8_t *table, vw codes) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vw)_mm256_shuffle_epi8(both, (__m256i)codes);
}

INLINE sixteen_bytes shuffle_bytes(sixteen_bytes bytes, sixteen_bytes from) {
    return (sixteen_bytes)_mm_shuffle_epi8((__m128i)bytes, (__m128i)from);
}

INLINE vw join_sixteens(const sixteen_bytes *parts) {
    return (vw)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)parts[0]), (__m128i)parts[1], 1);
}

#define FK_OWN_MASK_LINE
INLINE void mask_line(uint64_t mask, vw *line) {
    const __m256i all = _mm256_set1_epi64x((long long)mask), bits = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    UNROLL for (int v = 0; v < 2; v++) {
        const __m256i from = _mm256_add_epi8(byte, _mm256_set1_epi8((char)(4 * v)));
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(all, from), bits), bits);
        line[v] = (vw)_mm256_and_si256(set, _mm256_set1_epi8(1));
    }
}

INLINE vf widen_halves(fk_type type, sixteen_bytes halves, int v) {
    (void)v;
    return type == FK_TYPE_F16 ? (vf)_mm256_cvtph_ps((__m128i)halves)
                               : (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16);
}

#include "../ops/table.h"
