/* Products of many tokens with weights in single precision. Included by table.h.
 *
 * out [tokens, rows] = X [tokens, cols] W^T. Weights are decoded in panels: GEMM_ROWS rows by up to GEMM_DEPTH columns,
 * column by column, so that one column of a panel is GEMM_VECTORS vectors. A tile of GEMM_TOKENS tokens by one panel is
 * summed in registers. Every element of the output is summed over the columns in the same order whatever tile it falls in. */

/* Rows of a panel. */
#define GEMM_ROWS (GEMM_VECTORS * FK_LANES)

/* The most columns of a panel. */
#define GEMM_DEPTH 512

/* out[t][v] (+)= sum over k < depth of x[t * x_stride + k] * panel[k][v] for a number of tokens that is a constant. Adds to
 * what out holds unless `fresh`. */
INLINE void gemm_tile(int tokens, const float *x, size_t x_stride, const float *panel, size_t depth, int fresh,
                      float *out, size_t out_stride) {
    vf acc[GEMM_TOKENS][GEMM_VECTORS];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < GEMM_VECTORS; v++)
            acc[t][v] = fresh ? (vf){0} : load(out + t * out_stride + v * FK_LANES);
    for (size_t k = 0; k < depth; k++, panel += GEMM_ROWS) {
        vf column[GEMM_VECTORS];
        UNROLL for (int v = 0; v < GEMM_VECTORS; v++) column[v] = load(panel + v * FK_LANES);
        UNROLL for (int t = 0; t < tokens; t++) {
            vf value = splat(x[t * x_stride + k]);
            UNROLL for (int v = 0; v < GEMM_VECTORS; v++) acc[t][v] += value * column[v];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < GEMM_VECTORS; v++) store(out + t * out_stride + v * FK_LANES, acc[t][v]);
}

/* gemm_tile for a number of tokens that is not a constant. */
static void gemm_tile_any(size_t tokens, const float *x, size_t x_stride, const float *panel, size_t depth, int fresh,
                          float *out, size_t out_stride) {
    switch (tokens) {
#define CASE(N)                                                                        \
    case N:                                                                            \
        gemm_tile(N, x, x_stride, panel, depth, fresh, out, out_stride);               \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4)
#if GEMM_TOKENS > 4
        CASE(5) CASE(6)
#endif
#if GEMM_TOKENS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

/* The products of all tokens and one panel, of which the first `rows` rows exist. If these are not all, sums go through
 * `block`, scratch [GEMM_TOKENS, GEMM_ROWS], since the output has no room for a whole panel's. */
static void gemm_panel(size_t tokens, const float *x, size_t x_stride, const float *panel, size_t depth, int fresh,
                       size_t rows, float *out, size_t out_stride, float *block) {
    for (size_t t = 0; t < tokens; t += GEMM_TOKENS) {
        size_t count = tokens - t < GEMM_TOKENS ? tokens - t : GEMM_TOKENS;
        const float *from = x + t * x_stride;
        float *to = out + t * out_stride;
        if (rows == GEMM_ROWS) {
            gemm_tile_any(count, from, x_stride, panel, depth, fresh, to, out_stride);
            continue;
        }
        if (!fresh)
            for (size_t i = 0; i < count; i++)
                memcpy(block + i * GEMM_ROWS, to + i * out_stride, rows * sizeof *out);
        gemm_tile_any(count, from, x_stride, panel, depth, fresh, block, GEMM_ROWS);
        for (size_t i = 0; i < count; i++) memcpy(to + i * out_stride, block + i * GEMM_ROWS, rows * sizeof *out);
    }
}

/* A panel of columns [k, k + depth) of rows [row, row + GEMM_ROWS) of packed floats, all of which lie in groups. */
INLINE void panel_of_floats(fk_type type, const fk_weights *w, size_t row, size_t k, size_t depth, float *panel) {
    UNROLL for (int v = 0; v < GEMM_VECTORS; v++) {
        const size_t at = row + v * FK_LANES;
        const uint8_t *group = w->data + at / FK_GROUP * FK_GROUP * w->row_bytes;
        for (size_t i = 0; i < depth; i++)
            store(panel + i * GEMM_ROWS + v * FK_LANES, load_column(type, group, k + i, at % FK_GROUP / FK_LANES));
    }
}

/* Decodes columns [k, k + depth) of rows [row, row + count) to panel [depth, GEMM_ROWS], in which missing rows become 0.
 * Packed weights must be plain floats here, and their rows lie in groups. `line` is scratch [depth]. */
static void decode_panel(const fk_weights *w, size_t row, size_t count, size_t k, size_t depth, float *panel,
                         float *line) {
    if (w->layout == FK_LAYOUT_PACKED && count == GEMM_ROWS) {
        switch (w->type) {
#define PANEL(TYPE, ...) \
        case FK_TYPE_##TYPE: panel_of_floats(FK_TYPE_##TYPE, w, row, k, depth, panel); break;
            FK_FLOAT_TYPES(PANEL)
#undef PANEL
        default: break;
        }
        return;
    }
    const size_t skip = k / block_len(w->type) * block_bytes(w->type);
    for (size_t r = 0; r < count; r++) {
        if (w->layout == FK_LAYOUT_PACKED) {
            const uint8_t *group = w->data + (row + r) / FK_GROUP * FK_GROUP * w->row_bytes;
            for (size_t i = 0; i < depth; i++)
                line[i] = load_scalar(w->type, group + ((k + i) * FK_GROUP + (row + r) % FK_GROUP) * block_bytes(w->type));
        } else {
            dequantize(w->type, w->data + (row + r) * w->row_bytes + skip, depth, line);
        }
        for (size_t i = 0; i < depth; i++) panel[i * GEMM_ROWS + r] = line[i];
    }
    for (size_t r = count; r < GEMM_ROWS; r++)
        for (size_t i = 0; i < depth; i++) panel[i * GEMM_ROWS + r] = 0;
}

/* Floats of scratch that gemm needs: a panel, a line and a block. */
#define GEMM_SCRATCH (GEMM_DEPTH * GEMM_ROWS + GEMM_DEPTH + GEMM_TOKENS * GEMM_ROWS)

/* Products of rows [row_begin, row_end) and all tokens; packed rows are plain floats in groups. */
static void gemm(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                 size_t out_stride, float *scratch) {
    float *panel = scratch, *line = panel + GEMM_DEPTH * GEMM_ROWS, *block = line + GEMM_DEPTH;
    for (size_t row = row_begin; row < row_end; row += GEMM_ROWS) {
        size_t count = row_end - row < GEMM_ROWS ? row_end - row : GEMM_ROWS;
        for (size_t k = 0; k < w->cols; k += GEMM_DEPTH) {
            size_t depth = w->cols - k < GEMM_DEPTH ? w->cols - k : GEMM_DEPTH;
            decode_panel(w, row, count, k, depth, panel, line);
            gemm_panel(x->tokens, x->values + k, x->cols, panel, depth, k == 0, count, out + row, out_stride, block);
        }
    }
}

/* Rows whose groups are decoded together, to one panel or to several, where an index finds them. */
#define INDEXED_ROWS (GEMM_ROWS > FK_GROUP ? GEMM_ROWS : FK_GROUP)

#define INDEXED_GEMM_SCRATCH (GEMM_DEPTH * INDEXED_ROWS + GEMM_TOKENS * GEMM_ROWS)

/* gemm for sparse and narrow floats. */
static void indexed_gemm(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                        size_t out_stride, float *scratch) {
    enum { GROUPS = INDEXED_ROWS / FK_GROUP };
    float *block = scratch + GEMM_DEPTH * INDEXED_ROWS;
    for (size_t row = row_begin; row < row_end; row += INDEXED_ROWS) {
        const size_t count = row_end - row < INDEXED_ROWS ? row_end - row : INDEXED_ROWS;
        const size_t groups = (count + FK_GROUP - 1) / FK_GROUP;
        cursor at[GROUPS] = {0};
        for (size_t g = 0; g < groups; g++) at[g] = begin_columns(w, row / FK_GROUP + g);
        for (size_t k = 0; k < w->cols; k += GEMM_DEPTH) {
            const size_t depth = w->cols - k < GEMM_DEPTH ? w->cols - k : GEMM_DEPTH;
            for (size_t g = 0; g < GROUPS; g++) {
                float *to[GROUP_VECTORS];
                for (int v = 0; v < GROUP_VECTORS; v++) {
                    const size_t r = g * FK_GROUP + v * FK_LANES;
                    to[v] = scratch + r / GEMM_ROWS * (GEMM_DEPTH * GEMM_ROWS) + r % GEMM_ROWS;
                }
                if (g < groups)
                    decode_any_columns(w, &at[g], depth, to, GEMM_ROWS);
                else
                    for (size_t i = 0; i < depth; i++)
                        for (int v = 0; v < GROUP_VECTORS; v++) store(to[v] + i * GEMM_ROWS, (vf){0});
            }
            for (size_t r = 0; r < count; r += GEMM_ROWS)
                gemm_panel(x->tokens, x->values + k, x->cols, scratch + r * GEMM_DEPTH, depth, k == 0,
                           count - r < GEMM_ROWS ? count - r : GEMM_ROWS, out + row + r, out_stride, block);
        }
    }
}
