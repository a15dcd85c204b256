/* Weights times activations: which product is whose. Included by table.h. */

static int is_float(fk_type type) { return block_len(type) == 1; }

/* In prefill, weights that are decoded to panels of single precision; packed codes are multiplied as they are. */
static int wants_panels(const fk_weights *w) { return w->layout == FK_LAYOUT_NATIVE || is_float(w->type); }

static fk_form activation_form(const fk_weights *w, fk_phase phase) {
    if (phase == FK_PHASE_PREFILL) {
#if FK_BF16
        if (wants_tiles(w)) return FK_FORM_BF16;
#endif
        return wants_panels(w) ? FK_FORM_FLOAT : FK_FORM_INT8;
    }
    if (is_float(w->type)) return FK_FORM_FLOAT;
    return w->layout != FK_LAYOUT_NATIVE || has_native_dot(w->type) ? FK_FORM_INT8 : FK_FORM_FLOAT;
}

/* Whether products of rows that end at `row_end` can be added as they come: of packed codes that are decoded at once. */
static int adds_itself(const fk_weights *w, fk_phase phase, size_t row_end) {
    const size_t packed_end = w->layout == FK_LAYOUT_PACKED ? w->rows / FK_GROUP * FK_GROUP : 0;
    return activation_form(w, phase) == FK_FORM_INT8 && row_end <= packed_end && w->cols <= DECODED_COLS;
}

static size_t product_scratch(const fk_weights *w, fk_phase phase, size_t tokens) {
    if (phase == FK_PHASE_PREFILL) {
#if FK_BF16
        if (wants_tiles(w)) return TILED_SCRATCH;
#endif
        if (wants_panels(w)) return is_indexed(w) ? INDEXED_GEMM_SCRATCH : GEMM_SCRATCH;
        if (is_indexed(w)) return SPARSE_SCRATCH(tokens);
    }
    if (w->layout == FK_LAYOUT_SPARSE && tokens > 1)
        return is_float(w->type) ? SPARSE_FLOAT_SCRATCH(tokens) : SPARSE_SCRATCH(tokens);
    /* A prompt's activations may have scales for halves of blocks; then weights are decoded however few tokens there are. */
    const int decodes = phase == FK_PHASE_PREFILL || tokens > PACKED_TOKENS;
    return w->layout == FK_LAYOUT_PACKED && !is_float(w->type) && decodes ? DECODED_SCRATCH : 0;
}

static size_t matmul_scratch(const fk_weights *w, fk_phase phase, size_t tokens, size_t added) {
    return product_scratch(w, phase, tokens) + tokens * added;
}

static void matvec(const fk_rows *parts, size_t count, const fk_activations *x, const fk_reading *how) {
    const fk_rows *all = parts + count;
    while (parts < all) {
        const fk_type type = parts->weights.type;
        const fk_rows *end = parts;
        const fk_layout layout = parts->weights.layout;
        while (end < all && is_indexed(&end->weights) && end->weights.type == type && end->weights.layout == layout) end++;
        if (end > parts) {
            in_indexed_streams(how, parts, end, x);
            parts = end;
            continue;
        }
        while (end < all && end->weights.layout == FK_LAYOUT_PACKED && end->weights.type == type) end++;
        if (end > parts) in_streams(streams_for(type), how, parts, end, x);
        /* What fills no group, or else one matrix of native rows. */
        end += end == parts;
        for (; parts < end; parts++) {
            const int packed = parts->weights.layout == FK_LAYOUT_PACKED;
            const size_t begin = parts->begin + (packed ? groups_of(parts) * FK_GROUP : 0);
            if (begin < parts->end) native_rows(&parts->weights, begin, parts->end, x, parts->out, 0);
        }
    }
}

/* Tokens of prompts; `add` as adds_itself allows. */
static void prefill(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, int add, float *out,
                    size_t out_stride, float *scratch) {
#if FK_BF16
    if (wants_tiles(w)) {
        tiled_matmul(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
#endif
    if (is_indexed(w)) {
        if (is_float(w->type))
            indexed_gemm(w, row_begin, row_end, x, out, out_stride, scratch);
        else
            sparse_rows(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
    if (w->layout == FK_LAYOUT_NATIVE) {
        gemm(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
    const size_t packed_end = w->rows / FK_GROUP * FK_GROUP;
    const size_t end = row_end < packed_end ? row_end : packed_end;
    if (row_begin < end) {
        if (is_float(w->type))
            gemm(w, row_begin, end, x, out, out_stride, scratch);
        else
            packed_rows(w, row_begin, end, x, add, out, out_stride, scratch);
    }
    /* The rows that fill no group are native. */
    native_rows(w, row_begin > packed_end ? row_begin : packed_end, row_end, x, out, out_stride);
}

/* Generated tokens of several texts: as matvec computes each of them, but the weights are read once for all. */
static void decode(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, int add, float *out,
                   size_t out_stride, float *scratch) {
    if (is_indexed(w)) {
        if (w->layout == FK_LAYOUT_NARROW)
            narrow_floats(w, row_begin, row_end, x, out, out_stride);
        else if (is_float(w->type))
            sparse_floats(w, row_begin, row_end, x, out, out_stride, scratch);
        else
            sparse_rows(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
    const size_t packed_end = w->layout == FK_LAYOUT_PACKED ? w->rows / FK_GROUP * FK_GROUP : 0;
    const size_t end = row_end < packed_end ? row_end : packed_end;
    if (row_begin < end) {
        if (is_float(w->type))
            packed_floats(w, row_begin, end, x, out, out_stride);
        else
            packed_rows(w, row_begin, end, x, add, out, out_stride, scratch);
    }
    native_rows(w, row_begin > packed_end ? row_begin : packed_end, row_end, x, out, out_stride);
}

static void matmul(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, int add, float *out,
                   size_t out_stride, float *scratch) {
    const int one = x->phase == FK_PHASE_DECODE && x->tokens == 1;
    if (add && (one || !adds_itself(w, x->phase, row_end))) {
        const size_t rows = row_end - row_begin;
        /* Row row_begin is the first of the product. */
        float *product = (float *)((uintptr_t)scratch - row_begin * sizeof *scratch);
        matmul(w, row_begin, row_end, x, 0, product, rows, scratch + x->tokens * rows);
        for (size_t t = 0; t < x->tokens; t++)
            for (size_t r = 0; r < rows; r++) out[t * out_stride + row_begin + r] += scratch[t * rows + r];
    } else if (x->phase == FK_PHASE_PREFILL) {
        prefill(w, row_begin, row_end, x, add, out, out_stride, scratch);
    } else if (one) {
        const fk_rows rows = {*w, row_begin, row_end, out};
        const fk_reading how = {STREAMS, 1};
        matvec(&rows, 1, x, &how);
    } else {
        decode(w, row_begin, row_end, x, add, out, out_stride, scratch);
    }
}
