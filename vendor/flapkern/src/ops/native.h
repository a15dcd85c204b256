/* Native rows, which lie as GGUF stores them: decoding, and products of single rows. Included by table.h. */

/* ---- rows of plain floats ---- */

INLINE vf load_bfloat(const uint16_t *p) { return (vf)(widen_shorts(p) << 16); }

/* One plain float of any type. */
INLINE float load_scalar(fk_type type, const uint8_t *p) {
    float f;
    switch (type) {
    case FK_TYPE_F16:
        return half_to_float(load_u16(p));
    case FK_TYPE_BF16:
        return bfloat_to_float(load_u16(p));
    default:
        memcpy(&f, p, sizeof f);
        return f;
    }
}

/* FK_LANES plain floats of any type. */
INLINE vf load_lanes(fk_type type, const uint8_t *p) {
    switch (type) {
    case FK_TYPE_F16:
        return load_half((const uint16_t *)p);
    case FK_TYPE_BF16:
        return load_bfloat((const uint16_t *)p);
    default:
        return load((const float *)p);
    }
}

/* The product of a row of n plain floats and x. `type` is a constant wherever this is inlined. */
INLINE float dot_float(fk_type type, const uint8_t *row, const float *x, size_t n) {
    const size_t width = type == FK_TYPE_F32 ? 4 : 2;
    vf a = {0}, b = {0}, c = {0}, d = {0};
    size_t i = 0;
    for (; i + 4 * FK_LANES <= n; i += 4 * FK_LANES) {
        a += load_lanes(type, row + i * width) * load(x + i);
        b += load_lanes(type, row + (i + FK_LANES) * width) * load(x + i + FK_LANES);
        c += load_lanes(type, row + (i + 2 * FK_LANES) * width) * load(x + i + 2 * FK_LANES);
        d += load_lanes(type, row + (i + 3 * FK_LANES) * width) * load(x + i + 3 * FK_LANES);
    }
    for (; i + FK_LANES <= n; i += FK_LANES) a += load_lanes(type, row + i * width) * load(x + i);
    float sum = sum_lanes((a + b) + (c + d));
    for (; i < n; i++) sum += load_scalar(type, row + i * width) * x[i];
    return sum;
}

/* ---- decoding ---- */

/* Decodes n values of a row, whole blocks. */
static void dequantize(fk_type type, const uint8_t *src, size_t n, float *out) {
    const size_t len = block_len(type), bytes = block_bytes(type);
    if (len == 1) {
        size_t i = 0;
        for (; i + FK_LANES <= n; i += FK_LANES) store(out + i, load_lanes(type, src + i * bytes));
        for (; i < n; i++) out[i] = load_scalar(type, src + i * bytes);
        return;
    }
    for (size_t i = 0; i < n; i += len, src += bytes) decode_block(type, src, out + i);
}

/* X(TYPE, function) for the types whose native rows are multiplied with 8-bit activations as they are. Native rows of other
 * types in blocks are decoded first. */
#define NATIVE_DOTS(X) X(Q8_0, dot_q8_0) X(Q4_0, dot_q4_0) X(Q4_1, dot_q4_1)

static int has_native_dot(fk_type type) {
#define OR_IS(TYPE, DOT) || type == FK_TYPE_##TYPE
    return 0 NATIVE_DOTS(OR_IS);
#undef OR_IS
}

/* The products of native row r and all tokens, for types that are decoded first: a piece at a time, without scratch. */
static void decoded_row(const fk_weights *w, size_t r, const fk_activations *x, float *out, size_t out_stride) {
    float piece[FK_SUPER];
    for (size_t t = 0; t < x->tokens; t++) out[t * out_stride] = 0;
    for (size_t k = 0; k < w->cols; k += FK_SUPER) {
        size_t n = w->cols - k < FK_SUPER ? w->cols - k : FK_SUPER;
        dequantize(w->type, w->data + r * w->row_bytes + k / block_len(w->type) * block_bytes(w->type), n, piece);
        for (size_t t = 0; t < x->tokens; t++)
            out[t * out_stride] += dot_float(FK_TYPE_F32, (const uint8_t *)piece, x->values + t * x->cols + k, n);
    }
}

/* Products of native rows [row_begin, row_end) and all tokens, row by row. */
static void native_rows(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                        size_t out_stride) {
    const size_t blocks = w->cols / FK_BLOCK;
#define ROWS(DOT)                                                                      \
    for (size_t r = row_begin; r < row_end; r++) {                                     \
        const uint8_t *row = w->data + r * w->row_bytes;                               \
        for (size_t t = 0; t < x->tokens; t++) out[t * out_stride + r] = DOT;          \
    }
#define QUANTIZED x->quantized + t * x->cols, x->scales + t * blocks, x->scaled_sums + t * blocks, blocks
    /* Products in 8 bits know one scale for a block here. */
    if (x->halves && has_native_dot(w->type)) {
        for (size_t r = row_begin; r < row_end; r++) decoded_row(w, r, x, out + r, out_stride);
        return;
    }
    switch (w->type) {
#define BLOCKS(TYPE, DOT) \
    case FK_TYPE_##TYPE: ROWS(DOT(row, QUANTIZED)) break;
#define FLOATS(TYPE, ...) \
    case FK_TYPE_##TYPE: ROWS(dot_float(FK_TYPE_##TYPE, row, x->values + t * x->cols, w->cols)) break;
        NATIVE_DOTS(BLOCKS)
        FK_FLOAT_TYPES(FLOATS)
    default:
        for (size_t r = row_begin; r < row_end; r++) decoded_row(w, r, x, out + r, out_stride);
    }
#undef BLOCKS
#undef FLOATS
#undef QUANTIZED
#undef ROWS
}
