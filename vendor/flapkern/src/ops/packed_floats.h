/* Packed rows of plain floats times activations: a lane is a row, as in packed.h, and a block is one column. Included by
 * table.h; `type` is a constant wherever these functions are inlined. */

INLINE vf load_column(fk_type type, const uint8_t *group, size_t column, int v) {
    return load_lanes(type, group + (column * FK_GROUP + v * FK_LANES) * block_bytes(type));
}

/* Columns whose products are summed apart from one another, so that no addition waits for the one before. */
#define FLOAT_CHAINS 4

/* out[t][0 .. FK_GROUP) for one group and `tokens` tokens (a constant) from x on. */
INLINE void packed_float_tile(fk_type type, int tokens, const uint8_t *group, const float *x, size_t cols, float *out,
                              size_t out_stride) {
    const int chains = tokens == 1 ? FLOAT_CHAINS : 1;
    vf total[PACKED_TOKENS][GROUP_VECTORS][FLOAT_CHAINS];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++)
            UNROLL for (int c = 0; c < chains; c++) total[t][v][c] = (vf){0};
    size_t k = 0;
    for (; k + chains <= cols; k += chains)
        UNROLL for (int c = 0; c < chains; c++)
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                vf column = load_column(type, group, k + c, v);
                UNROLL for (int t = 0; t < tokens; t++) total[t][v][c] += column * x[t * cols + k + c];
            }
    for (; k < cols; k++)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++)
            UNROLL for (int t = 0; t < tokens; t++) total[t][v][0] += load_column(type, group, k, v) * x[t * cols + k];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            vf sum = total[t][v][0];
            UNROLL for (int c = 1; c < chains; c++) sum += total[t][v][c];
            store(out + t * out_stride + v * FK_LANES, sum);
        }
}

/* Columns of one group before the next one's turn. */
#define FLOAT_STEP 32

/* out[g][0 .. FK_GROUP) for `count` <= STREAMS groups and one token. */
INLINE void packed_float_streams(fk_type type, int count, const uint8_t *const *groups, const fk_activations *x,
                                 float *const *out) {
    vf total[STREAMS][GROUP_VECTORS][FLOAT_CHAINS] = {0};
    const size_t column_bytes = FK_GROUP * block_bytes(type);
    size_t k = 0;
    for (; k + FLOAT_STEP <= x->cols; k += FLOAT_STEP)
        _Pragma("GCC unroll 1") for (int g = 0; g < count; g++) {
            vf sum[GROUP_VECTORS][FLOAT_CHAINS];
            fetch(groups[g] + (k + FLOAT_STEP) * column_bytes, FLOAT_STEP * column_bytes);
            memcpy(sum, total[g], sizeof sum);
            _Pragma("GCC unroll 1") for (size_t i = k; i < k + FLOAT_STEP; i += 2 * FLOAT_CHAINS)
                UNROLL for (int c = 0; c < 2 * FLOAT_CHAINS; c++)
                    UNROLL for (int v = 0; v < GROUP_VECTORS; v++)
                        sum[v][c % FLOAT_CHAINS] += load_column(type, groups[g], i + c, v) * x->values[i + c];
            memcpy(total[g], sum, sizeof sum);
        }
    for (int g = 0; g < count; g++) {
        float *to = out[g];
        const size_t rest = x->cols - k;
        if (rest > 0) packed_float_tile(type, 1, groups[g] + k * column_bytes, x->values + k, rest, to, 0);
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            vf sum = total[g][v][0];
            UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sum += total[g][v][c];
            store(to + v * FK_LANES, rest > 0 ? load(to + v * FK_LANES) + sum : sum);
        }
    }
}

#define PACKED(TYPE, ...)                                                                                             \
    static __attribute__((noinline)) void streams_##TYPE(int count, const uint8_t *const *groups,                    \
                                                         const fk_activations *x, float *const *out) {               \
        packed_float_streams(FK_TYPE_##TYPE, count, groups, x, out);                                                 \
    }
FK_FLOAT_TYPES(PACKED)
#undef PACKED

INLINE void packed_float_rows(fk_type type, const fk_weights *w, size_t begin, size_t end, const fk_activations *x,
                              float *out, size_t out_stride) {
    for (size_t row = begin; row < end; row += FK_GROUP) {
        const uint8_t *group = w->data + row * w->row_bytes;
        size_t t = 0;
#if PACKED_TOKENS > 1
        for (; t + PACKED_TOKENS <= x->tokens; t += PACKED_TOKENS)
            packed_float_tile(type, PACKED_TOKENS, group, x->values + t * x->cols, x->cols, out + t * out_stride + row,
                              out_stride);
#endif
        for (; t < x->tokens; t++)
            packed_float_tile(type, 1, group, x->values + t * x->cols, x->cols, out + t * out_stride + row, out_stride);
    }
}

/* Rows [begin, end), both multiples of FK_GROUP, for several tokens. */
static void packed_floats(const fk_weights *w, size_t begin, size_t end, const fk_activations *x, float *out,
                          size_t out_stride) {
    switch (w->type) {
#define ROWS(TYPE, ...) \
    case FK_TYPE_##TYPE: packed_float_rows(FK_TYPE_##TYPE, w, begin, end, x, out, out_stride); break;
        FK_FLOAT_TYPES(ROWS)
#undef ROWS
    default: break;
    }
}

/* The function for packed rows of any type and one token. */
static streams_function *streams_for(fk_type type) {
    switch (type) {
#define FUNCTION(TYPE, ...) \
    case FK_TYPE_##TYPE: return streams_##TYPE;
        FK_FLOAT_TYPES(FUNCTION)
#undef FUNCTION
    default: return packed_functions_for(type).streams;
    }
}
