/* Weights times activations: which product is whose. Included by table.h. */

/* From here on decoding a panel costs less than decoding every row for every token. */
#define GEMM_MIN_TOKENS 8

static int is_float(fk_type type) { return block_len(type) == 1; }

/* In other forms than bfloat16 packed codes are used as they are for any number of tokens; packed floats and native rows
 * are decoded for many. */
static fk_form activation_form(const fk_weights *w, size_t tokens) {
#if FK_BF16
    if (wants_tiles(w, tokens)) return FK_FORM_BF16;
#endif
    if (is_float(w->type)) return FK_FORM_FLOAT;
    return w->layout == FK_LAYOUT_PACKED || (has_native_dot(w->type) && tokens < GEMM_MIN_TOKENS) ? FK_FORM_INT8
                                                                                                   : FK_FORM_FLOAT;
}

static int wants_panels(const fk_weights *w, size_t tokens) {
    return tokens >= GEMM_MIN_TOKENS && (w->layout == FK_LAYOUT_NATIVE || is_float(w->type));
}

static size_t matmul_scratch(const fk_weights *w, size_t tokens) {
#if FK_BF16
    if (wants_tiles(w, tokens)) return TILED_SCRATCH;
#endif
    if (wants_panels(w, tokens)) return GEMM_SCRATCH;
    return w->layout == FK_LAYOUT_PACKED && !is_float(w->type) && tokens > PACKED_TOKENS ? DECODED_SCRATCH : 0;
}

static void matvec(const fk_rows *parts, size_t count, const fk_activations *x) {
    const fk_rows *all = parts + count;
    while (parts < all) {
        const fk_type type = parts->weights.type;
        const fk_rows *end = parts;
        while (end < all && end->weights.layout == FK_LAYOUT_PACKED && end->weights.type == type) end++;
        if (end > parts) in_streams(streams_for(type), streams_of(type), parts, end, x);
        /* What fills no group, or else one matrix of native rows. */
        end += end == parts;
        for (; parts < end; parts++) {
            const int packed = parts->weights.layout == FK_LAYOUT_PACKED;
            const size_t begin = parts->begin + (packed ? whole_groups(parts) * FK_GROUP : 0);
            if (begin < parts->end) native_rows(&parts->weights, begin, parts->end, x, parts->out, 0);
        }
    }
}

static void matmul(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                   size_t out_stride, float *scratch) {
    if (x->tokens == 1) {
        const fk_rows rows = {*w, row_begin, row_end, out};
        matvec(&rows, 1, x);
        return;
    }
#if FK_BF16
    if (wants_tiles(w, x->tokens)) {
        tiled_matmul(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
#endif
    const int panels = wants_panels(w, x->tokens);
    if (w->layout == FK_LAYOUT_PACKED) {
        size_t packed_end = w->rows / FK_GROUP * FK_GROUP;
        size_t end = row_end < packed_end ? row_end : packed_end;
        if (row_begin < end) {
            if (panels)
                gemm(w, row_begin, end, x, out, out_stride, scratch);
            else if (is_float(w->type))
                packed_floats(w, row_begin, end, x, out, out_stride);
            else
                packed_rows(w, row_begin, end, x, out, out_stride, scratch);
        }
        /* The rows that fill no group are native. */
        row_begin = row_begin > packed_end ? row_begin : packed_end;
    } else if (panels) {
        gemm(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
    native_rows(w, row_begin, row_end, x, out, out_stride);
}
