/* What the sets with NEON share; every 64-bit ARM processor has it. The file that includes this defines FK_DOTPROD and
 * FK_I8MM (1 if there are dot products of bytes, and 8-bit matrix instructions, else 0), FK_TABLE and FK_NAME. Half precision
 * is converted from and to, and not computed in, since that would take another extension. */
#include <arm_neon.h>

#if !defined(FK_DOTPROD) || !defined(FK_I8MM)
#error "define FK_DOTPROD and FK_I8MM"
#endif

#define FK_LANES 4
#define FK_OWN_TRANSPOSE
#include "../lanes.h"
#include "../half.h"
#include "flapkern.h"

INLINE void transpose(vf v[4]) {
    const float32x4x2_t upper = vtrnq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
    const float32x4x2_t lower = vtrnq_f32((float32x4_t)v[2], (float32x4_t)v[3]);
    v[0] = (vf)vcombine_f32(vget_low_f32(upper.val[0]), vget_low_f32(lower.val[0]));
    v[1] = (vf)vcombine_f32(vget_low_f32(upper.val[1]), vget_low_f32(lower.val[1]));
    v[2] = (vf)vcombine_f32(vget_high_f32(upper.val[0]), vget_high_f32(lower.val[0]));
    v[3] = (vf)vcombine_f32(vget_high_f32(upper.val[1]), vget_high_f32(lower.val[1]));
}

/* 24 of the 32 registers hold sums, 2 hold a column of weights, and the rest holds activations. With a tile of 6 by 4
 * compilers keep one of the sums in memory. */
#define GEMM_TOKENS 12
#define GEMM_VECTORS 2

INLINE vf load_half(const uint16_t *p) {
    float16x4_t h;
    memcpy(&h, p, sizeof h);
    return (vf)vcvt_f32_f16(h);
}

INLINE void store_half(uint16_t *p, vf v) {
    float16x4_t h = vcvt_f16_f32((float32x4_t)v);
    memcpy(p, &h, sizeof h);
}

INLINE float half_at(const uint8_t *p) {
    __fp16 h;
    memcpy(&h, p, sizeof h);
    return h;
}

/* The product of a block of signed weights, in two halves of 16, and a block of activations: four sums of eight products. */
INLINE vf dot_bytes(int8x16_t w0, int8x16_t w1, const int8_t *x) {
    int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
#if FK_DOTPROD
    return (vf)vcvtq_f32_s32(vdotq_s32(vdotq_s32(vdupq_n_s32(0), w0, x0), w1, x1));
#else
    /* Two products fit 16 bits, for no activation is -128: 2 * 128 * 127 < 2^15. */
    int16x8_t first = vmlal_high_s8(vmull_s8(vget_low_s8(w0), vget_low_s8(x0)), w0, x0);
    int16x8_t second = vmlal_high_s8(vmull_s8(vget_low_s8(w1), vget_low_s8(x1)), w1, x1);
    return (vf)vcvtq_f32_s32(vpadalq_s16(vpaddlq_s16(first), second));
#endif
}

/* The product of 32 unsigned nibbles and a block of activations, as four sums. The low nibbles of the 16 bytes come first. */
INLINE vf dot_nibbles(const uint8_t *packed, const int8_t *x) {
    uint8x16_t raw = vld1q_u8(packed);
    int8x16_t low = vreinterpretq_s8_u8(vandq_u8(raw, vdupq_n_u8(15)));
    return dot_bytes(low, vreinterpretq_s8_u8(vshrq_n_u8(raw, 4)), x);
}

static float dot_q8_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    (void)sums;
    vf total = {0};
    for (size_t b = 0; b < blocks; b++, row += 34, q += 32) {
        int8x16_t w0 = vreinterpretq_s8_u8(vld1q_u8(row + 2)), w1 = vreinterpretq_s8_u8(vld1q_u8(row + 18));
        total += half_at(row) * scales[b] * dot_bytes(w0, w1, q);
    }
    return sum_lanes(total);
}

static float dot_q4_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    for (size_t b = 0; b < blocks; b++, row += 18, q += 32) {
        float d = half_at(row);
        total += d * scales[b] * dot_nibbles(row + 2, q);
        offset += d * sums[b];
    }
    return sum_lanes(total) - 8 * offset;
}

static float dot_q4_1(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    vf total = {0};
    float offset = 0;
    for (size_t b = 0; b < blocks; b++, row += 20, q += 32) {
        total += half_at(row) * scales[b] * dot_nibbles(row + 4, q);
        offset += half_at(row + 2) * sums[b];
    }
    return sum_lanes(total) + offset;
}

/* Eight registers hold codes, and one for each token holds its total. Without dot products 16-bit sums take so many that
 * eight tokens would not fit. */
#if FK_DOTPROD
#define PACKED_TOKENS 8
#else
#define PACKED_TOKENS 4
#endif
#define SIGNED_OFFSET 0

INLINE vw look_up(const int8_t *table, vw codes) {
    return (vw)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)codes);
}

/* STEP(j, lane) for four vectors of codes j from FIRST on. Lane `lane` of a vector of sixteen activations has those of the
 * four columns of vector j. Written out, since the instructions take their lanes as constants. */
#define FOUR_STEPS(STEP, FIRST) STEP(FIRST, 0) STEP(FIRST + 1, 1) STEP(FIRST + 2, 2) STEP(FIRST + 3, 3)

#if FK_DOTPROD
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    int32x4_t sums = (int32x4_t)sum;
    int8x16_t sixteen = vld1q_s8(x);
#define STEP(J, LANE) sums = vdotq_laneq_s32(sums, (int8x16_t)codes[J], sixteen, LANE);
    FOUR_STEPS(STEP, 0)
    if (words == 8) {
        sixteen = vld1q_s8(x + 16);
        FOUR_STEPS(STEP, 4)
    }
#undef STEP
    return (vi)sums;
}

INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    (void)bits;
#if FK_I8MM
    int32x4_t sums = (int32x4_t)sum;
    int8x16_t sixteen = vld1q_s8(x);
#define STEP(J, LANE) sums = vusdotq_laneq_s32(sums, (uint8x16_t)codes[J], sixteen, LANE);
    FOUR_STEPS(STEP, 0)
    if (words == 8) {
        sixteen = vld1q_s8(x + 16);
        FOUR_STEPS(STEP, 4)
    }
#undef STEP
    return (vi)sums;
#else
    /* Codes of at most six bits are the same numbers when read as signed bytes. */
    return dot_signed(sum, codes, words, x);
#endif
}
#else
/* Adds the products of four rows with vector J of codes as numbers of 16 bits: two rows to `low`, two to `high`. */
#define MULTIPLY(J, LANE)                                                              \
    four = vreinterpretq_s8_s32(vdupq_laneq_s32(sixteen, LANE));                       \
    low = vmlal_s8(low, vget_low_s8((int8x16_t)codes[J]), vget_low_s8(four));          \
    high = vmlal_high_s8(high, (int8x16_t)codes[J], four);

/* Sums of four products stay within 16 bits, since codes have at most six: 4 * 63 * 127 < 2^15. */
INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    (void)bits;
    for (int first = 0; first < words; first += 4) {
        int32x4_t sixteen = vreinterpretq_s32_s8(vld1q_s8(x + 4 * first));
        int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);
        int8x16_t four;
        FOUR_STEPS(MULTIPLY, first)
        sum += (vi)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    }
    return sum;
}

/* Sums of two products are all that 16 bits hold of signed codes (see dot_bytes). */
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    for (int first = 0; first < words; first += 4) {
        int32x4_t sixteen = vreinterpretq_s32_s8(vld1q_s8(x + 4 * first));
        int32x4_t low_sums = vdupq_n_s32(0), high_sums = vdupq_n_s32(0);
        int16x8_t low, high;
        int8x16_t four;
#define PAIR(J, LANE)                                                                  \
    low = high = vdupq_n_s16(0);                                                       \
    MULTIPLY(J, LANE) MULTIPLY(J + 1, LANE + 1)                                        \
    low_sums = vpadalq_s16(low_sums, low);                                             \
    high_sums = vpadalq_s16(high_sums, high);
        PAIR(first, 0) PAIR(first + 2, 2)
#undef PAIR
        sum += (vi)vpaddq_s32(low_sums, high_sums);
    }
    return sum;
}
#endif

/* Places beyond the table, those with bit 7 among them, become 0. */
INLINE sixteen_bytes shuffle_bytes(sixteen_bytes bytes, sixteen_bytes from) {
    return (sixteen_bytes)vqtbl1q_u8((uint8x16_t)bytes, (uint8x16_t)from);
}

INLINE vw join_sixteens(const sixteen_bytes *parts) { return (vw)*parts; }

INLINE vf widen_halves(fk_type type, sixteen_bytes halves, int v) {
    if (type == FK_TYPE_F16) {
        const float16x8_t all = vreinterpretq_f16_u8((uint8x16_t)halves);
        return v ? (vf)vcvt_high_f32_f16(all) : (vf)vcvt_f32_f16(vget_low_f16(all));
    }
    const uint16x8_t all = vreinterpretq_u16_u8((uint8x16_t)halves);
    return v ? (vf)vshll_high_n_u16(all, 16) : (vf)vshll_n_u16(vget_low_u16(all), 16);
}

#include "../ops/table.h"
