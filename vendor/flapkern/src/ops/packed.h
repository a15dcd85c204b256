/* Products of packed rows of the types in blocks and 8-bit activations, for one token and for many. Included by table.h.
 *
 * A lane is a row, so that scales are vectors, nothing is summed across lanes, and one load of codes serves FK_LANES rows.
 * Every format is read as blocks of 32 columns: eight vectors of codes, four columns each, with a scale (and minimum) for the
 * block or for each half of it. `type` is a constant wherever functions with that parameter are inlined. */

/* Vectors that hold one value of each row of a group. */
#define GROUP_VECTORS (FK_GROUP / FK_LANES)

/* 32 columns of FK_LANES rows: weight = scale[half] * (code - code_offset) + minimum[half]. */
typedef struct packed_block {
    vw codes[8];
    vf scale[2];
    vf minimum[2];
} packed_block;

/* Whether the halves of a block have scales of their own. */
INLINE int has_half_scales(fk_type type) {
#define OR_IS(TYPE, VALUES, BYTES, BITS, OFFSET, SCALES, MINIMUM) || (SCALES == 2 && type == FK_TYPE_##TYPE)
    return 0 FK_BLOCK_TYPES(OR_IS);
#undef OR_IS
}

/* Whether every scale comes with a minimum. */
INLINE int has_minimum(fk_type type) {
#define OR_IS(TYPE, VALUES, BYTES, BITS, OFFSET, SCALES, MINIMUM) || (MINIMUM && type == FK_TYPE_##TYPE)
    return 0 FK_BLOCK_TYPES(OR_IS);
#undef OR_IS
}

/* Whether codes are signed bytes; the others are unsigned, of as many bits as code_bits says. */
INLINE int has_signed_codes(fk_type type) {
#define OR_IS(TYPE, VALUES, BYTES, BITS, OFFSET, SCALES, MINIMUM) || (BITS == 8 && type == FK_TYPE_##TYPE)
    return 0 FK_BLOCK_TYPES(OR_IS);
#undef OR_IS
}

INLINE int code_bits(fk_type type) {
    switch (type) {
#define BITS_OF(TYPE, VALUES, BYTES, BITS, ...) \
    case FK_TYPE_##TYPE: return BITS;
        FK_BLOCK_TYPES(BITS_OF)
#undef BITS_OF
    default: return 0;
    }
}

/* What is subtracted from a code, in the form in which it is multiplied. */
INLINE int code_offset(fk_type type) {
    if (has_signed_codes(type)) return SIGNED_OFFSET;
    switch (type) {
#define OFFSET_OF(TYPE, VALUES, BYTES, BITS, OFFSET, ...) \
    case FK_TYPE_##TYPE: return OFFSET;
        FK_BLOCK_TYPES(OFFSET_OF)
#undef OFFSET_OF
    default: return 0;
    }
}

/* Vector v of a line of 64 bytes: four columns of FK_LANES rows. */
INLINE vw load_line(const uint8_t *lines, int line, int v) {
    vw w;
    memcpy(&w, lines + 64 * line + 4 * FK_LANES * v, sizeof w);
    return w;
}

/* Vector v of a field of half-precision numbers, one for each row. */
INLINE vf load_halves(const uint8_t *field, int v) { return load_half((const uint16_t *)(field + 2 * FK_LANES * v)); }

/* Vector v of a field of unsigned bytes, one for each row. */
INLINE vi load_bytes(const uint8_t *field, int v) { return widen_bytes(field + FK_LANES * v); }

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* The nibbles of four lines from `first` on: the low ones are columns 0 to 15, the high ones 16 to 31. */
INLINE void split_nibbles(const uint8_t *lines, int first, int v, vw codes[8]) {
    UNROLL for (int j = 0; j < 4; j++) {
        vw both = load_line(lines, first + j, v);
        codes[j] = both & 15;
        codes[j + 4] = both >> 4;
    }
}

/* 16 in every byte that has bit `bit` set, else 0. */
INLINE vw fifth_bit(vw bytes, int bit) { return bit < 4 ? bytes << (4 - bit) & 16 : bytes >> (bit - 4) & 16; }

/* Signed codes in the form in which dot_signed takes them. */
INLINE vw as_signed(vw codes) { return SIGNED_OFFSET ? codes ^ 0x80 : codes; }

/* The fifth bits of columns 4 j to 4 j + 3 as 16 in each of four bytes, from a row's bits 4 j to 4 j + 3. The multiplication
 * puts copies of the four bits at bits 4, 11, 18 and 25, so that bit i of them comes to bit 8 i + 4. A file whose instruction
 * set has a faster way defines FK_OWN_SPREAD and this function. */
#ifndef FK_OWN_SPREAD
INLINE vw spread_fifth_bits(vu bits, int j) { return (vw)((bits >> (4 * j) & 15) * 0x02040810u & 0x10101010u); }
#endif

/* Loads the scale, and the minimum, of columns 32 s to 32 s + 31 of vector v of a packed block at p, for types whose fields for
 * these come before their codes. */
INLINE void load_scale(fk_type type, const uint8_t *p, int s, int v, packed_block *b) {
    b->scale[0] = load_halves(p, v);
    if (type == FK_TYPE_Q4_1) b->minimum[0] = load_halves(p + 32, v);
    if (type == FK_TYPE_Q4_K || type == FK_TYPE_Q5_K) {
        const uint8_t *scales = p + 64;
        vi scale, minimum;
        if (s < 4) {
            scale = load_bytes(scales + 16 * s, v) & 63;
            minimum = load_bytes(scales + 16 * (s + 4), v) & 63;
        } else {
            vi both = load_bytes(scales + 16 * (s + 4), v);
            scale = (both & 15) | load_bytes(scales + 16 * (s - 4), v) >> 6 << 4;
            minimum = both >> 4 | load_bytes(scales + 16 * s, v) >> 6 << 4;
        }
        b->scale[0] *= to_float(scale);
        b->minimum[0] = -load_halves(p + 32, v) * to_float(minimum);
    }
}

/* Loads columns 32 s to 32 s + 31 of vector v of a packed block at p; s is 0 for types whose blocks have 32. */
INLINE void load_block(fk_type type, const uint8_t *p, int s, int v, packed_block *b) {
    switch (type) {
    case FK_TYPE_Q8_0:
        load_scale(type, p, s, v, b);
        UNROLL for (int j = 0; j < 8; j++) b->codes[j] = as_signed(load_line(p + 32, j, v));
        break;
    case FK_TYPE_Q4_0:
        load_scale(type, p, s, v, b);
        split_nibbles(p + 32, 0, v, b->codes);
        break;
    case FK_TYPE_Q4_1:
        load_scale(type, p, s, v, b);
        split_nibbles(p + 64, 0, v, b->codes);
        break;
    case FK_TYPE_Q5_0:
    case FK_TYPE_Q5_1: {
        const uint8_t *fifth = p + (type == FK_TYPE_Q5_1 ? 64 : 32);
        b->scale[0] = load_halves(p, v);
        if (type == FK_TYPE_Q5_1) b->minimum[0] = load_halves(p + 32, v);
        split_nibbles(fifth + 64, 0, v, b->codes);
        vu bits = (vu)load_line(fifth, 0, v);
        UNROLL for (int j = 0; j < 8; j++) b->codes[j] |= spread_fifth_bits(bits, j);
        break;
    }
    case FK_TYPE_IQ4_NL:
        load_scale(type, p, s, v, b);
        split_nibbles(p + 32, 0, v, b->codes);
        UNROLL for (int j = 0; j < 8; j++) b->codes[j] = as_signed(look_up(iq4_levels, b->codes[j]));
        break;
    case FK_TYPE_IQ4_XS: {
        vi high = widen_shorts(p + 32 + 2 * FK_LANES * v);
        vi low = load_bytes(p + 64 + 16 * (s / 2), v) >> (4 * (s % 2)) & 15;
        b->scale[0] = load_halves(p, v) * to_float((low | (high >> (2 * s) & 3) << 4) - 32);
        split_nibbles(p + 128, 4 * s, v, b->codes);
        UNROLL for (int j = 0; j < 8; j++) b->codes[j] = as_signed(look_up(iq4_levels, b->codes[j]));
        break;
    }
    case FK_TYPE_Q4_K:
    case FK_TYPE_Q5_K: {
        const uint8_t *fifth = p + 64 + 192;
        const uint8_t *lines = type == FK_TYPE_Q5_K ? fifth + 8 * 64 : fifth;
        load_scale(type, p, s, v, b);
        UNROLL for (int j = 0; j < 8; j++) {
            vw both = load_line(lines, s / 2 * 8 + j, v);
            b->codes[j] = s % 2 ? both >> 4 : both & 15;
            if (type == FK_TYPE_Q5_K) b->codes[j] |= fifth_bit(load_line(fifth, j, v), s);
        }
        break;
    }
    case FK_TYPE_Q6_K: {
        const uint8_t *high = p + 32 * 64, *scales = high + 16 * 64, *d = scales + 16 * 16;
        const int half = s / 4, k = s % 4;
        UNROLL for (int i = 0; i < 2; i++) {
            vi scale = widen_signed(scales + 16 * (2 * s + i) + FK_LANES * v);
            b->scale[i] = load_halves(d, v) * to_float(scale);
        }
        UNROLL for (int j = 0; j < 8; j++) {
            vw low = load_line(p, 16 * half + k % 2 * 8 + j, v);
            vw two = load_line(high, 8 * half + j, v) >> (2 * k) & 3;
            b->codes[j] = (k / 2 ? low >> 4 : low & 15) | two << 4;
        }
        break;
    }
    case FK_TYPE_Q2_K: {
        const uint8_t *lines = p + 16 * 16, *d = lines + 16 * 64;
        UNROLL for (int i = 0; i < 2; i++) {
            vi both = load_bytes(p + 16 * (2 * s + i), v);
            b->scale[i] = load_halves(d, v) * to_float(both & 15);
            b->minimum[i] = -load_halves(d + 32, v) * to_float(both >> 4);
        }
        UNROLL for (int j = 0; j < 8; j++) b->codes[j] = load_line(lines, s / 4 * 8 + j, v) >> (2 * (s % 4)) & 3;
        break;
    }
    case FK_TYPE_Q3_K: {
        const uint8_t *lines = p + 8 * 64, *scales = lines + 16 * 64, *d = scales + 12 * 16;
        UNROLL for (int i = 0; i < 2; i++) {
            const int k = 2 * s + i;
            vi low = load_bytes(scales + 16 * (k % 8), v) >> (k < 8 ? 0 : 4) & 15;
            vi high = load_bytes(scales + 16 * (8 + k % 4), v) >> (2 * (k / 4)) & 3;
            b->scale[i] = load_halves(d, v) * to_float((low | high << 4) - 32);
        }
        UNROLL for (int j = 0; j < 8; j++) {
            vw third = load_line(p, j, v) >> s & 1;
            b->codes[j] = (load_line(lines, s / 4 * 8 + j, v) >> (2 * (s % 4)) & 3) | third << 2;
        }
        break;
    }
    default:
        break;
    }
}

/* Loads the eight parts of a super-block: one function a type, in which every shift is by a constant. */
#define SUPER_BLOCK(TYPE, ...)                                                                                         \
    static __attribute__((noinline)) void load_super_##TYPE(const uint8_t *p, int v, packed_block w[8]) {              \
        UNROLL for (int s = 0; s < 8; s++) load_block(FK_TYPE_##TYPE, p, s, v, &w[s]);                                 \
    }
FK_SUPER_BLOCK_TYPES(SUPER_BLOCK)
#undef SUPER_BLOCK

INLINE void load_super_block(fk_type type, const uint8_t *p, int v, packed_block w[8]) {
    switch (type) {
#define SUPER_BLOCK(TYPE, ...) \
    case FK_TYPE_##TYPE: load_super_##TYPE(p, v, w); break;
        FK_SUPER_BLOCK_TYPES(SUPER_BLOCK)
#undef SUPER_BLOCK
    default: break;
    }
}

/* sum + the products of `words` vectors of codes with as many times four activations: half a block, or all of it. */
INLINE vi dot_codes(fk_type type, vi sum, const vw *codes, int words, const int8_t *x) {
    if (has_signed_codes(type)) return dot_signed(sum, codes, words, x);
    return dot_unsigned(sum, codes, words, code_bits(type), x);
}

/* Tokens whose products with a block take turns, so that none waits for its own last one; whole numbers of these make a tile. */
#if FK_VNNI && FK_LANES == 16
#define TOKENS_SIDE_BY_SIDE 4
#else
/* More than a tile has: no tokens do. */
#define TOKENS_SIDE_BY_SIDE (PACKED_TOKENS + 1)
#endif

/* Scales of a block of weights. */
INLINE int scales_of(fk_type type) { return has_half_scales(type) ? 2 : 1; }

/* What the minimum of half i of a block of weights, or of the block, is multiplied by: half i of block `at` of the activations, or
 * the block. */
INLINE float sum_for_minimum(fk_type type, int x_parts, const fk_activations *x, size_t at, int i) {
    if (scales_of(type) > x_parts) return x->scales[at] * (float)x->code_sums[2 * at + i];
    return x->scaled_sums[x_parts * at + i];
}

/* total[t] += one block of weights times block `block` of token t0 + t, for t < `tokens`, in two halves if weights or activations
 * have scales for these. `x_parts` is how many scales a block of activations has. `kept` is 0, or eight vectors of bytes that are 1
 * where there is a weight, and 0 elsewhere: there the minimum does not count. (tokens and x_parts are constants.) */
INLINE void multiply_tokens(fk_type type, int x_parts, int tokens, const packed_block *w, const vw *kept, const fk_activations *x,
                            size_t t0, size_t block, vf *total) {
    const size_t blocks = x->cols / FK_BLOCK;
    const int w_parts = scales_of(type), parts = w_parts > x_parts ? w_parts : x_parts, words = 8 / parts;
    const int8_t *q = x->quantized + t0 * x->cols + block * FK_BLOCK;
    /* Words that follow each other in one token's sum; where others take turns with it, one. */
    const int run = tokens == 1 ? words : 1;
    UNROLL for (int i = 0; i < parts; i++) {
        vi sum[PACKED_TOKENS];
        UNROLL for (int t = 0; t < tokens; t++) {
            const int32_t *sums = x->code_sums + 2 * ((t0 + t) * blocks + block);
            sum[t] = (vi){0} - code_offset(type) * (parts > 1 ? sums[i] : sums[0] + sums[1]);
        }
        UNROLL for (int j = words * i; j < words * (i + 1); j += run)
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t] = dot_codes(type, sum[t], w->codes + j, run, q + t * x->cols + 4 * j);
        UNROLL for (int t = 0; t < tokens; t++) {
            const size_t at = (t0 + t) * blocks + block;
            const float scale = x->scales[x_parts * at + (x_parts > 1 ? i : 0)];
            total[t] += to_float(sum[t]) * (w->scale[w_parts > 1 ? i : 0] * scale);
            if (!has_minimum(type)) continue;
            if (kept)
                total[t] += w->minimum[0] *
                            (to_float(dot_unsigned((vi){0}, kept + words * i, words, 1, q + t * x->cols + 4 * words * i)) * scale);
            else
                total[t] += w->minimum[w_parts > 1 ? i : 0] * sum_for_minimum(type, x_parts, x, at, i);
        }
    }
}

/* multiply_tokens for as many tokens as a tile has, TOKENS_SIDE_BY_SIDE or one at a time. */
INLINE void multiply_block(fk_type type, int x_parts, int tokens, const packed_block *w, const vw *kept, const fk_activations *x,
                           size_t t0, size_t block, vf *total) {
    const int side_by_side = tokens % TOKENS_SIDE_BY_SIDE == 0 && !kept ? TOKENS_SIDE_BY_SIDE : 1;
    UNROLL for (int t = 0; t < tokens; t += side_by_side)
        multiply_tokens(type, x_parts, side_by_side, w, kept, x, t0 + t, block, total + t);
}

/* Puts sums in their place; with `add`, adds them to what is there. */
INLINE void put_sums(float *out, vf sums, int add) { store(out, add ? load(out) + sums : sums); }

/* out[t][0 .. FK_LANES) = the products of vector v of one group and token t0 + t, for t < `tokens` (a constant); or they are added. */
INLINE void packed_tile(fk_type type, int tokens, const uint8_t *group, int v, const fk_activations *x, size_t t0, int add,
                        float *out, size_t out_stride) {
    vf total[PACKED_TOKENS];
    UNROLL for (int t = 0; t < tokens; t++) total[t] = (vf){0};
    for (size_t block = 0; block < x->cols / FK_BLOCK; group += FK_GROUP * block_bytes(type)) {
        packed_block w;
        if (block_len(type) == FK_SUPER) {
            packed_block all[8];
            load_super_block(type, group, v, all);
            /* One copy of the multiplication: eight would only fill the instruction cache. */
            _Pragma("GCC unroll 1") for (int s = 0; s < 8; s++, block++)
                multiply_block(type, 1, tokens, &all[s], 0, x, t0, block, total);
        } else {
            load_block(type, group, 0, v, &w);
            multiply_block(type, 1, tokens, &w, 0, x, t0, block, total);
            block++;
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) put_sums(out + t * out_stride, total[t], add);
}

/* The columns whose blocks are decoded together when they serve several tiles of tokens. */
#define DECODED_COLS 2048

/* Vectors of a block that is kept decoded: its codes, and the scales and minima that its type has. */
INLINE size_t decoded_vectors(fk_type type) {
    const int parts = scales_of(type);
    return 8 + parts + (has_minimum(type) ? parts : 0);
}

/* Whether blocks of two groups are multiplied by the same activations at a time: where a group is a vector and there are registers for
 * it. */
#if FK_VNNI && FK_LANES == 16
#define PAIR_GROUPS 1
#else
#define PAIR_GROUPS 0
#endif

/* Floats of scratch for the decoded blocks of as many groups as are multiplied together, and room to align them. */
#define DECODED_SCRATCH ((1 + PAIR_GROUPS) * DECODED_COLS / FK_BLOCK * GROUP_VECTORS * 12 * FK_LANES + 16)

/* Keeps a decoded block. */
INLINE void store_block(fk_type type, const packed_block *w, vf *to) {
    const int parts = scales_of(type);
    UNROLL for (int j = 0; j < 8; j++) to[j] = (vf)w->codes[j];
    UNROLL for (int i = 0; i < parts; i++) to[8 + i] = w->scale[i];
    if (has_minimum(type))
        UNROLL for (int i = 0; i < parts; i++) to[8 + parts + i] = w->minimum[i];
}

/* Takes a decoded block back. */
INLINE void reload_block(fk_type type, const vf *from, packed_block *w) {
    const int parts = scales_of(type);
    UNROLL for (int j = 0; j < 8; j++) w->codes[j] = (vw)from[j];
    UNROLL for (int i = 0; i < parts; i++) w->scale[i] = from[8 + i];
    if (has_minimum(type))
        UNROLL for (int i = 0; i < parts; i++) w->minimum[i] = from[8 + parts + i];
}

/* packed_tile for blocks [first, first + blocks), which are decoded, behind each of them `kept` vectors (0 or 8, a constant) of
 * the weights that there are. Goes on with the sums that out holds unless `first` is 0; with `add`, which takes that these are all
 * blocks, the sums are added to what is there. */
INLINE void decoded_tile(fk_type type, int x_parts, int tokens, const vf *decoded, int kept, size_t first, size_t blocks,
                         const fk_activations *x, size_t t0, int add, float *out, size_t out_stride) {
    vf total[PACKED_TOKENS];
    UNROLL for (int t = 0; t < tokens; t++) total[t] = first == 0 ? (vf){0} : load(out + t * out_stride);
    for (size_t block = first; block < first + blocks; block++, decoded += decoded_vectors(type) + kept) {
        packed_block w;
        reload_block(type, decoded, &w);
        multiply_block(type, x_parts, tokens, &w, kept ? (const vw *)(decoded + decoded_vectors(type)) : 0, x, t0, block, total);
    }
    UNROLL for (int t = 0; t < tokens; t++) put_sums(out + t * out_stride, total[t], add);
}

/* The products of one vector of rows and all tokens, tile by tile; see decoded_tile. */
INLINE void decoded_tiles(fk_type type, int x_parts, const vf *decoded, int kept, size_t first, size_t blocks, const fk_activations *x,
                           int add, float *out, size_t out_stride) {
    size_t t = 0;
    for (; t + PACKED_TOKENS <= x->tokens; t += PACKED_TOKENS)
        decoded_tile(type, x_parts, PACKED_TOKENS, decoded, kept, first, blocks, x, t, add, out + t * out_stride, out_stride);
#if PACKED_TOKENS > 4
    for (; t + 4 <= x->tokens; t += 4)
        decoded_tile(type, x_parts, 4, decoded, kept, first, blocks, x, t, add, out + t * out_stride, out_stride);
#endif
    for (; t < x->tokens; t++)
        decoded_tile(type, x_parts, 1, decoded, kept, first, blocks, x, t, add, out + t * out_stride, out_stride);
}

/* decoded_tiles with as many scales for a block as the activations have. */
INLINE void decoded_vector(fk_type type, const vf *decoded, int kept, size_t first, size_t blocks, const fk_activations *x, int add,
                           float *out, size_t out_stride) {
    if (x->halves)
        decoded_tiles(type, 2, decoded, kept, first, blocks, x, add, out, out_stride);
    else
        decoded_tiles(type, 1, decoded, kept, first, blocks, x, add, out, out_stride);
}

#if PAIR_GROUPS
/* Tokens whose sums with two groups stay in registers. */
#define PAIRED_TOKENS 6

/* decoded_tile for two groups, whose blocks are decoded in turns: what is read of a token serves both. */
INLINE void paired_tile(fk_type type, int x_parts, int tokens, const vf *decoded, size_t first, size_t blocks, const fk_activations *x,
                        size_t t0, int add, float *out, size_t out_stride) {
    const size_t x_blocks = x->cols / FK_BLOCK;
    const int w_parts = scales_of(type), parts = w_parts > x_parts ? w_parts : x_parts, words = 8 / parts;
    const int8_t *q = x->quantized + t0 * x->cols + first * FK_BLOCK;
    const int32_t *code_sums = x->code_sums + 2 * (t0 * x_blocks + first);
    vf total[PAIRED_TOKENS][2];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int g = 0; g < 2; g++)
            total[t][g] = first == 0 ? (vf){0} : load(out + t * out_stride + g * FK_GROUP);
    for (size_t block = 0; block < blocks; block++, decoded += 2 * decoded_vectors(type)) {
        const vf *groups[2] = {decoded, decoded + decoded_vectors(type)};
        UNROLL for (int i = 0; i < parts; i++) {
            vi sum[PAIRED_TOKENS][2];
            UNROLL for (int t = 0; t < tokens; t++) {
                const int32_t *sums = code_sums + 2 * (t * x_blocks + block);
                sum[t][0] = sum[t][1] = (vi){0} - code_offset(type) * (parts > 1 ? sums[i] : sums[0] + sums[1]);
            }
            UNROLL for (int j = words * i; j < words * (i + 1); j++) {
                const vw codes[2] = {(vw)groups[0][j], (vw)groups[1][j]};
                UNROLL for (int t = 0; t < tokens; t++)
                    UNROLL for (int g = 0; g < 2; g++)
                        sum[t][g] = dot_codes(type, sum[t][g], &codes[g], 1, q + t * x->cols + block * FK_BLOCK + 4 * j);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                const size_t at = (t0 + t) * x_blocks + first + block;
                const float scale = x->scales[x_parts * at + (x_parts > 1 ? i : 0)];
                const int of_weights = w_parts > 1 ? i : 0;
                UNROLL for (int g = 0; g < 2; g++) {
                    total[t][g] += to_float(sum[t][g]) * (groups[g][8 + of_weights] * scale);
                    if (has_minimum(type))
                        total[t][g] += groups[g][8 + w_parts + of_weights] * sum_for_minimum(type, x_parts, x, at, i);
                }
            }
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int g = 0; g < 2; g++) put_sums(out + t * out_stride + g * FK_GROUP, total[t][g], add);
}

/* The most tokens that wait for the weights that come next, unless these are asked for. */
#define WAITING_TOKENS 128

/* The products of two groups and all tokens, tile by tile. Meanwhile the `bytes` bytes from `next` on are brought into the second-level
 * cache, if there are few tokens. */
INLINE void paired_groups(fk_type type, int x_parts, const vf *decoded, size_t first, size_t blocks, const fk_activations *x, int add,
                          float *out, size_t out_stride, const uint8_t *next, size_t bytes) {
    const size_t share = (bytes / (x->tokens / PAIRED_TOKENS + 1) + 64) / 64 * 64;
    const uint8_t *end = next + (x->tokens <= WAITING_TOKENS ? bytes : 0);
    size_t t = 0;
    for (; t + PAIRED_TOKENS <= x->tokens; t += PAIRED_TOKENS) {
        for (const uint8_t *upto = next + share; next < upto && next < end; next += 64) __builtin_prefetch(next, 0, 2);
        paired_tile(type, x_parts, PAIRED_TOKENS, decoded, first, blocks, x, t, add, out + t * out_stride, out_stride);
    }
    for (; t + 2 <= x->tokens; t += 2)
        paired_tile(type, x_parts, 2, decoded, first, blocks, x, t, add, out + t * out_stride, out_stride);
    for (; t < x->tokens; t++) paired_tile(type, x_parts, 1, decoded, first, blocks, x, t, add, out + t * out_stride, out_stride);
}
#endif

/* Decodes `blocks` blocks of 32 columns of vector v of a group from p on, `stride` vectors apart. */
INLINE void decode_blocks(fk_type type, const uint8_t *p, int v, size_t blocks, vf *to, size_t stride) {
    const int parts = (int)(block_len(type) / FK_BLOCK);
    for (size_t block = 0; block < blocks; p += FK_GROUP * block_bytes(type)) {
        packed_block w[8];
        if (parts > 1)
            load_super_block(type, p, v, w);
        else
            load_block(type, p, 0, v, w);
        for (int s = 0; s < parts; s++, block++, to += stride) store_block(type, &w[s], to);
    }
}

/* The products of `groups` groups that follow each other, one or two, and more tokens than fit in a tile: every block is decoded
 * once for all of them. */
INLINE void decoded_groups(fk_type type, int groups, const uint8_t *group, const fk_activations *x, int add, float *out,
                           size_t out_stride, float *scratch) {
    vf *decoded = (vf *)aligned(scratch);
    const size_t all = x->cols / FK_BLOCK, vectors = decoded_vectors(type);
    for (size_t first = 0; first < all; first += DECODED_COLS / FK_BLOCK) {
        const size_t blocks = all - first < DECODED_COLS / FK_BLOCK ? all - first : DECODED_COLS / FK_BLOCK;
        const uint8_t *from = group + first * FK_BLOCK / block_len(type) * block_bytes(type) * FK_GROUP;
        (void)groups;
#if PAIR_GROUPS
        if (groups == 2) {
            const size_t step = x->cols / block_len(type) * block_bytes(type) * FK_GROUP;
            for (int g = 0; g < 2; g++) decode_blocks(type, from + g * step, 0, blocks, decoded + g * vectors, 2 * vectors);
            /* What is decoded next: the following columns of these groups, or else the next two groups. */
            const size_t bytes = (size_t)(blocks * FK_BLOCK / block_len(type)) * block_bytes(type) * FK_GROUP;
            const int last = first + blocks == all;
            const uint8_t *next = last ? group + 2 * step : from + bytes;
            if (x->halves)
                paired_groups(type, 2, decoded, first, blocks, x, add, out, out_stride, next, last ? 2 * step : bytes);
            else
                paired_groups(type, 1, decoded, first, blocks, x, add, out, out_stride, next, last ? 2 * step : bytes);
            continue;
        }
#endif
        for (int v = 0; v < GROUP_VECTORS; v++)
            decode_blocks(type, from, v, blocks, decoded + v * blocks * vectors, vectors);
        for (int v = 0; v < GROUP_VECTORS; v++)
            decoded_vector(type, decoded + v * blocks * vectors, 0, first, blocks, x, add, out + v * FK_LANES, out_stride);
    }
}

/* The products of one group, or of two where PAIR_GROUPS is set and there are more than PACKED_TOKENS tokens, and any number of
 * tokens. Scratch is for more tokens than that, and for halves. */
INLINE void packed_groups(fk_type type, int groups, const uint8_t *group, const fk_activations *x, int add, float *out,
                          size_t out_stride, float *scratch) {
    if (x->tokens > PACKED_TOKENS || x->halves) {
        decoded_groups(type, groups, group, x, add, out, out_stride, scratch);
        return;
    }
    for (int v = 0; v < GROUP_VECTORS; v++, out += FK_LANES) {
        size_t t = 0;
#if PACKED_TOKENS > 4
        if (x->tokens == PACKED_TOKENS) {
            packed_tile(type, PACKED_TOKENS, group, v, x, 0, add, out, out_stride);
            continue;
        }
#endif
#if PACKED_TOKENS > 8
        for (; t + 8 <= x->tokens; t += 8) packed_tile(type, 8, group, v, x, t, add, out + t * out_stride, out_stride);
#endif
#if PACKED_TOKENS >= 4
        for (; t + 4 <= x->tokens; t += 4) packed_tile(type, 4, group, v, x, t, add, out + t * out_stride, out_stride);
#endif
        for (; t < x->tokens; t++) packed_tile(type, 1, group, v, x, t, add, out + t * out_stride, out_stride);
    }
}

/* The most groups that one token's product passes through side by side, a block of each in turn, and how many blocks ahead
 * each is fetched where the processor does not do that by itself. Super-blocks are long, so that half as many streams and one
 * block ahead suffice. docs/speed.md has the measurements. */
#define STREAMS 6
#define AHEAD 4

INLINE size_t streams_of(fk_type type, const fk_reading *how) {
    const size_t streams = how->streams < 1 ? 1 : how->streams > STREAMS ? STREAMS : how->streams;
    return block_len(type) == FK_SUPER ? (streams + 1) / 2 : streams;
}

/* Asks for `bytes` (a constant) from p on to be brought into the cache. */
INLINE void fetch(const uint8_t *p, size_t bytes) {
    UNROLL for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

/* out[g][0 .. FK_GROUP) = the products of `count` <= STREAMS groups and one token; with `fetches`, weights are asked for ahead. */
INLINE void packed_streams(fk_type type, int count, int fetches, const uint8_t *const *groups, const fk_activations *x,
                           float *const *out) {
    vf total[STREAMS][GROUP_VECTORS] = {0};
    const size_t parts = block_len(type) / FK_BLOCK, blocks = x->cols / FK_BLOCK, step = FK_GROUP * block_bytes(type);
    for (size_t block = 0, at = 0; block < blocks; block += parts, at += step)
        _Pragma("GCC unroll 1") for (int g = 0; g < count; g++) {
            _Pragma("GCC unroll 1") for (int v = 0; v < GROUP_VECTORS; v++) {
                vf sum = total[g][v];
                UNROLL for (size_t s = 0; s < parts; s++) {
                    packed_block w;
                    /* A part at a time, since many fetches at once would wait for each other. */
                    if (v == 0 && fetches) fetch(groups[g] + at + (parts > 1 ? 1 : AHEAD) * step + s * step / parts, step / parts);
                    load_block(type, groups[g] + at, (int)s, v, &w);
                    multiply_block(type, 1, 1, &w, 0, x, 0, block + s, &sum);
                }
                total[g][v] = sum;
            }
        }
    for (int g = 0; g < count; g++)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) store(out[g] + v * FK_LANES, total[g][v]);
}

typedef void streams_function(int count, int fetches, const uint8_t *const *groups, const fk_activations *x,
                              float *const *out);

/* The number of streams for `count` groups: the greatest that divides count, at most `most` and more than half of it, so that
 * no groups are left over; `most` if there is none. */
INLINE size_t even_streams(size_t count, size_t most) {
    for (size_t streams = most; 2 * streams > most; streams--)
        if (count % streams == 0) return streams;
    return most;
}

/* A group of several parts that are walked through as if they were one matrix. */
typedef struct place {
    const fk_rows *part;
    size_t group;
} place;

/* Groups of a part; packed rows that are left over are native. */
static size_t groups_of(const fk_rows *part) {
    const size_t rows = part->end - part->begin;
    return (is_indexed(&part->weights) ? rows + FK_GROUP - 1 : rows) / FK_GROUP;
}

/* The place `by` groups further on. Behind the last group there is a place too, but nothing at it. */
static place move_on(place p, size_t by, const fk_rows *end) {
    for (p.group += by; p.part < end && p.group >= groups_of(p.part); p.part++) p.group -= groups_of(p.part);
    return p;
}

/* Calls `multiply` for the groups at `count` places, and moves each place on by one. */
static void multiply_at(streams_function *multiply, int fetches, place *places, size_t count, const fk_rows *end,
                        const fk_activations *x) {
    const uint8_t *groups[STREAMS];
    float *out[STREAMS];
    for (size_t g = 0; g < count; g++) {
        const fk_rows *part = places[g].part;
        const size_t row = part->begin + places[g].group * FK_GROUP;
        groups[g] = part->weights.data + row * part->weights.row_bytes;
        out[g] = part->out + row;
        places[g] = move_on(places[g], 1, end);
    }
    if (count > 0) multiply((int)count, fetches, groups, x, out);
}

/* Calls `multiply` for all groups of parts [parts, end), which are packed and of one type: for as many groups at a time as are to
 * be read side by side or fewer, which lie as far from one another as they can. */
static void in_streams(streams_function *multiply, const fk_reading *how, const fk_rows *parts, const fk_rows *end,
                       const fk_activations *x) {
    size_t count = 0;
    for (const fk_rows *part = parts; part < end; part++) count += groups_of(part);
    const size_t most = streams_of(parts->weights.type, how);
    const size_t streams = even_streams(count, most), length = count / streams;
    place places[STREAMS], next = move_on((place){parts, 0}, 0, end);
    for (size_t g = 0; g < streams; g++, next = move_on(next, length, end)) places[g] = next;
    for (size_t i = 0; i < length; i++) multiply_at(multiply, how->fetches, places, streams, end, x);
    const size_t rest = count - streams * length;
    for (size_t g = 0; g < rest; g++, next = move_on(next, 1, end)) places[g] = next;
    multiply_at(multiply, how->fetches, places, rest, end, x);
}

/* Two functions for each type, with the type as a constant: packed_streams, and packed_groups. */
#define PACKED(TYPE, ...)                                                                                             \
    static __attribute__((noinline)) void streams_##TYPE(int count, int fetches, const uint8_t *const *groups,       \
                                                         const fk_activations *x, float *const *out) {               \
        packed_streams(FK_TYPE_##TYPE, count, fetches, groups, x, out);                                              \
    }                                                                                                                \
    static __attribute__((noinline)) void packed_##TYPE(int groups, const uint8_t *group, const fk_activations *x,   \
                                                        int add, float *out, size_t out_stride, float *scratch) {    \
        packed_groups(FK_TYPE_##TYPE, groups, group, x, add, out, out_stride, scratch);                              \
    }
FK_BLOCK_TYPES(PACKED)
#undef PACKED

typedef void packed_function(int groups, const uint8_t *group, const fk_activations *x, int add, float *out, size_t out_stride,
                             float *scratch);

typedef struct packed_functions {
    streams_function *streams;
    packed_function *groups;
} packed_functions;

static packed_functions packed_functions_for(fk_type type) {
    switch (type) {
#define PACKED(TYPE, ...) \
    case FK_TYPE_##TYPE: return (packed_functions){streams_##TYPE, packed_##TYPE};
        FK_BLOCK_TYPES(PACKED)
#undef PACKED
    default: return (packed_functions){0};
    }
}

/* Products of packed rows [begin, end), both multiples of FK_GROUP, and several tokens; `add` takes that all columns are decoded at
 * once. */
static void packed_rows(const fk_weights *w, size_t begin, size_t end, const fk_activations *x, int add, float *out,
                        size_t out_stride, float *scratch) {
    packed_function *multiply = packed_functions_for(w->type).groups;
    const int pairs = PAIR_GROUPS && x->tokens > PACKED_TOKENS;
    for (size_t row = begin, groups; row < end; row += groups * FK_GROUP) {
        groups = pairs && row + 2 * FK_GROUP <= end ? 2 : 1;
        multiply((int)groups, w->data + row * w->row_bytes, x, add, out + row, out_stride, scratch);
    }
}
