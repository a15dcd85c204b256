/* Products of sparse groups: a lane is a row, as in packed.h, and blocks are computed by the same arithmetic. So a weight that
 * was removed gives what a packed weight of 0 gives, to the bit. Included by table.h. */

/* Bytes of the masks of 32 columns. */
#define MASKS 64

/* The same address, of which the compiler does not know where it comes from, where registers are few: it would keep one address for
 * each four activations of a block. */
INLINE const int8_t *opaque(const int8_t *p) {
    if (FK_LANES < 16) __asm__("" : "+r"(p));
    return p;
}

#ifndef FK_OWN_SETTLE
/* Nothing, or for a set with enough registers: eight vectors of codes are there before anything is done with them. Products
 * wait for each other, and when the compiler puts them between the codes, those of later blocks wait behind them. */
INLINE void settle(vw *codes) { (void)codes; }
#endif

/* ---- types in blocks ---- */

/* Bytes of a block's fields of 16 rows, codes excepted. */
INLINE size_t field_bytes(fk_type type) {
    return FK_GROUP * (block_bytes(type) - block_len(type) / (type == FK_TYPE_Q8_0 ? 1 : 2));
}

/* 32 columns of a group, and bytes that are 1 where there is a weight, for types with a minimum. */
typedef struct sparse_block {
    packed_block rows[GROUP_VECTORS];
    vw kept[GROUP_VECTORS][8];
} sparse_block;

/* Vectors of a decoded block that hold what is kept. */
INLINE int kept_vectors(fk_type type) { return has_minimum(type) ? 8 : 0; }

/* The codes of 32 columns whose masks are at p; returns where they end. */
INLINE const uint8_t *expand_codes(fk_type type, const uint8_t *p, sparse_block *b) {
    const uint8_t *low = p + MASKS, *high = low;
    UNROLL for (int j = 0; j < 8; j++) {
        const uint64_t mask = load_u64(p + 8 * j);
        const uint8_t **from = type == FK_TYPE_Q8_0 || j < 4 ? &low : &high;
        vw line[GROUP_VECTORS], there[GROUP_VECTORS];
        expand_line(*from, mask, line);
        *from += count_bits(mask);
        if (type == FK_TYPE_IQ4_NL || has_minimum(type)) mask_line(mask, there);
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            vw codes = line[v];
            if (type != FK_TYPE_Q8_0) codes = j < 4 ? codes & 15 : codes >> 4;
            if (type == FK_TYPE_Q4_0) codes ^= 8;
            /* No level is 0. */
            if (type == FK_TYPE_IQ4_NL) codes = look_up(iq4_levels, codes) & -there[v];
            b->rows[v].codes[j] = has_signed_codes(type) ? as_signed(codes) : codes;
            if (has_minimum(type)) b->kept[v][j] = there[v];
        }
    }
    return low > high ? low : high;
}

/* out[g][0 .. FK_GROUP) = the products of `count` <= STREAMS groups and one token; `ahead` is how many lines of 64 bytes are
 * fetched for every block. */
INLINE void sparse_streams(fk_type type, int count, const uint8_t *const *groups, const uint8_t *const *limits, size_t ahead,
                           const fk_activations *x, float *const *out) {
    vf total[STREAMS][GROUP_VECTORS] = {0};
    const uint8_t *at[STREAMS];
    const size_t parts = block_len(type) / FK_BLOCK, blocks = x->cols / FK_BLOCK;
    for (int g = 0; g < count; g++) at[g] = groups[g];
    fk_activations here = *x;
    for (size_t block = 0; block < blocks; block += parts) {
        here.quantized = opaque(x->quantized + block * FK_BLOCK);
        here.scales = x->scales + block;
        here.scaled_sums = x->scaled_sums + block;
        here.code_sums = x->code_sums + 2 * block;
        _Pragma("GCC unroll 1") for (int g = 0; g < count; g++) {
            const uint8_t *fields = within(at[g], limits[g]), *p = fields + field_bytes(type);
            for (size_t i = 0; i < ahead; i++) __builtin_prefetch(fields + INDEXED_AHEAD + 64 * i);
            UNROLL for (size_t s = 0; s < parts; s++) {
                sparse_block b;
                if (parts > 1) p = within(p, limits[g]);
                UNROLL for (int v = 0; v < GROUP_VECTORS; v++) load_scale(type, fields, (int)s, v, &b.rows[v]);
                p = expand_codes(type, p, &b);
                UNROLL for (int v = 0; v < GROUP_VECTORS; v++) settle(b.rows[v].codes);
                UNROLL for (int v = 0; v < GROUP_VECTORS; v++)
                    multiply_block(type, 1, 1, &b.rows[v], b.kept[v], &here, 0, s, &total[g][v]);
            }
            at[g] = p;
        }
    }
    for (int g = 0; g < count; g++)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) store(out[g] + v * FK_LANES, total[g][v]);
}

/* Decodes `blocks` blocks of 32 columns of a group from p on: for each vector of rows, `plane` vectors apart, its blocks as
 * decoded_tile takes them. Returns where they end. */
INLINE const uint8_t *decode_sparse(fk_type type, const uint8_t *p, const uint8_t *limit, size_t blocks, vf *decoded,
                                    size_t plane) {
    const size_t parts = block_len(type) / FK_BLOCK;
    for (size_t block = 0; block < blocks; block += parts) {
        const uint8_t *fields = within(p, limit);
        p = fields + field_bytes(type);
        UNROLL for (size_t s = 0; s < parts; s++, decoded += decoded_vectors(type) + kept_vectors(type)) {
            sparse_block b;
            if (parts > 1) p = within(p, limit);
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) load_scale(type, fields, (int)s, v, &b.rows[v]);
            p = expand_codes(type, p, &b);
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                vf *to = decoded + v * plane;
                store_block(type, &b.rows[v], to);
                for (int j = 0; j < kept_vectors(type); j++) to[decoded_vectors(type) + j] = (vf)b.kept[v][j];
            }
        }
    }
    return p;
}

/* Floats of scratch for the decoded blocks of a sparse group, room to align them, and the products of the last group. */
#define SPARSE_SCRATCH(TOKENS) (DECODED_COLS / FK_BLOCK * GROUP_VECTORS * 18 * FK_LANES + 16 + (TOKENS) * FK_GROUP)

/* The products of one group of `rows` <= FK_GROUP rows and any number of tokens: every block is decoded once for all of them. */
INLINE void sparse_group_times(fk_type type, const uint8_t *p, const uint8_t *limit, size_t rows, const fk_activations *x,
                               float *out, size_t out_stride, float *scratch) {
    float *edge = scratch, *to = rows < FK_GROUP ? edge : out;
    vf *decoded = (vf *)aligned(scratch + x->tokens * FK_GROUP);
    const size_t all = x->cols / FK_BLOCK, stride = rows < FK_GROUP ? FK_GROUP : out_stride;
    for (size_t first = 0; first < all; first += DECODED_COLS / FK_BLOCK) {
        const size_t blocks = all - first < DECODED_COLS / FK_BLOCK ? all - first : DECODED_COLS / FK_BLOCK;
        const size_t plane = blocks * (decoded_vectors(type) + kept_vectors(type));
        p = decode_sparse(type, p, limit, blocks, decoded, plane);
        for (int v = 0; v < GROUP_VECTORS; v++)
            decoded_vector(type, decoded + v * plane, kept_vectors(type), first, blocks, x, 0, to + v * FK_LANES, stride);
    }
    if (rows < FK_GROUP)
        for (size_t t = 0; t < x->tokens; t++) memcpy(out + t * out_stride, edge + t * FK_GROUP, rows * sizeof *out);
}

/* ---- plain floats ---- */

/* The four columns of a line whose masks are there; returns where their values end. */
INLINE const uint8_t *expand_columns(fk_type type, const uint8_t *values, const uint8_t *masks,
                                     vf column[FLOAT_CHAINS][GROUP_VECTORS]) {
    halves_line line;
    expand_halves(type, values, masks, &line);
    UNROLL for (int c = 0; c < FLOAT_CHAINS; c++)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) column[c][v] = column_of(type, &line, c, v);
    return values + 2 * count_bits(load_u64(masks));
}

/* As packed_float_streams, with as many lines fetched as sparse_streams fetches. */
INLINE void sparse_float_streams(fk_type type, int count, const uint8_t *const *groups, const uint8_t *const *limits,
                                 size_t ahead, const fk_activations *x, float *const *out) {
    vf total[STREAMS][GROUP_VECTORS][FLOAT_CHAINS] = {0};
    const uint8_t *at[STREAMS];
    for (int g = 0; g < count; g++) at[g] = groups[g];
    size_t k = 0;
    for (; k + FLOAT_STEP <= x->cols; k += FLOAT_STEP)
        _Pragma("GCC unroll 1") for (int g = 0; g < count; g++) {
            const uint8_t *p = within(at[g], limits[g]);
            const float *values = x->values + k;
            vf sum[GROUP_VECTORS][FLOAT_CHAINS];
            for (size_t i = 0; i < ahead; i++) __builtin_prefetch(p + INDEXED_AHEAD + 64 * i);
            memcpy(sum, total[g], sizeof sum);
            const uint8_t *from = p + MASKS;
            _Pragma("GCC unroll 1") for (size_t j = 0; j < 8; j++) {
                halves_line line;
                expand_halves(type, from, p + 8 * j, &line);
                from += 2 * count_bits(load_u64(p + 8 * j));
                UNROLL for (int c = 0; c < FLOAT_CHAINS; c++)
                    UNROLL for (int v = 0; v < GROUP_VECTORS; v++) sum[v][c] += column_of(type, &line, c, v) * values[4 * j + c];
            }
            memcpy(total[g], sum, sizeof sum);
            at[g] = from;
        }
    for (int g = 0; g < count; g++) {
        const size_t depth = x->cols - k;
        const float *values = x->values + k;
        vf sum[GROUP_VECTORS], rest[GROUP_VECTORS][FLOAT_CHAINS] = {0};
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            sum[v] = total[g][v][0];
            UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sum[v] += total[g][v][c];
        }
        if (depth > 0) {
            const uint8_t *masks = within(at[g], limits[g]), *p = masks + MASKS;
            for (size_t i = 0; i < depth; i += FLOAT_CHAINS) {
                vf column[FLOAT_CHAINS][GROUP_VECTORS];
                const int whole = i + FLOAT_CHAINS <= depth;
                p = expand_columns(type, p, masks + 2 * i, column);
                for (size_t c = 0; c < FLOAT_CHAINS && i + c < depth; c++)
                    for (int v = 0; v < GROUP_VECTORS; v++) rest[v][whole ? c : 0] += column[c][v] * values[i + c];
            }
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) rest[v][0] += rest[v][c];
                sum[v] += rest[v][0];
            }
        }
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) store(out[g] + v * FK_LANES, sum[v]);
    }
}

/* Decodes `depth` columns of a group from p on. Vector v of column i comes to `to[v] + i * stride`. Returns where they end. */
INLINE const uint8_t *decode_columns(fk_type type, const uint8_t *p, const uint8_t *limit, size_t depth, float *const *to,
                                     size_t stride) {
    for (size_t k = 0; k < depth; k += FLOAT_STEP) {
        const size_t some = depth - k < FLOAT_STEP ? depth - k : FLOAT_STEP;
        const uint8_t *masks = within(p, limit);
        p = masks + MASKS;
        for (size_t i = 0; i < some; i += FLOAT_CHAINS) {
            vf column[FLOAT_CHAINS][GROUP_VECTORS];
            p = expand_columns(type, p, masks + 2 * i, column);
            for (size_t c = 0; c < FLOAT_CHAINS && i + c < some; c++)
                UNROLL for (int v = 0; v < GROUP_VECTORS; v++) store(to[v] + (k + i + c) * stride, column[c][v]);
        }
    }
    return p;
}

#define FLOATS(TYPE)                                                                                               \
    static __attribute__((noinline)) const uint8_t *columns_##TYPE(const uint8_t *p, const uint8_t *limit, size_t depth, \
                                                                   float *const *to, size_t stride) {              \
        return decode_columns(FK_TYPE_##TYPE, p, limit, depth, to, stride);                                        \
    }
FK_SPARSE_FLOAT_TYPES(FLOATS)
#undef FLOATS

/* Where the first columns of a group of plain floats are. */
static cursor begin_columns(const fk_weights *w, size_t group) {
    if (w->layout == FK_LAYOUT_NARROW) return begin_narrow(w, group);
    return (cursor){.p = indexed_group(w, group)};
}

/* Decodes the `depth` columns that come next; see decode_columns and decode_narrow. */
static void decode_any_columns(const fk_weights *w, cursor *at, size_t depth, float *const *to, size_t stride) {
    const int narrow = w->layout == FK_LAYOUT_NARROW;
    switch (w->type) {
#define FLOATS(TYPE)                                                             \
    case FK_TYPE_##TYPE:                                                         \
        if (narrow)                                                              \
            narrow_columns_##TYPE(at, limit_of(w), depth, to, stride);           \
        else                                                                     \
            at->p = columns_##TYPE(at->p, limit_of(w), depth, to, stride);       \
        break;
        FK_SPARSE_FLOAT_TYPES(FLOATS)
#undef FLOATS
    default: break;
    }
}

/* Columns that are decoded together for several generated tokens. */
#define SPARSE_DEPTH 256

/* Floats of scratch for these columns, and for each token the sums of a group so far and its products. */
#define SPARSE_FLOAT_SCRATCH(TOKENS) (SPARSE_DEPTH * FK_GROUP + (TOKENS) * (FLOAT_CHAINS + 1) * FK_GROUP)

/* total[t][v][c] += the products of columns c, c + FLOAT_CHAINS and so on, as far as there are `depth` (the rest of which go to
 * chain 0), for `tokens` tokens (a constant). The columns are decoded, [depth, FK_GROUP]. */
INLINE void add_columns(int tokens, const float *columns, size_t depth, const float *x, size_t x_stride, float *total) {
    UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
        vf sum[FLOAT_TOKENS][FLOAT_CHAINS];
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int c = 0; c < FLOAT_CHAINS; c++)
                sum[t][c] = load(total + ((t * GROUP_VECTORS + v) * FLOAT_CHAINS + c) * FK_LANES);
        size_t k = 0;
        for (; k + FLOAT_CHAINS <= depth; k += FLOAT_CHAINS)
            UNROLL for (int c = 0; c < FLOAT_CHAINS; c++) {
                const vf column = load(columns + (k + c) * FK_GROUP + v * FK_LANES);
                UNROLL for (int t = 0; t < tokens; t++) sum[t][c] += column * x[t * x_stride + k + c];
            }
        for (; k < depth; k++)
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t][0] += load(columns + k * FK_GROUP + v * FK_LANES) * x[t * x_stride + k];
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int c = 0; c < FLOAT_CHAINS; c++)
                store(total + ((t * GROUP_VECTORS + v) * FLOAT_CHAINS + c) * FK_LANES, sum[t][c]);
    }
}

/* out[t] (+)= the sums over the chains of total[t], which become 0; adds unless `fresh`. */
INLINE void add_chains(size_t tokens, float *total, int fresh, float *out) {
    for (size_t t = 0; t < tokens; t++, total += FLOAT_CHAINS * FK_GROUP, out += FK_GROUP)
        UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            float *chains = total + v * FLOAT_CHAINS * FK_LANES;
            vf sum = load(chains);
            UNROLL for (int c = 1; c < FLOAT_CHAINS; c++) sum += load(chains + c * FK_LANES);
            store(out + v * FK_LANES, fresh ? sum : load(out + v * FK_LANES) + sum);
        }
}

/* Rows [begin, end) for several generated tokens, summed as sparse_float_streams sums one. */
static void sparse_floats(const fk_weights *w, size_t begin, size_t end, const fk_activations *x, float *out,
                          size_t out_stride, float *scratch) {
    float *columns = scratch, *total = columns + SPARSE_DEPTH * FK_GROUP;
    float *sums = total + x->tokens * FLOAT_CHAINS * FK_GROUP;
    const size_t whole = x->cols / FLOAT_STEP * FLOAT_STEP;
    float *to[GROUP_VECTORS];
    for (int v = 0; v < GROUP_VECTORS; v++) to[v] = columns + v * FK_LANES;
    for (size_t row = begin; row < end; row += FK_GROUP) {
        const size_t rows = end - row < FK_GROUP ? end - row : FK_GROUP;
        cursor at = begin_columns(w, row / FK_GROUP);
        memset(total, 0, x->tokens * FLOAT_CHAINS * FK_GROUP * sizeof *total);
        for (size_t k = 0, depth; k < x->cols; k += depth) {
            /* What is left of whole steps is summed by itself. */
            if (k == whole) {
                add_chains(x->tokens, total, 1, sums);
                memset(total, 0, x->tokens * FLOAT_CHAINS * FK_GROUP * sizeof *total);
            }
            depth = (k < whole ? whole : x->cols) - k;
            if (depth > SPARSE_DEPTH) depth = SPARSE_DEPTH;
            decode_any_columns(w, &at, depth, to, FK_GROUP);
            size_t t = 0;
            for (; t + FLOAT_TOKENS <= x->tokens; t += FLOAT_TOKENS)
                add_columns(FLOAT_TOKENS, columns, depth, x->values + t * x->cols + k, x->cols,
                            total + t * FLOAT_CHAINS * FK_GROUP);
            for (; t < x->tokens; t++)
                add_columns(1, columns, depth, x->values + t * x->cols + k, x->cols, total + t * FLOAT_CHAINS * FK_GROUP);
        }
        add_chains(x->tokens, total, whole == x->cols, sums);
        for (size_t t = 0; t < x->tokens; t++)
            memcpy(out + t * out_stride + row, sums + t * FK_GROUP, rows * sizeof *out);
    }
}

/* ---- one token ---- */

typedef void indexed_streams_function(int count, const uint8_t *const *groups, const uint8_t *const *limits, size_t ahead,
                                     const fk_activations *x, float *const *out);
typedef void sparse_group_function(const uint8_t *p, const uint8_t *limit, size_t rows, const fk_activations *x, float *out,
                                   size_t out_stride, float *scratch);

#define BLOCKS(TYPE)                                                                                               \
    static __attribute__((noinline)) void sparse_streams_##TYPE(int count, const uint8_t *const *groups,           \
                                                                const uint8_t *const *limits, size_t ahead,        \
                                                                const fk_activations *x, float *const *out) {      \
        sparse_streams(FK_TYPE_##TYPE, count, groups, limits, ahead, x, out);                                      \
    }                                                                                                              \
    static __attribute__((noinline)) void sparse_group_##TYPE(const uint8_t *p, const uint8_t *limit, size_t rows, \
                                                              const fk_activations *x, float *out,                 \
                                                              size_t out_stride, float *scratch) {                 \
        sparse_group_times(FK_TYPE_##TYPE, p, limit, rows, x, out, out_stride, scratch);                           \
    }
#define FLOATS(TYPE)                                                                                               \
    static __attribute__((noinline)) void sparse_streams_##TYPE(int count, const uint8_t *const *groups,           \
                                                                const uint8_t *const *limits, size_t ahead,        \
                                                                const fk_activations *x, float *const *out) {      \
        sparse_float_streams(FK_TYPE_##TYPE, count, groups, limits, ahead, x, out);                                \
    }
FK_SPARSE_BLOCK_TYPES(BLOCKS)
FK_SPARSE_FLOAT_TYPES(FLOATS)
#undef BLOCKS
#undef FLOATS

static indexed_streams_function *indexed_streams_for(fk_type type, fk_layout layout) {
    if (layout == FK_LAYOUT_NARROW) return type == FK_TYPE_F16 ? narrow_streams_F16 : narrow_streams_BF16;
    switch (type) {
#define FUNCTION(TYPE) \
    case FK_TYPE_##TYPE: return sparse_streams_##TYPE;
        FK_SPARSE_BLOCK_TYPES(FUNCTION)
        FK_SPARSE_FLOAT_TYPES(FUNCTION)
#undef FUNCTION
    default: return 0;
    }
}

static sparse_group_function *sparse_group_for(fk_type type) {
    switch (type) {
#define FUNCTION(TYPE) \
    case FK_TYPE_##TYPE: return sparse_group_##TYPE;
        FK_SPARSE_BLOCK_TYPES(FUNCTION)
#undef FUNCTION
    default: return 0;
    }
}

/* Calls `multiply`, which goes on by `step` columns, for the groups at `count` places, and moves each place on by one. */
static void multiply_indexed_at(indexed_streams_function *multiply, int fetches, place *places, size_t count, size_t step,
                               const fk_rows *end, const fk_activations *x) {
    const uint8_t *groups[STREAMS] = {0}, *limits[STREAMS] = {0};
    float *out[STREAMS] = {0}, *to[STREAMS], edge[STREAMS][FK_GROUP];
    size_t rows[STREAMS], bytes = 0;
    if (count == 0) return;
    for (size_t g = 0; g < count; g++) {
        const fk_rows *part = places[g].part;
        const size_t row = part->begin + places[g].group * FK_GROUP;
        rows[g] = part->end - row < FK_GROUP ? part->end - row : FK_GROUP;
        groups[g] = indexed_group(&part->weights, row / FK_GROUP);
        limits[g] = limit_of(&part->weights);
        bytes += (size_t)(indexed_group(&part->weights, row / FK_GROUP + 1) - groups[g]);
        to[g] = part->out + row;
        out[g] = rows[g] < FK_GROUP ? edge[g] : to[g];
        places[g] = move_on(places[g], 1, end);
    }
    /* The lines of 64 bytes that a step takes on average. */
    const size_t lines = fetches ? bytes / count * step / x->cols / 64 + 1 : 0;
    multiply((int)count, groups, limits, lines < MOST_AHEAD ? lines : MOST_AHEAD, x, out);
    for (size_t g = 0; g < count; g++)
        if (rows[g] < FK_GROUP) memcpy(to[g], out[g], rows[g] * sizeof *to[g]);
}

/* How groups of a type are read where packed groups are read as `how` says. Sparse floats are always asked for, at four places or
 * more: each of their lines takes so many instructions that the processor does not see the next ones in time by itself. */
static fk_reading indexed_reading(fk_type type, fk_layout layout, const fk_reading *how) {
    if (block_len(type) > 1 || layout == FK_LAYOUT_NARROW) return *how;
    return (fk_reading){how->streams < 4 ? 4 : how->streams, 1};
}

/* As in_streams, for groups that an index finds, all of one layout. */
static void in_indexed_streams(const fk_reading *packed, const fk_rows *parts, const fk_rows *end, const fk_activations *x) {
    const fk_type type = parts->weights.type;
    const fk_layout layout = parts->weights.layout;
    const fk_reading how = indexed_reading(type, layout, packed);
    indexed_streams_function *multiply = indexed_streams_for(type, layout);
    const size_t step = block_len(type) > FLOAT_STEP ? block_len(type) : FLOAT_STEP;
    size_t count = 0;
    for (const fk_rows *part = parts; part < end; part++) count += groups_of(part);
    const size_t streams = even_streams(count, streams_of(type, &how)), length = count / streams;
    place places[STREAMS], next = move_on((place){parts, 0}, 0, end);
    for (size_t g = 0; g < streams; g++, next = move_on(next, length, end)) places[g] = next;
    for (size_t i = 0; i < length; i++) multiply_indexed_at(multiply, how.fetches, places, streams, step, end, x);
    const size_t rest = count - streams * length;
    for (size_t g = 0; g < rest; g++, next = move_on(next, 1, end)) places[g] = next;
    multiply_indexed_at(multiply, how.fetches, places, rest, step, end, x);
}

/* Products of rows [begin, end) of a type in blocks and several tokens, or tokens of a prompt. */
static void sparse_rows(const fk_weights *w, size_t begin, size_t end, const fk_activations *x, float *out,
                        size_t out_stride, float *scratch) {
    sparse_group_function *multiply = sparse_group_for(w->type);
    for (size_t row = begin; row < end; row += FK_GROUP)
        multiply(indexed_group(w, row / FK_GROUP), limit_of(w), end - row < FK_GROUP ? end - row : FK_GROUP, x, out + row,
                 out_stride, scratch);
}
