/* Plain C with the compiler's vectors of four lanes: it runs on every processor, and the other sets are tested against it. */
#define FK_LANES 4
#include "../lanes.h"
#include "../half.h"
#include "flapkern.h"

#define GEMM_TOKENS 4
#define GEMM_VECTORS 2

INLINE vf load_half(const uint16_t *p) {
    vf v;
    for (int i = 0; i < FK_LANES; i++) v[i] = half_to_float(load_u16((const uint8_t *)(p + i)));
    return v;
}

INLINE float half_at(const uint8_t *p) { return half_to_float(load_u16(p)); }

INLINE void store_half(uint16_t *p, vf v) {
    for (int i = 0; i < FK_LANES; i++) p[i] = float_to_half(v[i]);
}

static float dot_q8_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    (void)sums;
    float total = 0;
    for (size_t b = 0; b < blocks; b++, row += 34, q += 32) {
        int32_t sum = 0;
        for (int i = 0; i < 32; i++) sum += (int8_t)row[2 + i] * q[i];
        total += half_to_float(load_u16(row)) * scales[b] * (float)sum;
    }
    return total;
}

static inline int32_t dot_nibbles(const uint8_t *packed, const int8_t *q) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += (packed[i] & 15) * q[i] + (packed[i] >> 4) * q[i + 16];
    return sum;
}

static float dot_q4_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    float total = 0;
    for (size_t b = 0; b < blocks; b++, row += 18, q += 32)
        total += half_to_float(load_u16(row)) * (scales[b] * (float)dot_nibbles(row + 2, q) - 8 * sums[b]);
    return total;
}

static float dot_q4_1(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks) {
    float total = 0;
    for (size_t b = 0; b < blocks; b++, row += 20, q += 32)
        total += half_to_float(load_u16(row)) * scales[b] * (float)dot_nibbles(row + 4, q) +
                 half_to_float(load_u16(row + 2)) * sums[b];
    return total;
}

#define PACKED_TOKENS 1
#define SIGNED_OFFSET 0

INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x) {
    (void)bits;
    for (int j = 0; j < words; j++)
        for (int row = 0; row < FK_LANES; row++)
            for (int i = 0; i < 4; i++) sum[row] += codes[j][4 * row + i] * x[4 * j + i];
    return sum;
}

INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x) {
    for (int j = 0; j < words; j++)
        for (int row = 0; row < FK_LANES; row++)
            for (int i = 0; i < 4; i++) sum[row] += (int8_t)codes[j][4 * row + i] * x[4 * j + i];
    return sum;
}

INLINE vw look_up(const int8_t *table, vw codes) {
    for (int i = 0; i < 4 * FK_LANES; i++) codes[i] = (uint8_t)table[codes[i]];
    return codes;
}

#define FK_OWN_EXPAND_LINE
INLINE void expand_line(const uint8_t *p, uint64_t mask, vw *line) {
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++, mask >>= 1) bytes[i] = mask & 1 ? *p++ : 0;
    memcpy(line, bytes, sizeof bytes);
}

#define FK_OWN_MASK_LINE
INLINE void mask_line(uint64_t mask, vw *line) {
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = mask >> i & 1;
    memcpy(line, bytes, sizeof bytes);
}

#define FK_OWN_HALVES_LINE
typedef struct halves_line {
    uint16_t half[4][FK_GROUP];
} halves_line;

INLINE void expand_halves(fk_type type, const uint8_t *p, const uint8_t *masks, halves_line *line) {
    (void)type;
    for (int i = 0; i < 4 * FK_GROUP; i++) {
        const int there = masks[i / 8] >> (i % 8) & 1;
        line->half[i / FK_GROUP][i % FK_GROUP] = there ? load_u16(p) : 0;
        p += 2 * there;
    }
}

INLINE vf column_of(fk_type type, const halves_line *line, int c, int v) {
    vf column;
    for (int i = 0; i < FK_LANES; i++) {
        const uint16_t half = line->half[c][v * FK_LANES + i];
        column[i] = type == FK_TYPE_F16 ? half_to_float(half) : bfloat_to_float(half);
    }
    return column;
}

#define FK_TABLE fk_table_generic
#define FK_NAME "generic"
#include "../ops/table.h"
