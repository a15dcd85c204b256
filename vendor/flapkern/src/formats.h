/* The formats of weights: their sizes, and decoding in plain C. Layouts are ggml's (ggml-common.h). */
#ifndef FK_FORMATS_H
#define FK_FORMATS_H

#include "flapkern.h"
#include "grids.h"
#include "half.h"

/* The types of weights, one line each; every list of types in this library is made from these.
 *
 * X(TYPE, VALUES, BYTES, BITS, OFFSET, SCALES, MINIMUM) for a type in blocks:
 *   VALUES    weights in a block
 *   BYTES     of a block
 *   BITS      of a code; 8 if codes are signed bytes, or indices of a table of signed bytes, and unsigned otherwise
 *   OFFSET    what is subtracted from a code before it is scaled
 *   SCALES    scales that 32 weights have: 1, or 2 if each half of them has its own
 *   MINIMUM   1 if a minimum comes with every scale: weight = scale * (code - OFFSET) + minimum
 */
#define FK_SMALL_BLOCK_TYPES(X)                 \
    X(Q8_0, FK_BLOCK, 34, 8, 0, 1, 0)           \
    X(Q4_0, FK_BLOCK, 18, 4, 8, 1, 0)           \
    X(Q4_1, FK_BLOCK, 20, 4, 0, 1, 1)           \
    X(Q5_0, FK_BLOCK, 22, 5, 16, 1, 0)          \
    X(Q5_1, FK_BLOCK, 24, 5, 0, 1, 1)           \
    X(IQ4_NL, FK_BLOCK, 18, 8, 0, 1, 0)

#define FK_SUPER_BLOCK_TYPES(X)                 \
    X(Q2_K, FK_SUPER, 84, 2, 0, 2, 1)           \
    X(Q3_K, FK_SUPER, 110, 3, 4, 2, 0)          \
    X(Q4_K, FK_SUPER, 144, 4, 0, 1, 1)          \
    X(Q5_K, FK_SUPER, 176, 5, 0, 1, 1)          \
    X(Q6_K, FK_SUPER, 210, 6, 32, 2, 0)         \
    X(IQ4_XS, FK_SUPER, 136, 8, 0, 1, 0)

#define FK_BLOCK_TYPES(X) FK_SMALL_BLOCK_TYPES(X) FK_SUPER_BLOCK_TYPES(X)

/* X(TYPE, VALUES, BYTES) for a type of plain floating-point numbers, whose blocks are single values. */
#define FK_FLOAT_TYPES(X) X(F32, 1, 4) X(F16, 1, 2) X(BF16, 1, 2)

/* X(TYPE, VALUES, BYTES) for a type in blocks that comes in native rows only. */
#define FK_ROW_TYPES(X)        \
    X(Q8_1, FK_BLOCK, 36)      \
    X(MXFP4, FK_BLOCK, 17)     \
    X(TQ1_0, FK_SUPER, 54)     \
    X(TQ2_0, FK_SUPER, 66)     \
    X(IQ1_S, FK_SUPER, 50)     \
    X(IQ1_M, FK_SUPER, 56)     \
    X(IQ2_XXS, FK_SUPER, 66)   \
    X(IQ2_XS, FK_SUPER, 74)    \
    X(IQ2_S, FK_SUPER, 82)     \
    X(IQ3_XXS, FK_SUPER, 98)   \
    X(IQ3_S, FK_SUPER, 110)

/* X(TYPE) for the types that weights can be sparse in. */
#define FK_SPARSE_BLOCK_TYPES(X) X(Q8_0) X(Q4_0) X(Q4_1) X(IQ4_NL) X(Q4_K)
#define FK_SPARSE_FLOAT_TYPES(X) X(F16) X(BF16)

/* X(TYPE) for the types that weights can be narrow in. */
#define FK_NARROW_TYPES(X) X(F16) X(BF16)

/* Values of a block. */
static inline size_t block_len(fk_type type) {
    switch (type) {
#define VALUES_OF(TYPE, VALUES, ...) \
    case FK_TYPE_##TYPE: return VALUES;
        FK_FLOAT_TYPES(VALUES_OF)
        FK_BLOCK_TYPES(VALUES_OF)
        FK_ROW_TYPES(VALUES_OF)
#undef VALUES_OF
    }
    return FK_BLOCK;
}

/* Bytes of a block. */
static inline size_t block_bytes(fk_type type) {
    switch (type) {
#define BYTES_OF(TYPE, VALUES, BYTES, ...) \
    case FK_TYPE_##TYPE: return BYTES;
        FK_FLOAT_TYPES(BYTES_OF)
        FK_BLOCK_TYPES(BYTES_OF)
        FK_ROW_TYPES(BYTES_OF)
#undef BYTES_OF
    }
    return 0;
}

/* What the 16 codes of IQ4_NL and IQ4_XS stand for. */
static const int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Scale and minimum of sub-block s (of 8) of Q4_K and Q5_K: 6 bits each in 12 bytes. */
static inline void scale_and_minimum(const uint8_t *packed, int s, int *scale, int *minimum) {
    if (s < 4) {
        *scale = packed[s] & 63;
        *minimum = packed[s + 4] & 63;
    } else {
        *scale = (packed[s + 4] & 15) | (packed[s - 4] >> 6) << 4;
        *minimum = packed[s + 4] >> 4 | (packed[s] >> 6) << 4;
    }
}

/* Scale k (of 16) of Q3_K: 6 bits in 12 bytes, off by 32. */
static inline int q3_scale(const uint8_t *packed, int k) {
    int low = k < 8 ? packed[k] & 15 : packed[k - 8] >> 4;
    int high = packed[8 + k % 4] >> (2 * (k / 4)) & 3;
    return (low | high << 4) - 32;
}

/* Scale of sub-block s (of 8) of IQ4_XS: 4 low bits in scales_low, 2 high ones in scales_high, off by 32. */
static inline int iq4_xs_scale(uint16_t scales_high, const uint8_t *scales_low, int s) {
    return ((scales_low[s / 2] >> (4 * (s % 2)) & 15) | (scales_high >> (2 * s) & 3) << 4) - 32;
}

/* What the codes 0 to 7 of MXFP4 stand for, doubled; the eighth bit is the sign. */
static const int8_t mxfp4_levels[8] = {0, 1, 2, 3, 4, 6, 8, 12};

/* 2^(e - 128). */
static inline float power_of_two(uint8_t e) {
    uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* The levels of the grids. */
static const int8_t iq1_levels[4] = {-1, 0, 1, 0};
static const int8_t iq2_levels[4] = {8, 25, 43, 0};
static const int8_t iq3_xxs_levels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const int8_t iq3_s_levels[8] = {1, 3, 5, 7, 9, 11, 13, 15};

/* Eight signs, given seven: an even number of bits is set. */
static inline int even_signs(int seven) {
    int parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & 1) << 7;
}

/* Eight values of IQ1: a group of the grid, moved by an eighth. */
static inline void iq1_values(uint16_t group, int down, float scale, float *out) {
    for (int j = 0; j < 8; j++)
        out[j] = scale * ((float)iq1_levels[group >> (2 * j) & 3] + (down ? -0.125f : 0.125f));
}

/* Eight values of IQ2: a group of the grid with signs. */
static inline void iq2_values(uint16_t group, int signs, float scale, float *out) {
    for (int j = 0; j < 8; j++) {
        float level = (float)iq2_levels[group >> (2 * j) & 3];
        out[j] = scale * (signs >> j & 1 ? -level : level);
    }
}

/* Four values of IQ3: a group of the grid with signs. */
static inline void iq3_values(const int8_t *levels, uint16_t group, int signs, float scale, float *out) {
    for (int j = 0; j < 4; j++) {
        float level = (float)levels[group >> (3 * j) & 7];
        out[j] = scale * (signs >> j & 1 ? -level : level);
    }
}

/* `bytes` bytes of TQ1_0 with `digits` digits of base 3 each, the highest first, which lie as planes. Returns the end. */
static inline float *ternary_values(const uint8_t *p, int bytes, int digits, float d, float *out) {
    int power = 1;
    for (int n = 0; n < digits; n++, power *= 3)
        for (int i = 0; i < bytes; i++) *out++ = d * (float)(((p[i] * power & 255) * 3 >> 8) - 1);
    return out;
}

/* Decodes one block at p to its 32 or 256 values; not for plain floats. Sub-block s of a super-block is columns 32 s to
 * 32 s + 31. */
static inline void decode_block(fk_type type, const uint8_t *p, float *out) {
    switch (type) {
    case FK_TYPE_Q8_0: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)p[2 + i];
        break;
    }
    case FK_TYPE_Q4_0: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)((p[2 + i] & 15) - 8);
            out[i + 16] = d * (float)((p[2 + i] >> 4) - 8);
        }
        break;
    }
    case FK_TYPE_Q4_1: {
        float d = half_to_float(load_u16(p)), m = half_to_float(load_u16(p + 2));
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(p[4 + i] & 15) + m;
            out[i + 16] = d * (float)(p[4 + i] >> 4) + m;
        }
        break;
    }
    case FK_TYPE_Q5_0:
    case FK_TYPE_Q5_1: {
        const int with_minimum = type == FK_TYPE_Q5_1;
        float d = half_to_float(load_u16(p)), m = with_minimum ? half_to_float(load_u16(p + 2)) : -16 * d;
        const uint8_t *fifth = p + (with_minimum ? 4 : 2), *codes = fifth + 4;
        for (int i = 0; i < 16; i++) {
            int low = (codes[i] & 15) | (fifth[i / 8] >> (i % 8) & 1) << 4;
            int high = codes[i] >> 4 | (fifth[2 + i / 8] >> (i % 8) & 1) << 4;
            out[i] = d * (float)low + m;
            out[i + 16] = d * (float)high + m;
        }
        break;
    }
    case FK_TYPE_IQ4_NL: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)iq4_levels[p[2 + i] & 15];
            out[i + 16] = d * (float)iq4_levels[p[2 + i] >> 4];
        }
        break;
    }
    case FK_TYPE_IQ4_XS: {
        float d = half_to_float(load_u16(p));
        for (int s = 0; s < 8; s++) {
            float scale = d * (float)iq4_xs_scale(load_u16(p + 2), p + 4, s);
            const uint8_t *codes = p + 8 + 16 * s;
            for (int i = 0; i < 16; i++) {
                out[32 * s + i] = scale * (float)iq4_levels[codes[i] & 15];
                out[32 * s + i + 16] = scale * (float)iq4_levels[codes[i] >> 4];
            }
        }
        break;
    }
    case FK_TYPE_Q4_K:
    case FK_TYPE_Q5_K: {
        const int five = type == FK_TYPE_Q5_K;
        float d = half_to_float(load_u16(p)), dmin = half_to_float(load_u16(p + 2));
        const uint8_t *fifth = p + 16, *codes = p + (five ? 48 : 16);
        for (int s = 0; s < 8; s++) {
            int scale, minimum;
            scale_and_minimum(p + 4, s, &scale, &minimum);
            for (int i = 0; i < 32; i++) {
                int code = codes[s / 2 * 32 + i] >> (4 * (s % 2)) & 15;
                if (five) code |= (fifth[i] >> s & 1) << 4;
                out[32 * s + i] = d * (float)scale * (float)code - dmin * (float)minimum;
            }
        }
        break;
    }
    case FK_TYPE_Q6_K: {
        const uint8_t *low = p, *high = p + 128, *scales = p + 192;
        float d = half_to_float(load_u16(p + 208));
        for (int s = 0; s < 8; s++) {
            int half = s / 4, k = s % 4;
            for (int i = 0; i < 32; i++) {
                int code = low[64 * half + k % 2 * 32 + i] >> (4 * (k / 2)) & 15;
                code |= (high[32 * half + i] >> (2 * k) & 3) << 4;
                out[32 * s + i] = d * (float)(int8_t)scales[2 * s + i / 16] * (float)(code - 32);
            }
        }
        break;
    }
    case FK_TYPE_Q2_K: {
        float d = half_to_float(load_u16(p + 80)), dmin = half_to_float(load_u16(p + 82));
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 32; i++) {
                int scales = p[2 * s + i / 16], code = p[16 + s / 4 * 32 + i] >> (2 * (s % 4)) & 3;
                out[32 * s + i] = d * (float)(scales & 15) * (float)code - dmin * (float)(scales >> 4);
            }
        break;
    }
    case FK_TYPE_Q3_K: {
        float d = half_to_float(load_u16(p + 108));
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 32; i++) {
                int code = (p[32 + s / 4 * 32 + i] >> (2 * (s % 4)) & 3) | (p[i] >> s & 1) << 2;
                out[32 * s + i] = d * (float)q3_scale(p + 96, 2 * s + i / 16) * (float)(code - 4);
            }
        break;
    }
    case FK_TYPE_Q8_1: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)p[4 + i];
        break;
    }
    case FK_TYPE_MXFP4: {
        float d = power_of_two(p[0]);
        for (int i = 0; i < 32; i++) {
            int code = p[1 + i % 16] >> (i / 16 * 4) & 15;
            float level = (float)mxfp4_levels[code & 7];
            out[i] = d * (code & 8 ? -level : level);
        }
        break;
    }
    case FK_TYPE_TQ1_0: {
        float d = half_to_float(load_u16(p + 52));
        out = ternary_values(p, 32, 5, d, out);
        out = ternary_values(p + 32, 16, 5, d, out);
        ternary_values(p + 48, 4, 4, d, out);
        break;
    }
    case FK_TYPE_TQ2_0: {
        float d = half_to_float(load_u16(p + 64));
        for (int i = 0; i < 256; i++) out[i] = d * (float)((p[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3) - 1);
        break;
    }
    case FK_TYPE_IQ1_S: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) {
            int high = load_u16(p + 34 + i / 4 * 2);
            float scale = d * (float)(1 + 2 * (high >> 12 & 7));
            iq1_values(iq1_grid[p[2 + i] | (high >> (i % 4 * 3) & 7) << 8], high >> 15, scale, out + 8 * i);
        }
        break;
    }
    case FK_TYPE_IQ1_M: {
        int bits = 0;
        for (int i = 0; i < 4; i++) bits |= (load_u16(p + 48 + 2 * i) >> 12) << (4 * i);
        float d = half_to_float((uint16_t)bits);
        for (int i = 0; i < 32; i++) {
            int high = p[32 + i / 2] >> (i % 2 * 4) & 15;
            float scale = d * (float)(1 + 2 * (load_u16(p + 48 + i / 8 * 2) >> (i / 2 % 4 * 3) & 7));
            iq1_values(iq1_grid[p[i] | (high & 7) << 8], high >> 3, scale, out + 8 * i);
        }
        break;
    }
    case FK_TYPE_IQ2_XXS: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) {
            const uint8_t *part = p + 2 + i / 4 * 8;
            uint32_t bits = load_u16(part + 4) | (uint32_t)load_u16(part + 6) << 16;
            float scale = d * (0.125f + 0.25f * (float)(bits >> 28));
            iq2_values(iq2_xxs_grid[part[i % 4]], even_signs(bits >> (i % 4 * 7) & 127), scale, out + 8 * i);
        }
        break;
    }
    case FK_TYPE_IQ2_XS: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) {
            int bits = load_u16(p + 2 + 2 * i);
            float scale = d * (0.125f + 0.25f * (float)(p[66 + i / 4] >> (i / 2 % 2 * 4) & 15));
            iq2_values(iq2_xs_grid[bits & 511], even_signs(bits >> 9), scale, out + 8 * i);
        }
        break;
    }
    case FK_TYPE_IQ2_S: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) {
            int high = p[66 + i / 4] >> (i % 4 * 2) & 3;
            float scale = d * (0.125f + 0.25f * (float)(p[74 + i / 4] >> (i / 2 % 2 * 4) & 15));
            iq2_values(iq2_s_grid[p[2 + i] | high << 8], p[34 + i], scale, out + 8 * i);
        }
        break;
    }
    case FK_TYPE_IQ3_XXS: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 32; i++) {
            const uint8_t *part = p + 66 + i / 4 * 4;
            uint32_t bits = load_u16(part) | (uint32_t)load_u16(part + 2) << 16;
            float scale = d * (0.25f + 0.5f * (float)(bits >> 28));
            int signs = even_signs(bits >> (i % 4 * 7) & 127);
            iq3_values(iq3_xxs_levels, iq3_xxs_grid[p[2 + 2 * i]], signs, scale, out + 8 * i);
            iq3_values(iq3_xxs_levels, iq3_xxs_grid[p[3 + 2 * i]], signs >> 4, scale, out + 8 * i + 4);
        }
        break;
    }
    case FK_TYPE_IQ3_S: {
        float d = half_to_float(load_u16(p));
        for (int i = 0; i < 64; i++) {
            int group = p[2 + i] | (p[66 + i / 8] >> (i % 8) & 1) << 8;
            float scale = d * (float)(1 + 2 * (p[106 + i / 16] >> (i / 8 % 2 * 4) & 15));
            iq3_values(iq3_s_levels, iq3_s_grid[group], p[74 + i / 2] >> (i % 2 * 4), scale, out + 4 * i);
        }
        break;
    }
    default:
        break;
    }
}

#endif
