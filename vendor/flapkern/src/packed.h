/* Packed rows times 8-bit activations, for one token and for many: a lane is a row, so that scales are vectors, nothing is
 * summed across lanes, and one load of codes serves FK_LANES rows. Included by body.h. */

#define GROUP_VECTORS (FK_GROUP / FK_LANES)

INLINE size_t block_bytes(fk_type type) { return type == FK_TYPE_Q8_0 ? 34 : type == FK_TYPE_Q4_0 ? 18 : 20; }

/* Vector v of a packed block's lines: eight vectors of unsigned or signed codes, four columns each. */
INLINE void load_codes(fk_type type, const uint8_t *lines, int v, vw codes[8]) {
    if (type == FK_TYPE_Q8_0) {
        UNROLL for (int j = 0; j < 8; j++) {
            memcpy(&codes[j], lines + 64 * j + 4 * FK_LANES * v, sizeof codes[j]);
            if (SIGNED_OFFSET) codes[j] ^= 0x80;
        }
        return;
    }
    UNROLL for (int j = 0; j < 4; j++) {
        vw both;
        memcpy(&both, lines + 64 * j + 4 * FK_LANES * v, sizeof both);
        codes[j] = both & 15;
        codes[j + 4] = both >> 4;
    }
}

/* What a sum of products with the stored codes has too much of, in units of the activations' sum. */
INLINE int code_offset(fk_type type) { return type == FK_TYPE_Q8_0 ? SIGNED_OFFSET : type == FK_TYPE_Q4_0 ? 8 : 0; }

/* out[t][0 .. FK_LANES) for vector v of one group and `tokens` tokens from token t0 on. `type` and `tokens` are constants
 * wherever this is inlined. */
INLINE void packed_tile(fk_type type, int tokens, const uint8_t *group, int v, const fk_activations *x, size_t t0,
                        float *out, size_t out_stride) {
    const size_t cols = x->cols, blocks = cols / FK_BLOCK;
    const int8_t *q = x->quantized + t0 * cols;
    const float *scales = x->scales + t0 * blocks, *block_sums = x->block_sums + t0 * blocks;
    const int32_t *code_sums = x->code_sums + t0 * blocks;
    vf total[PACKED_TOKENS];
    UNROLL for (int t = 0; t < tokens; t++) total[t] = (vf){0};
    for (size_t b = 0; b < blocks; b++, group += FK_GROUP * block_bytes(type)) {
        const uint8_t *lines = group + 2 * FK_GROUP * (type == FK_TYPE_Q4_1 ? 2 : 1);
        vf scale = load_half((const uint16_t *)group + v * FK_LANES);
        vf minimum = {0};
        if (type == FK_TYPE_Q4_1) minimum = load_half((const uint16_t *)group + FK_GROUP + v * FK_LANES);
        vw codes[8];
        load_codes(type, lines, v, codes);
        UNROLL for (int t = 0; t < tokens; t++) {
            const int8_t *xb = q + t * cols + b * FK_BLOCK;
            const size_t at = t * blocks + b;
            vi sum = (vi){0} - code_offset(type) * code_sums[at];
            sum = type == FK_TYPE_Q8_0 ? dot_block_signed(sum, codes, xb) : dot_block_nibbles(sum, codes, xb);
            total[t] += __builtin_convertvector(sum, vf) * (scale * scales[at]);
            if (type == FK_TYPE_Q4_1) total[t] += minimum * block_sums[at];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) store(out + t * out_stride, total[t]);
}

INLINE void packed_group(fk_type type, const uint8_t *group, const fk_activations *x, float *out, size_t out_stride) {
    for (int v = 0; v < GROUP_VECTORS; v++, out += FK_LANES) {
        size_t t = 0;
        for (; t + PACKED_TOKENS <= x->tokens; t += PACKED_TOKENS)
            packed_tile(type, PACKED_TOKENS, group, v, x, t, out + t * out_stride, out_stride);
        for (; t + 4 <= x->tokens && PACKED_TOKENS > 4; t += 4)
            packed_tile(type, 4, group, v, x, t, out + t * out_stride, out_stride);
        for (; t + 2 <= x->tokens && PACKED_TOKENS > 2; t += 2)
            packed_tile(type, 2, group, v, x, t, out + t * out_stride, out_stride);
        for (; t < x->tokens; t++) packed_tile(type, 1, group, v, x, t, out + t * out_stride, out_stride);
    }
}

/* Rows [begin, end), both multiples of FK_GROUP. */
static void packed_rows(const fk_weights *w, size_t begin, size_t end, const fk_activations *x, float *out,
                        size_t out_stride) {
    for (size_t row = begin; row < end; row += FK_GROUP) {
        const uint8_t *group = w->data + row * w->row_bytes;
        float *to = out + row;
        switch (w->type) {
        case FK_TYPE_Q8_0: packed_group(FK_TYPE_Q8_0, group, x, to, out_stride); break;
        case FK_TYPE_Q4_0: packed_group(FK_TYPE_Q4_0, group, x, to, out_stride); break;
        default: packed_group(FK_TYPE_Q4_1, group, x, to, out_stride);
        }
    }
}
