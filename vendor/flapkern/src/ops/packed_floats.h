/* Packed rows of plain floats times activations: a lane is a row, as in packed.h, and a block is one column. Included by
 * table.h; `type` is a constant wherever these functions are inlined. */

INLINE vf load_column(fk_type type, const uint8_t *group, size_t column, int v) {
    return load_lanes(type, group + (column * FK_GROUP + v * FK_LANES) * block_bytes(type));
}

/* Columns whose products are summed apart from one another, so that no addition waits for the one before. */
#define FLOAT_CHAINS 4

/* Tokens whose sums fit in registers beside one another. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define FLOAT_TOKENS 4
#else
#define FLOAT_TOKENS 2
#endif

/* sums[t] = the products of `tokens` tokens (a constant) with columns [begin, end) of vector v of a group. */
INLINE void sum_columns(fk_type type, int tokens, const uint8_t *group, int v, const float *x, size_t stride, size_t begin,
                        size_t end, vf *sums) {
    vf total[FLOAT_TOKENS][FLOAT_CHAINS];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int c = 0; c < FLOAT_CHAINS; c++) total[t][c] = (vf){0};
    size_t k = begin;
    for (; k + FLOAT_CHAINS <= end; k += FLOAT_CHAINS)
        UNROLL for (int c = 0; c < FLOAT_CHAINS; c++) {
            const vf column = load_column(type, group, k + c, v);
            UNROLL for (int t = 0; t < tokens; t++) total[t][c] += column * x[t * stride + k + c];
        }
    for (; k < end; k++)
        UNROLL for (int t = 0; t < tokens; t++) total[t][0] += load_column(type, group, k, v) * x[t * stride + k];
    UNROLL for (int t = 0; t < tokens; t++) {
        sums[t] = total[t][0];
        UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sums[t] += total[t][c];
    }
}

/* Columns of one group before the next one's turn. */
#define FLOAT_STEP 32

/* out[g][0 .. FK_GROUP) for `count` <= STREAMS groups and one token; see packed_streams. */
INLINE void packed_float_streams(fk_type type, int count, int fetches, const uint8_t *const *groups,
                                 const fk_activations *x, float *const *out) {
    vf total[STREAMS][GROUP_VECTORS][FLOAT_CHAINS] = {0};
    const size_t column_bytes = FK_GROUP * block_bytes(type);
    size_t k = 0;
    for (; k + FLOAT_STEP <= x->cols; k += FLOAT_STEP)
        _Pragma("GCC unroll 1") for (int g = 0; g < count; g++) {
            vf sum[GROUP_VECTORS][FLOAT_CHAINS];
            if (fetches) fetch(groups[g] + (k + FLOAT_STEP) * column_bytes, FLOAT_STEP * column_bytes);
            memcpy(sum, total[g], sizeof sum);
            _Pragma("GCC unroll 1") for (size_t i = k; i < k + FLOAT_STEP; i += 2 * FLOAT_CHAINS)
                UNROLL for (int c = 0; c < 2 * FLOAT_CHAINS; c++)
                    UNROLL for (int v = 0; v < GROUP_VECTORS; v++)
                        sum[v][c % FLOAT_CHAINS] += load_column(type, groups[g], i + c, v) * x->values[i + c];
            memcpy(total[g], sum, sizeof sum);
        }
    for (int g = 0; g < count; g++) {
        const size_t whole = k;
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            vf sum = total[g][v][0], rest;
            UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sum += total[g][v][c];
            if (whole < x->cols) {
                sum_columns(type, 1, groups[g], v, x->values, 0, whole, x->cols, &rest);
                sum += rest;
            }
            store(out[g] + v * FK_LANES, sum);
        }
    }
}

#define PACKED(TYPE, ...)                                                                                             \
    static __attribute__((noinline)) void streams_##TYPE(int count, int fetches, const uint8_t *const *groups,       \
                                                         const fk_activations *x, float *const *out) {               \
        packed_float_streams(FK_TYPE_##TYPE, count, fetches, groups, x, out);                                        \
    }
FK_FLOAT_TYPES(PACKED)
#undef PACKED

/* out[t][0 .. FK_GROUP) for one group and `tokens` tokens (a constant) from x on, summed as packed_float_streams sums one. */
INLINE void packed_float_tile(fk_type type, int tokens, const uint8_t *group, const float *x, size_t cols, float *out,
                              size_t out_stride) {
    const size_t whole = cols / FLOAT_STEP * FLOAT_STEP;
    for (int v = 0; v < GROUP_VECTORS; v++) {
        vf sums[FLOAT_TOKENS], rest[FLOAT_TOKENS];
        sum_columns(type, tokens, group, v, x, cols, 0, whole, sums);
        if (whole < cols) {
            sum_columns(type, tokens, group, v, x, cols, whole, cols, rest);
            UNROLL for (int t = 0; t < tokens; t++) sums[t] += rest[t];
        }
        UNROLL for (int t = 0; t < tokens; t++) store(out + t * out_stride + v * FK_LANES, sums[t]);
    }
}

INLINE void packed_float_rows(fk_type type, const fk_weights *w, size_t begin, size_t end, const fk_activations *x,
                              float *out, size_t out_stride) {
    for (size_t row = begin; row < end; row += FK_GROUP) {
        const uint8_t *group = w->data + row * w->row_bytes;
        size_t t = 0;
        for (; t + FLOAT_TOKENS <= x->tokens; t += FLOAT_TOKENS)
            packed_float_tile(type, FLOAT_TOKENS, group, x->values + t * x->cols, x->cols, out + t * out_stride + row,
                              out_stride);
        for (; t < x->tokens; t++)
            packed_float_tile(type, 1, group, x->values + t * x->cols, x->cols, out + t * out_stride + row, out_stride);
    }
}

/* Rows [begin, end), both multiples of FK_GROUP, for several generated tokens. */
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
