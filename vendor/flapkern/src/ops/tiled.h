/* Products of many tokens in bfloat16, with AMX or with AVX-512's dot products of pairs. Included by table.h.
 *
 * Both sides come in tiles of 16 by 32 values, 1 KiB: of activations 16 tokens by 32 columns; of weights 32 columns by 16
 * rows, pairs of columns together, [16 pairs, 16 rows, 2] (the layout of TDPBF16PS: Intel's Instruction Set Extensions
 * reference). Weights of any type and layout are decoded to such tiles, two groups of 16 rows at a time, and every tile of
 * activations is multiplied by them. The sum of an element runs over the columns in order, whatever tile it falls in. */

#define TILE_PAIRS (FK_TILE_COLS / 2)

/* Rows and columns that are decoded together: 192 KiB of tiles, which fit the second-level cache. All of them are multiplied
 * with 32 tokens, two groups of rows at a time, before the next 32, so that activations are read from memory only once. */
#define TILED_ROWS 128
#define TILED_DEPTH 768

/* Whether tokens of prompts are multiplied in bfloat16: with AMX by all types but F32, which would lose by it; without AMX only
 * by 16-bit floats, since 8-bit products are faster for packed codes, and by sparse types with a minimum, whose 8-bit products are
 * twice as many: it counts only where there is a weight. */
static int wants_tiles(const fk_weights *w) {
#if FK_AMX
    return w->type != FK_TYPE_F32;
#else
    return w->type == FK_TYPE_F16 || w->type == FK_TYPE_BF16 || (w->layout == FK_LAYOUT_SPARSE && has_minimum(w->type));
#endif
}

/* ---- activations ---- */

/* 32 values rounded to nearest even, the first 16 from `low`. */
INLINE __m512i to_bfloats(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

/* The first n values at p, at most FK_LANES, and zeros. */
INLINE vf load_masked(const float *p, size_t n) {
    return (vf)_mm512_maskz_loadu_ps(n >= FK_LANES ? 0xffff : (__mmask16)((1u << n) - 1), p);
}

static void fill_tiles(const float *x, size_t tokens, size_t cols, uint16_t *tiles) {
    for (size_t t = 0; t < FK_TILE_TOKENS; t++) {
        uint16_t *to = tiles + t * FK_TILE_COLS;
        const float *from = x + t * cols;
        size_t k = 0;
        for (; t < tokens && k + FK_TILE_COLS <= cols; k += FK_TILE_COLS, to += FK_TILE)
            _mm512_store_si512(to, to_bfloats(load(from + k), load(from + k + FK_LANES)));
        for (; k < cols; k += FK_TILE_COLS, to += FK_TILE) {
            __m512i rest = _mm512_setzero_si512();
            if (t < tokens) {
                size_t n = cols - k;
                rest = to_bfloats(load_masked(from + k, n), load_masked(from + k + FK_LANES, n > FK_LANES ? n - FK_LANES : 0));
            }
            _mm512_store_si512(to, rest);
        }
    }
}

/* ---- weights ---- */

/* Two columns of 16 rows in bfloat16, the two values of a row side by side. */
INLINE __m512i pairs_of(vf even, vf odd) {
    const __m512i together = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                              21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(together, to_bfloats(even, odd));
}

INLINE void store_pairs(uint16_t *to, vf even, vf odd) { _mm512_store_si512(to, pairs_of(even, odd)); }

/* One tile from 32 columns of a packed group; `kept` as in multiply_block. */
INLINE void tile_of_block(fk_type type, const packed_block *w, const vw *kept, uint16_t *tile) {
    UNROLL for (int j = 0; j < 8; j++) {
        const int half = has_half_scales(type) ? j / 4 : 0;
        vf column[4];
        UNROLL for (int i = 0; i < 4; i++) {
            vi code = (vi)((vu)w->codes[j] >> (8 * i)) & 255;
            column[i] = to_float(code - code_offset(type)) * w->scale[half];
            if (has_minimum(type) && kept)
                column[i] += w->minimum[half] * to_float((vi)((vu)kept[j] >> (8 * i)) & 255);
            else if (has_minimum(type))
                column[i] += w->minimum[half];
        }
        store_pairs(tile + 4 * j * FK_GROUP, column[0], column[1]);
        store_pairs(tile + (4 * j + 2) * FK_GROUP, column[2], column[3]);
    }
}

/* The tiles of `depth` columns of a packed group. */
INLINE void tiles_of_group(fk_type type, const uint8_t *group, size_t depth, uint16_t *tiles) {
    for (size_t k = 0; k < depth; group += FK_GROUP * block_bytes(type)) {
        if (block_len(type) == FK_SUPER) {
            packed_block w[8];
            load_super_block(type, group, 0, w);
            _Pragma("GCC unroll 1") for (int s = 0; s < 8; s++, k += FK_BLOCK, tiles += FK_TILE)
                tile_of_block(type, &w[s], 0, tiles);
        } else {
            packed_block w;
            load_block(type, group, 0, 0, &w);
            tile_of_block(type, &w, 0, tiles);
            k += FK_BLOCK, tiles += FK_TILE;
        }
    }
}

/* One function for each type, with the type as a constant. */
#define TILES(TYPE, ...)                                                                                    \
    static __attribute__((noinline)) void tiles_##TYPE(const uint8_t *group, size_t depth, uint16_t *tiles) { \
        tiles_of_group(FK_TYPE_##TYPE, group, depth, tiles);                                                \
    }
FK_BLOCK_TYPES(TILES)
#undef TILES

/* The tiles of `depth` columns of a group of packed floats; what is missing of the last tile is 0. */
INLINE void tiles_of_floats(fk_type type, const uint8_t *group, size_t depth, uint16_t *tiles) {
    size_t k = 0;
    for (; k + 2 <= depth; k += 2, tiles += 2 * FK_GROUP)
        store_pairs(tiles, load_column(type, group, k, 0), load_column(type, group, k + 1, 0));
    if (k < depth) {
        store_pairs(tiles, load_column(type, group, k, 0), (vf){0});
        k += 2, tiles += 2 * FK_GROUP;
    }
    for (; k % FK_TILE_COLS != 0; k += 2, tiles += 2 * FK_GROUP) _mm512_store_si512(tiles, _mm512_setzero_si512());
}

static void tiles_of_packed(fk_type type, const uint8_t *group, size_t depth, uint16_t *tiles) {
    switch (type) {
    case FK_TYPE_F16: tiles_of_floats(FK_TYPE_F16, group, depth, tiles); break;
    case FK_TYPE_BF16: tiles_of_floats(FK_TYPE_BF16, group, depth, tiles); break;
    case FK_TYPE_F32: break; /* stays in single precision */
#define TILES(TYPE, ...) \
    case FK_TYPE_##TYPE: tiles_##TYPE(group, depth, tiles); break;
        FK_BLOCK_TYPES(TILES)
#undef TILES
    default: break; /* is never packed */
    }
}

/* The tiles of `depth` columns of a sparse group from p on; returns where these end. */
INLINE const uint8_t *tiles_of_sparse_group(fk_type type, const uint8_t *p, const uint8_t *limit, size_t depth,
                                            uint16_t *tiles) {
    const size_t parts = block_len(type) / FK_BLOCK;
    for (size_t k = 0; k < depth; k += block_len(type)) {
        const uint8_t *fields = within(p, limit);
        p = fields + field_bytes(type);
        UNROLL for (size_t s = 0; s < parts; s++, tiles += FK_TILE) {
            sparse_block b;
            if (parts > 1) p = within(p, limit);
            load_scale(type, fields, (int)s, 0, &b.rows[0]);
            p = expand_codes(type, p, &b);
            tile_of_block(type, &b.rows[0], b.kept[0], tiles);
        }
    }
    return p;
}

/* The same of plain floats; what is missing of the last tile is 0. */
INLINE const uint8_t *tiles_of_sparse_floats(fk_type type, const uint8_t *p, const uint8_t *limit, size_t depth,
                                             uint16_t *tiles) {
    for (size_t k = 0; k < depth; k += FK_TILE_COLS, tiles += FK_TILE) {
        const size_t some = depth - k < FK_TILE_COLS ? depth - k : FK_TILE_COLS;
        const uint8_t *masks = within(p, limit);
        p = masks + MASKS;
        for (size_t i = 0; i < FK_TILE_COLS; i += FLOAT_CHAINS) {
            vf column[FLOAT_CHAINS] = {0};
            if (i < some) {
                halves_line line;
                expand_halves(type, p, masks + 2 * i, &line);
                UNROLL for (int c = 0; c < FLOAT_CHAINS; c++) column[c] = column_of(type, &line, c, 0);
                p += 2 * count_bits(load_u64(masks + 2 * i));
            }
            store_pairs(tiles + i * FK_GROUP, column[0], column[1]);
            store_pairs(tiles + (i + 2) * FK_GROUP, column[2], column[3]);
        }
    }
    return p;
}

#define BLOCKS(TYPE)                                                                                               \
    static __attribute__((noinline)) const uint8_t *sparse_tiles_##TYPE(const uint8_t *p, const uint8_t *limit,    \
                                                                        size_t depth, uint16_t *tiles) {           \
        return tiles_of_sparse_group(FK_TYPE_##TYPE, p, limit, depth, tiles);                                      \
    }
#define FLOATS(TYPE)                                                                                               \
    static __attribute__((noinline)) const uint8_t *sparse_tiles_##TYPE(const uint8_t *p, const uint8_t *limit,    \
                                                                        size_t depth, uint16_t *tiles) {           \
        return tiles_of_sparse_floats(FK_TYPE_##TYPE, p, limit, depth, tiles);                                     \
    }
FK_SPARSE_BLOCK_TYPES(BLOCKS)
FK_SPARSE_FLOAT_TYPES(FLOATS)
#undef BLOCKS
#undef FLOATS

static const uint8_t *tiles_of_sparse(fk_type type, const uint8_t *p, const uint8_t *limit, size_t depth, uint16_t *tiles) {
    switch (type) {
#define TILES(TYPE) \
    case FK_TYPE_##TYPE: return sparse_tiles_##TYPE(p, limit, depth, tiles);
        FK_SPARSE_BLOCK_TYPES(TILES)
        FK_SPARSE_FLOAT_TYPES(TILES)
#undef TILES
    default: return p;
    }
}

/* The tiles of the `depth` columns of a narrow group that come next: numbers lie in words as in tiles. */
INLINE void tiles_of_narrow_floats(fk_type type, cursor *at, const uint8_t *limit, size_t depth, uint16_t *tiles) {
    const size_t whole = in_blocks(depth);
    for (size_t k = 0; k < whole; k += EIGHT_COLUMNS, at->p += EIGHT_BYTES) {
        vu words[4];
        load_eight(within(at->p, limit), 0, words);
        UNROLL for (int i = 0; i < 4; i++)
            _mm512_store_si512(tiles + (k + 2 * i) * FK_GROUP, (__m512i)((words[i] & OWN_BITS) | COMMON_BITS));
    }
    for (const uint8_t *p; (p = next_listed(at, at->column + whole)) != 0;) {
        const size_t column = listed_column(p) - at->column, place = column / 2 * 2 * FK_GROUP + 2 * listed_row(p) + column % 2;
        const vf value = splat(listed_value(type, p));
        if (column < whole) tiles[place] = (uint16_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(to_bfloats(value, value)));
    }
    at->column += depth;
    if (whole < depth) tiles_of_floats(type, within(at->p, limit), depth - whole, tiles + whole * FK_GROUP);
}

#define FLOATS(TYPE)                                                                                               \
    static __attribute__((noinline)) void narrow_tiles_##TYPE(cursor *at, const uint8_t *limit, size_t depth,    \
                                                              uint16_t *tiles) {                                   \
        tiles_of_narrow_floats(FK_TYPE_##TYPE, at, limit, depth, tiles);                                           \
    }
FK_NARROW_TYPES(FLOATS)
#undef FLOATS

/* The tiles of the `depth` columns that come next of a group that an index finds. */
static void tiles_of_indexed(const fk_weights *w, cursor *at, size_t depth, uint16_t *tiles) {
    if (w->layout == FK_LAYOUT_SPARSE)
        at->p = tiles_of_sparse(w->type, at->p, limit_of(w), depth, tiles);
    else if (w->type == FK_TYPE_F16)
        narrow_tiles_F16(at, limit_of(w), depth, tiles);
    else
        narrow_tiles_BF16(at, limit_of(w), depth, tiles);
}

/* Transposes 16 by 16 words of 4 bytes from rows at `from`, `stride` bytes apart, to a tile. */
INLINE void transpose_words(const void *from, size_t stride, uint16_t *tile) {
    vf words[FK_LANES];
    UNROLL for (int i = 0; i < FK_LANES; i++) memcpy(&words[i], (const char *)from + i * stride, sizeof words[i]);
    transpose(words);
    UNROLL for (int i = 0; i < FK_LANES; i++) memcpy(tile + 2 * FK_LANES * i, &words[i], sizeof words[i]);
}

/* The tiles of columns [k, k + depth) of native rows [row, row + count), count <= FK_GROUP; missing rows are 0. `rows` and
 * `line` are scratch [FK_GROUP, TILED_DEPTH] and [TILED_DEPTH]. */
static void tiles_of_native(const fk_weights *w, size_t row, size_t count, size_t k, size_t depth, uint16_t *tiles,
                            uint16_t *rows, float *line) {
    const size_t skip = k / block_len(w->type) * block_bytes(w->type);
    const size_t padded = (depth + FK_TILE_COLS - 1) / FK_TILE_COLS * FK_TILE_COLS;
    for (size_t i = depth; i < padded; i++) line[i] = 0;
    for (size_t r = 0; r < FK_GROUP; r++) {
        if (r < count)
            dequantize(w->type, w->data + (row + r) * w->row_bytes + skip, depth, line);
        else if (r == count)
            memset(line, 0, padded * sizeof *line);
        for (size_t i = 0; i < padded; i += FK_TILE_COLS)
            _mm512_store_si512(rows + r * TILED_DEPTH + i, to_bfloats(load(line + i), load(line + i + FK_LANES)));
    }
    for (size_t i = 0; i < padded; i += FK_TILE_COLS, tiles += FK_TILE)
        transpose_words(rows + i, TILED_DEPTH * sizeof *rows, tiles);
}

/* ---- products ---- */

/* out [16 a_count, 16 b_count] (+)= a_count tiles of tokens by b_count tiles of rows, over `steps` steps of 32 columns. Adds to
 * what out holds unless `fresh`. Tiles of one block of tokens lie one after the other, and so do those of one group. */
#if FK_AMX
/* Tile registers 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights, each 16 rows of 64 bytes. Barriers keep the compiler
 * from moving stores past the instructions that load tiles from there, and from dropping stores to the configuration, of which
 * GCC 12 believes that only 8 bytes are read. */
INLINE void compiler_barrier(void) { __asm__ volatile("" : : : "memory"); }

static void begin_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

static void end_tiles(void) { _tile_release(); }

INLINE void multiply_tiles(int a_count, int b_count, const uint16_t *a, size_t a_stride, const uint16_t *b,
                           size_t b_stride, size_t steps, int fresh, float *out, size_t out_stride) {
    const size_t pitch = out_stride * sizeof *out;
    float *low = out + 16 * out_stride;
    compiler_barrier();
    if (fresh) {
        _tile_zero(0);
        if (b_count > 1) _tile_zero(1);
        if (a_count > 1) _tile_zero(2);
        if (a_count > 1 && b_count > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, out, pitch);
        if (b_count > 1) _tile_loadd(1, out + 16, pitch);
        if (a_count > 1) _tile_loadd(2, low, pitch);
        if (a_count > 1 && b_count > 1) _tile_loadd(3, low + 16, pitch);
    }
    for (size_t s = 0; s < steps; s++, a += FK_TILE, b += FK_TILE) {
        /* Activations stay in the first-level cache for several groups of rows; weights come from the second. */
        for (int i = 0; i < b_count; i++) fetch((const uint8_t *)(b + i * b_stride + FK_TILE), FK_TILE * sizeof *b);
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (b_count > 1) {
            _tile_loadd(7, b + b_stride, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (a_count > 1) {
            _tile_loadd(5, a + a_stride, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (a_count > 1 && b_count > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, pitch);
    if (b_count > 1) _tile_stored(1, out + 16, pitch);
    if (a_count > 1) _tile_stored(2, low, pitch);
    if (a_count > 1 && b_count > 1) _tile_stored(3, low + 16, pitch);
    compiler_barrier();
}
#else
static void begin_tiles(void) {}

static void end_tiles(void) {}

/* Tokens whose sums stay in registers. */
#define PAIR_TOKENS 8

INLINE void multiply_tiles(int a_count, int b_count, const uint16_t *a, size_t a_stride, const uint16_t *b,
                           size_t b_stride, size_t steps, int fresh, float *out, size_t out_stride) {
    for (int t0 = 0; t0 < 16 * a_count; t0 += PAIR_TOKENS) {
        const uint16_t *x = a + t0 / 16 * a_stride + t0 % 16 * FK_TILE_COLS, *w = b;
        float *to = out + t0 * out_stride;
        __m512 sum[PAIR_TOKENS][2];
        UNROLL for (int t = 0; t < PAIR_TOKENS; t++)
            UNROLL for (int g = 0; g < b_count; g++)
                sum[t][g] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to + t * out_stride + 16 * g);
        for (size_t s = 0; s < steps; s++, x += FK_TILE, w += FK_TILE)
            _Pragma("GCC unroll 4") for (int pair = 0; pair < TILE_PAIRS; pair++) {
                __m512bh rows[2];
                UNROLL for (int g = 0; g < b_count; g++)
                    rows[g] = (__m512bh)_mm512_load_si512(w + g * b_stride + pair * 32);
                UNROLL for (int t = 0; t < PAIR_TOKENS; t++) {
                    int32_t two;
                    memcpy(&two, x + t * FK_TILE_COLS + 2 * pair, sizeof two);
                    UNROLL for (int g = 0; g < b_count; g++)
                        sum[t][g] = _mm512_dpbf16_ps(sum[t][g], (__m512bh)_mm512_set1_epi32(two), rows[g]);
                }
            }
        UNROLL for (int t = 0; t < PAIR_TOKENS; t++)
            UNROLL for (int g = 0; g < b_count; g++) _mm512_storeu_ps(to + t * out_stride + 16 * g, sum[t][g]);
    }
}

/* multiply_tiles for one tile of each, and only the first 8 rows of weights: out [16, 8] (+)= their products, its rows 16 values apart. */
INLINE void multiply_half_tile(const uint16_t *a, const uint16_t *b, size_t steps, int fresh, float *out) {
    for (int t0 = 0; t0 < 16; t0 += PAIR_TOKENS) {
        const uint16_t *x = a + t0 * FK_TILE_COLS, *w = b;
        float *to = out + t0 * 16;
        __m256 sum[PAIR_TOKENS];
        UNROLL for (int t = 0; t < PAIR_TOKENS; t++) sum[t] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(to + t * 16);
        for (size_t s = 0; s < steps; s++, x += FK_TILE, w += FK_TILE)
            _Pragma("GCC unroll 4") for (int pair = 0; pair < TILE_PAIRS; pair++) {
                const __m256bh row = (__m256bh)_mm256_load_si256((const __m256i *)(w + pair * 32));
                UNROLL for (int t = 0; t < PAIR_TOKENS; t++) {
                    int32_t two;
                    memcpy(&two, x + t * FK_TILE_COLS + 2 * pair, sizeof two);
                    sum[t] = _mm256_dpbf16_ps(sum[t], (__m256bh)_mm256_set1_epi32(two), row);
                }
            }
        UNROLL for (int t = 0; t < PAIR_TOKENS; t++) _mm256_storeu_ps(to + t * 16, sum[t]);
    }
}
#endif

/* multiply_tiles for counts that are not constants. */
static void multiply_any_tiles(int a_count, int b_count, const uint16_t *a, size_t a_stride, const uint16_t *b,
                               size_t b_stride, size_t steps, int fresh, float *out, size_t out_stride) {
    if (a_count > 1 && b_count > 1)
        multiply_tiles(2, 2, a, a_stride, b, b_stride, steps, fresh, out, out_stride);
    else if (a_count > 1)
        multiply_tiles(2, 1, a, a_stride, b, b_stride, steps, fresh, out, out_stride);
    else if (b_count > 1)
        multiply_tiles(1, 2, a, a_stride, b, b_stride, steps, fresh, out, out_stride);
    else
        multiply_tiles(1, 1, a, a_stride, b, b_stride, steps, fresh, out, out_stride);
}

/* Rows of scratch for sums at the edge of the output. */
#define EDGE_ROWS (2 * FK_GROUP)

/* Floats of scratch: the weights' tiles, 2 by 2 tiles of sums for edges, rows and line of tiles_of_native, room to align. */
#define TILED_SCRATCH \
    (TILED_ROWS * TILED_DEPTH / 2 + EDGE_ROWS * 2 * FK_TILE_TOKENS + FK_GROUP * TILED_DEPTH / 2 + TILED_DEPTH + 16)

static void tiled_matmul(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                         size_t out_stride, float *scratch) {
    scratch = aligned(scratch);
    uint16_t *panel = (uint16_t *)scratch;
    float *edge = scratch + TILED_ROWS * TILED_DEPTH / 2;
    uint16_t *rows = (uint16_t *)(edge + EDGE_ROWS * 2 * FK_TILE_TOKENS);
    float *line = (float *)(rows + FK_GROUP * TILED_DEPTH);

    const size_t packed_end = w->layout == FK_LAYOUT_PACKED ? w->rows / FK_GROUP * FK_GROUP : 0;
    const size_t col_tiles = (w->cols + FK_TILE_COLS - 1) / FK_TILE_COLS;
    const size_t token_stride = col_tiles * FK_TILE;
    /* Pieces of equal depth, as far as whole blocks allow. */
    const size_t unit = block_len(w->type) > FK_TILE_COLS ? block_len(w->type) : FK_TILE_COLS;
    const size_t pieces = (w->cols + TILED_DEPTH - 1) / TILED_DEPTH;
    const size_t piece = ((w->cols + pieces - 1) / pieces + unit - 1) / unit * unit;

    begin_tiles();
    for (size_t row = row_begin; row < row_end; row += TILED_ROWS) {
        const size_t count = row_end - row < TILED_ROWS ? row_end - row : TILED_ROWS;
        const int groups = (int)((count + FK_GROUP - 1) / FK_GROUP);
        cursor at[TILED_ROWS / FK_GROUP];
        for (int g = 0; g < groups && is_indexed(w); g++) at[g] = begin_columns(w, row / FK_GROUP + g);
        for (size_t k = 0; k < w->cols; k += piece) {
            const size_t depth = w->cols - k < piece ? w->cols - k : piece;
            const size_t steps = (depth + FK_TILE_COLS - 1) / FK_TILE_COLS;
            for (int g = 0; g < groups; g++) {
                const size_t first = row + g * FK_GROUP;
                uint16_t *tiles = panel + g * steps * FK_TILE;
                if (is_indexed(w))
                    tiles_of_indexed(w, &at[g], depth, tiles);
                else if (first < packed_end)
                    tiles_of_packed(w->type,
                                    w->data + first * w->row_bytes +
                                        k / block_len(w->type) * block_bytes(w->type) * FK_GROUP,
                                    depth, tiles);
                else
                    tiles_of_native(w, first, row_end - first < FK_GROUP ? row_end - first : FK_GROUP, k, depth, tiles,
                                    rows, line);
            }
            for (size_t t = 0; t < x->tokens; t += 2 * FK_TILE_TOKENS) {
                const size_t tokens = x->tokens - t < 2 * FK_TILE_TOKENS ? x->tokens - t : 2 * FK_TILE_TOKENS;
                const int blocks = tokens > FK_TILE_TOKENS ? 2 : 1;
                const uint16_t *a = x->tiles + t / FK_TILE_TOKENS * token_stride + k / FK_TILE_COLS * FK_TILE;
                for (int g = 0; g < groups; g += 2) {
                    const int pair = groups - g < 2 ? 1 : 2;
                    const size_t first = g * FK_GROUP, wide = count - first < 2 * FK_GROUP ? count - first : 2 * FK_GROUP;
                    const uint16_t *b = panel + g * steps * FK_TILE;
                    float *to = out + t * out_stride + row + first;
                    if (wide == (size_t)pair * FK_GROUP && tokens == (size_t)blocks * FK_TILE_TOKENS) {
                        multiply_any_tiles(blocks, pair, a, token_stride, b, steps * FK_TILE, steps, k == 0, to, out_stride);
                        continue;
                    }
                    if (k != 0)
                        for (size_t i = 0; i < tokens; i++)
                            memcpy(edge + i * EDGE_ROWS, to + i * out_stride, wide * sizeof *to);
                    multiply_any_tiles(blocks, pair, a, token_stride, b, steps * FK_TILE, steps, k == 0, edge, EDGE_ROWS);
                    for (size_t i = 0; i < tokens; i++) memcpy(to + i * out_stride, edge + i * EDGE_ROWS, wide * sizeof *to);
                }
            }
        }
    }
    end_tiles();
}
