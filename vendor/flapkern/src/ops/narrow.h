/* Products of narrow groups: 16-bit floats in 12 bits, and a list of those that need more. A lane is a row, as in packed.h. Included by
 * table.h. */

/* Columns that lie together, and bytes and lines of them. */
#define EIGHT_COLUMNS 8
#define EIGHT_LINES 3
#define EIGHT_BYTES (64 * EIGHT_LINES)

/* Bytes of a block of FLOAT_STEP columns. */
#define NARROW_BYTES (FLOAT_STEP / EIGHT_COLUMNS * EIGHT_BYTES)

/* Of a number in bfloat16 the bits that are stored, and the others, which are the same in all numbers; in both halves of a word. */
#define OWN_BITS 0x87ff87ffu
#define COMMON_BITS 0x38003800u

INLINE vu load_words(const uint8_t *p) {
    vu words;
    memcpy(&words, p, sizeof words);
    return words;
}

/* Vector v of eight columns at p, as four words of two numbers each, of which the bits of OWN_BITS count. */
INLINE void load_eight(const uint8_t *p, int v, vu words[4]) {
    UNROLL for (int line = 0; line < EIGHT_LINES; line++) words[line] = load_words(p + 64 * line + 4 * FK_LANES * v);
    words[3] = (words[0] >> 11 & 0x000f000f) | (words[1] >> 7 & 0x00f000f0) | (words[2] >> 3 & 0x07000700) |
               (words[2] << 1 & 0x80008000);
}

INLINE vf upper_number(vu words) { return (vf)((words & (OWN_BITS & 0xffff0000u)) | (COMMON_BITS & 0xffff0000u)); }
INLINE vf lower_number(vu words) { return upper_number(words << 16); }

/* The columns of a row that fill blocks. */
INLINE size_t in_blocks(size_t cols) { return cols / FLOAT_STEP * FLOAT_STEP; }

/* The numbers of a group that its list has, one after the other. */
typedef struct listed {
    const uint8_t *p;
    size_t count;
} listed;

#define LISTED_BYTES 8

/* The list of the group that begins at p; no more of it than lies before `end`. */
INLINE listed listed_in(const uint8_t *p, const uint8_t *end, size_t cols) {
    const size_t before = in_blocks(cols) / FLOAT_STEP * NARROW_BYTES + cols % FLOAT_STEP * 2 * FK_GROUP;
    if ((size_t)(end - p) < before + LISTED_BYTES) return (listed){end, 0};
    p += before;
    uint32_t count;
    memcpy(&count, p, sizeof count);
    const size_t most = (size_t)(end - p) / LISTED_BYTES - 1;
    return (listed){p + LISTED_BYTES, count < most ? count : most};
}

INLINE size_t listed_column(const uint8_t *p) { return load_u16(p); }
INLINE size_t listed_row(const uint8_t *p) { return load_u16(p + 2) % FK_GROUP; }

INLINE float listed_value(fk_type type, const uint8_t *p) {
    return type == FK_TYPE_F16 ? half_at(p + 4) : bfloat_to_float(load_u16(p + 4));
}

/* What stands in a block where the list has the number. */
#define PLACEHOLDER 0x1p-15f

/* out[0 .. FK_GROUP) += the products of one token with listed numbers, less those with the placeholders that it was multiplied with. */
static __attribute__((noinline)) void add_listed(fk_type type, listed these, const float *x, size_t cols, float *out) {
    for (const uint8_t *p = these.p; these.count > 0; these.count--, p += LISTED_BYTES) {
        const size_t column = listed_column(p);
        if (column < cols) out[listed_row(p)] += (listed_value(type, p) - PLACEHOLDER) * x[column];
    }
}

/* out[g][0 .. FK_GROUP) = the products of `count` <= STREAMS groups and one token; `ahead` lines are fetched for every block. */
INLINE void narrow_float_streams(fk_type type, int count, const uint8_t *const *groups, const uint8_t *const *limits, size_t ahead,
                                 const fk_activations *x, float *const *out) {
    vf total[STREAMS][GROUP_VECTORS][FLOAT_CHAINS] = {0};
    const size_t whole = in_blocks(x->cols);
    for (size_t k = 0, at = 0; k < whole; k += FLOAT_STEP, at += NARROW_BYTES)
        _Pragma("GCC unroll 1") for (int g = 0; g < count; g++) {
            const uint8_t *p = within(groups[g] + at, limits[g]);
            for (size_t i = 0; i < ahead; i++) __builtin_prefetch(p + INDEXED_AHEAD + 64 * i);
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                vf sum[FLOAT_CHAINS];
                memcpy(sum, total[g][v], sizeof sum);
                UNROLL for (int eight = 0; eight < FLOAT_STEP / EIGHT_COLUMNS; eight++) {
                    const float *values = x->values + k + EIGHT_COLUMNS * eight;
                    vu words[4];
                    load_eight(p + EIGHT_BYTES * eight, v, words);
                    UNROLL for (int i = 0; i < 4; i++) {
                        sum[2 * i % FLOAT_CHAINS] += lower_number(words[i]) * values[2 * i];
                        sum[(2 * i + 1) % FLOAT_CHAINS] += upper_number(words[i]) * values[2 * i + 1];
                    }
                }
                memcpy(total[g][v], sum, sizeof sum);
            }
        }
    for (int g = 0; g < count; g++) {
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            vf sum = total[g][v][0], rest;
            UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sum += total[g][v][c];
            if (whole < x->cols) {
                const uint8_t *p = within(groups[g] + whole / FLOAT_STEP * NARROW_BYTES, limits[g]);
                sum_columns(type, 1, p, v, x->values + whole, 0, 0, x->cols - whole, &rest);
                sum += rest;
            }
            store(out[g] + v * FK_LANES, sum);
        }
        add_listed(type, listed_in(groups[g], limits[g], x->cols), x->values, whole, out[g]);
    }
}

/* out[t][0 .. FK_GROUP) for the group at p and `tokens` tokens (a constant) from x on, summed as narrow_float_streams sums one. */
INLINE void narrow_float_tile(fk_type type, int tokens, const uint8_t *p, const uint8_t *limit, const float *x, size_t cols, float *out) {
    const size_t whole = in_blocks(cols);
    for (int v = 0; v < GROUP_VECTORS; v++) {
        vf total[FLOAT_TOKENS][FLOAT_CHAINS], sums[FLOAT_TOKENS], rest[FLOAT_TOKENS];
        const uint8_t *block = p;
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int c = 0; c < FLOAT_CHAINS; c++) total[t][c] = (vf){0};
        for (size_t k = 0; k < whole; k += EIGHT_COLUMNS, block += EIGHT_BYTES) {
            vu words[4];
            load_eight(within(block, limit), v, words);
            UNROLL for (int i = 0; i < 4; i++) {
                const vf column[2] = {lower_number(words[i]), upper_number(words[i])};
                UNROLL for (int c = 0; c < 2; c++)
                    UNROLL for (int t = 0; t < tokens; t++)
                        total[t][(2 * i + c) % FLOAT_CHAINS] += column[c] * x[t * cols + k + 2 * i + c];
            }
        }
        UNROLL for (int t = 0; t < tokens; t++) {
            sums[t] = total[t][0];
            UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sums[t] += total[t][c];
        }
        if (whole < cols) {
            sum_columns(type, tokens, within(block, limit), v, x + whole, cols, 0, cols - whole, rest);
            UNROLL for (int t = 0; t < tokens; t++) sums[t] += rest[t];
        }
        UNROLL for (int t = 0; t < tokens; t++) store(out + t * FK_GROUP + v * FK_LANES, sums[t]);
    }
    const listed these = listed_in(p, limit, cols);
    for (int t = 0; t < tokens; t++) add_listed(type, these, x + t * cols, whole, out + t * FK_GROUP);
}

/* Rows [begin, end) for several generated tokens. */
INLINE void narrow_float_rows(fk_type type, const fk_weights *w, size_t begin, size_t end, const fk_activations *x, float *out,
                              size_t out_stride) {
    for (size_t row = begin; row < end; row += FK_GROUP) {
        const size_t rows = end - row < FK_GROUP ? end - row : FK_GROUP;
        const uint8_t *p = indexed_group(w, row / FK_GROUP);
        for (size_t t = 0, some; t < x->tokens; t += some) {
            float products[FLOAT_TOKENS * FK_GROUP];
            const float *values = x->values + t * x->cols;
            some = x->tokens - t < FLOAT_TOKENS ? 1 : FLOAT_TOKENS;
            if (some == FLOAT_TOKENS)
                narrow_float_tile(type, FLOAT_TOKENS, p, limit_of(w), values, x->cols, products);
            else
                narrow_float_tile(type, 1, p, limit_of(w), values, x->cols, products);
            for (size_t i = 0; i < some; i++)
                memcpy(out + (t + i) * out_stride + row, products + i * FK_GROUP, rows * sizeof *out);
        }
    }
}

/* Where the columns of a group begin. */
static cursor begin_narrow(const fk_weights *w, size_t group) {
    const uint8_t *p = indexed_group(w, group);
    const listed these = listed_in(p, limit_of(w), w->cols);
    return (cursor){p, 0, these.p, these.count};
}

/* The next listed number, which it goes past, if its column is before `end`; else 0. */
INLINE const uint8_t *next_listed(cursor *at, size_t end) {
    if (at->count == 0 || listed_column(at->listed) >= end) return 0;
    at->count--;
    at->listed += LISTED_BYTES;
    return at->listed - LISTED_BYTES;
}

/* Decodes the `depth` columns of a group that come next. Vector v of column i comes to `to[v] + i * stride`. */
INLINE void decode_narrow(fk_type type, cursor *at, const uint8_t *limit, size_t depth, float *const *to, size_t stride) {
    const size_t whole = in_blocks(depth);
    for (size_t k = 0; k < whole; k += EIGHT_COLUMNS, at->p += EIGHT_BYTES) {
        const uint8_t *p = within(at->p, limit);
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            vu words[4];
            load_eight(p, v, words);
            UNROLL for (int i = 0; i < 4; i++) {
                store(to[v] + (k + 2 * i) * stride, lower_number(words[i]));
                store(to[v] + (k + 2 * i + 1) * stride, upper_number(words[i]));
            }
        }
    }
    for (const uint8_t *p; (p = next_listed(at, at->column + whole)) != 0;) {
        const size_t column = listed_column(p) - at->column, row = listed_row(p);
        if (column < whole) to[row / FK_LANES][column * stride + row % FK_LANES] = listed_value(type, p);
    }
    at->column += depth;
    if (whole == depth) return;
    const uint8_t *p = within(at->p, limit);
    for (size_t i = 0; whole + i < depth; i++)
        for (int v = 0; v < GROUP_VECTORS; v++) store(to[v] + (whole + i) * stride, load_column(type, p, i, v));
}

#define FLOATS(TYPE)                                                                                                             \
    static __attribute__((noinline)) void narrow_streams_##TYPE(int count, const uint8_t *const *groups,                         \
                                                                const uint8_t *const *limits, size_t ahead,                      \
                                                                const fk_activations *x, float *const *out) {                    \
        narrow_float_streams(FK_TYPE_##TYPE, count, groups, limits, ahead, x, out);                                              \
    }                                                                                                                            \
    static __attribute__((noinline)) void narrow_columns_##TYPE(cursor *at, const uint8_t *limit, size_t depth,                \
                                                                float *const *to, size_t stride) {                               \
        decode_narrow(FK_TYPE_##TYPE, at, limit, depth, to, stride);                                                             \
    }
FK_NARROW_TYPES(FLOATS)
#undef FLOATS

static void narrow_floats(const fk_weights *w, size_t begin, size_t end, const fk_activations *x, float *out, size_t out_stride) {
    if (w->type == FK_TYPE_F16)
        narrow_float_rows(FK_TYPE_F16, w, begin, end, x, out, out_stride);
    else
        narrow_float_rows(FK_TYPE_BF16, w, begin, end, x, out, out_stride);
}
