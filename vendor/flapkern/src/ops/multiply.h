/* Products of two matrices of floats, for training. Included by table.h.
 *
 * Both factors are packed in pieces, whichever way they lie in memory: to the tiles of tiled.h where there are instructions for
 * bfloat16, else to lines of floats and the panels of panels.h. An element is summed over k in order, whatever piece it falls in. */

/* Columns of the output and places of the sum that are packed together: 256 KiB in bfloat16. */
#define MULTIPLY_COLS 256
#define MULTIPLY_DEPTH 512

/* The last column that is wanted of the rows before `end`. */
INLINE size_t reach_of(size_t end, size_t reach) { return reach > SIZE_MAX - end ? SIZE_MAX : end - 1 + reach; }

#if FK_BF16

/* Lines of a factor that are packed together, and stay in the first-level cache. */
#define MULTIPLY_ROWS (2 * FK_TILE_TOKENS)

#define MULTIPLY_SCRATCH \
    (MULTIPLY_COLS * MULTIPLY_DEPTH / 2 + MULTIPLY_ROWS * MULTIPLY_DEPTH / 2 + EDGE_ROWS * MULTIPLY_ROWS + 16)

/* The tile of up to 16 lines and up to 32 places of the sum; what is missing is 0. Its rows are lines of 32 places, or with `pairs` 16
 * pairs of places, each of 16 lines. */
INLINE void tile_of_factor(const fk_factor *f, size_t line, size_t lines, size_t k, size_t depth, int pairs, uint16_t *tile) {
    uint16_t other[FK_TILE] __attribute__((aligned(64)));
    const float *p = f->values + line * f->line_stride + k * f->sum_stride;
    if (lines > FK_GROUP) lines = FK_GROUP;
    if (depth > FK_TILE_COLS) depth = FK_TILE_COLS;
    if (f->sum_stride == 1) {
        uint16_t *to = pairs ? other : tile;
        const size_t high = depth > FK_LANES ? depth - FK_LANES : 0;
        for (size_t i = 0; i < FK_GROUP; i++, to += FK_TILE_COLS) {
            __m512i row = _mm512_setzero_si512();
            if (i < lines) {
                const float *from = p + i * f->line_stride;
                row = depth == FK_TILE_COLS ? to_bfloats(load(from), load(from + FK_LANES))
                                            : to_bfloats(load_masked(from, depth), load_masked(from + FK_LANES, high));
            }
            _mm512_store_si512(to, row);
        }
        if (pairs) transpose_words(other, FK_TILE_COLS * sizeof *other, tile);
        return;
    }
    uint16_t *to = pairs ? tile : other;
    for (size_t i = 0; i < FK_TILE_COLS; i += 2, to += 2 * FK_GROUP) {
        vf even = {0}, odd = {0};
        if (i < depth) even = load_masked(p + i * f->sum_stride, lines);
        if (i + 1 < depth) odd = load_masked(p + (i + 1) * f->sum_stride, lines);
        store_pairs(to, even, odd);
    }
    if (!pairs) transpose_words(other, FK_TILE_COLS * sizeof *other, tile);
}

/* Groups of 16 lines, each in tiles along the sum. */
static void tiles_of_factor(const fk_factor *f, size_t line, size_t lines, size_t k, size_t depth, int pairs, uint16_t *tiles) {
    for (size_t i = 0; i < lines; i += FK_GROUP)
        for (size_t s = 0; s < depth; s += FK_TILE_COLS, tiles += FK_TILE)
            tile_of_factor(f, line + i, lines - i, k + s, depth - s, pairs, tiles);
}

static void multiply(const fk_factor *a, const fk_factor *b, size_t rows, size_t cols, size_t depth, size_t reach, int add,
                     float *out, size_t out_stride, float *scratch) {
    scratch = aligned(scratch);
    uint16_t *b_tiles = (uint16_t *)scratch, *a_tiles = b_tiles + MULTIPLY_COLS * MULTIPLY_DEPTH;
    float *edge = (float *)(a_tiles + MULTIPLY_ROWS * MULTIPLY_DEPTH);
    begin_tiles();
    for (size_t j = 0; j < cols; j += MULTIPLY_COLS) {
        const size_t wide = cols - j < MULTIPLY_COLS ? cols - j : MULTIPLY_COLS;
        for (size_t k = 0; k < depth; k += MULTIPLY_DEPTH) {
            const size_t deep = depth - k < MULTIPLY_DEPTH ? depth - k : MULTIPLY_DEPTH;
            const size_t steps = (deep + FK_TILE_COLS - 1) / FK_TILE_COLS, stride = steps * FK_TILE;
            const int fresh = k == 0 && !add;
            tiles_of_factor(b, j, wide, k, deep, 1, b_tiles);
            for (size_t i = 0; i < rows; i += MULTIPLY_ROWS) {
                const size_t high = rows - i < MULTIPLY_ROWS ? rows - i : MULTIPLY_ROWS;
                const int blocks = high > FK_TILE_TOKENS ? 2 : 1;
                tiles_of_factor(a, i, high, k, deep, 0, a_tiles);
                for (size_t g = 0; g < wide && j + g <= reach_of(i + high, reach); g += 2 * FK_GROUP) {
                    const size_t some = wide - g < 2 * FK_GROUP ? wide - g : 2 * FK_GROUP;
                    const int pair = some > FK_GROUP ? 2 : 1;
                    const uint16_t *these = b_tiles + g / FK_GROUP * stride;
                    float *to = out + i * out_stride + j + g;
                    if (some == (size_t)pair * FK_GROUP && high == (size_t)blocks * FK_TILE_TOKENS) {
                        multiply_any_tiles(blocks, pair, a_tiles, stride, these, stride, steps, fresh, to, out_stride);
                        continue;
                    }
                    if (!fresh)
                        for (size_t r = 0; r < high; r++) memcpy(edge + r * EDGE_ROWS, to + r * out_stride, some * sizeof *to);
                    multiply_any_tiles(blocks, pair, a_tiles, stride, these, stride, steps, fresh, edge, EDGE_ROWS);
                    for (size_t r = 0; r < high; r++) memcpy(to + r * out_stride, edge + r * EDGE_ROWS, some * sizeof *to);
                }
            }
        }
    }
    end_tiles();
    if (depth == 0 && !add)
        for (size_t i = 0; i < rows; i++) memset(out + i * out_stride, 0, cols * sizeof *out);
}

#else

/* Lines of a factor that are packed together; a multiple of every GEMM_TOKENS. */
#define MULTIPLY_ROWS 96

#define MULTIPLY_SCRATCH \
    (MULTIPLY_COLS * MULTIPLY_DEPTH + MULTIPLY_ROWS * MULTIPLY_DEPTH + GEMM_TOKENS * GEMM_ROWS)

/* Panels of GEMM_ROWS lines, each [depth, GEMM_ROWS]; missing lines are 0. */
static void panels_of_factor(const fk_factor *f, size_t line, size_t lines, size_t k, size_t depth, float *panel) {
    for (size_t i = 0; i < lines; i += GEMM_ROWS, panel += depth * GEMM_ROWS) {
        const size_t some = lines - i < GEMM_ROWS ? lines - i : GEMM_ROWS;
        const float *p = f->values + (line + i) * f->line_stride + k * f->sum_stride;
        if (some < GEMM_ROWS) memset(panel, 0, depth * GEMM_ROWS * sizeof *panel);
        if (f->line_stride == 1)
            for (size_t s = 0; s < depth; s++) memcpy(panel + s * GEMM_ROWS, p + s * f->sum_stride, some * sizeof *p);
        else
            for (size_t r = 0; r < some; r++)
                for (size_t s = 0; s < depth; s++) panel[s * GEMM_ROWS + r] = p[r * f->line_stride + s];
    }
}

static void multiply(const fk_factor *a, const fk_factor *b, size_t rows, size_t cols, size_t depth, size_t reach, int add,
                     float *out, size_t out_stride, float *scratch) {
    float *panels = scratch, *lines = panels + MULTIPLY_COLS * MULTIPLY_DEPTH, *block = lines + MULTIPLY_ROWS * MULTIPLY_DEPTH;
    for (size_t j = 0; j < cols; j += MULTIPLY_COLS) {
        const size_t wide = cols - j < MULTIPLY_COLS ? cols - j : MULTIPLY_COLS;
        for (size_t k = 0; k < depth; k += MULTIPLY_DEPTH) {
            const size_t deep = depth - k < MULTIPLY_DEPTH ? depth - k : MULTIPLY_DEPTH;
            const int fresh = k == 0 && !add;
            panels_of_factor(b, j, wide, k, deep, panels);
            for (size_t i = 0; i < rows; i += MULTIPLY_ROWS) {
                const size_t high = rows - i < MULTIPLY_ROWS ? rows - i : MULTIPLY_ROWS;
                const float *x = a->values + i * a->line_stride + k * a->sum_stride;
                size_t x_stride = a->line_stride;
                if (a->sum_stride != 1) {
                    for (size_t s = 0; s < deep; s++)
                        for (size_t r = 0; r < high; r++) lines[r * deep + s] = x[s * a->sum_stride + r];
                    x = lines, x_stride = deep;
                }
                for (size_t g = 0; g < wide && j + g <= reach_of(i + high, reach); g += GEMM_ROWS)
                    gemm_panel(high, x, x_stride, panels + g * deep, deep, fresh, wide - g < GEMM_ROWS ? wide - g : GEMM_ROWS,
                               out + i * out_stride + j + g, out_stride, block);
            }
        }
    }
    if (depth == 0 && !add)
        for (size_t i = 0; i < rows; i++) memset(out + i * out_stride, 0, cols * sizeof *out);
}

#endif
