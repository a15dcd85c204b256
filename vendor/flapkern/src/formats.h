/* The block formats: sizes, and scalar decoding. Layouts are ggml's (ggml-common.h). */
#ifndef FK_FORMATS_H
#define FK_FORMATS_H

#include "flapkern.h"
#include "half.h"

/* Values per block; 1 for types without. */
static inline size_t block_len(fk_type type) {
    switch (type) {
    case FK_TYPE_F32:
    case FK_TYPE_F16:
    case FK_TYPE_BF16:
        return 1;
    case FK_TYPE_Q2_K:
    case FK_TYPE_Q3_K:
    case FK_TYPE_Q4_K:
    case FK_TYPE_Q5_K:
    case FK_TYPE_Q6_K:
    case FK_TYPE_IQ4_XS:
        return FK_SUPER;
    default:
        return FK_BLOCK;
    }
}

static inline size_t block_bytes(fk_type type) {
    switch (type) {
    case FK_TYPE_F32: return 4;
    case FK_TYPE_F16:
    case FK_TYPE_BF16: return 2;
    case FK_TYPE_Q8_0: return 34;
    case FK_TYPE_Q4_0:
    case FK_TYPE_IQ4_NL: return 18;
    case FK_TYPE_Q4_1: return 20;
    case FK_TYPE_Q5_0: return 22;
    case FK_TYPE_Q5_1: return 24;
    case FK_TYPE_Q2_K: return 84;
    case FK_TYPE_Q3_K: return 110;
    case FK_TYPE_Q4_K: return 144;
    case FK_TYPE_Q5_K: return 176;
    case FK_TYPE_Q6_K: return 210;
    case FK_TYPE_IQ4_XS: return 136;
    }
    return 0;
}

/* The levels of IQ4_NL and IQ4_XS. */
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

/* Decodes one block. Sub-block s of a super-block is columns 32 s to 32 s + 31. */
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
    default:
        break;
    }
}

#endif
