/* Activations in 8 bits and in bfloat16, for the products that read these forms. Included by table.h. */

/* ---- 8 bits ---- */

/* The place `values` values further on, whole blocks, in a plane with `parts` scales for a block. */
INLINE fk_plane plane_at(const fk_plane *p, size_t values, int parts) {
    const size_t block = values / FK_BLOCK;
    return (fk_plane){p->quantized + values, p->scales + parts * block, p->scaled_sums + parts * block, p->code_sums + 2 * block};
}

/* One block to the beginning of a plane, with one scale or, in two `parts` (a constant), with one for each half. */
INLINE void quantize_block(int parts, const float *x, const fk_plane *to) {
    const int len = FK_BLOCK / parts;
    UNROLL for (int part = 0; part < parts; part++) {
        /* Absolute values compare as integers like the numbers they stand for, and NaN is the greatest. */
        vi largest = {0};
        for (int i = part * len; i < (part + 1) * len; i += FK_LANES) {
            vi bits = (vi)vabs(load(x + i));
            vi greater = bits > largest;
            largest = (greater & bits) | (~greater & largest);
        }
        const float peak = max_bits(largest);
        int32_t *sums = to->code_sums + part;
        /* Values with an infinity or a NaN among them must not pass for finite ones. */
        if (!(peak < INFINITY)) {
            to->scales[part] = to->scaled_sums[part] = NAN;
            for (int half = 0; half < 2 / parts; half++) sums[half] = 0;
            memset(to->quantized + part * len, 0, len);
            continue;
        }
        const float scale = peak >= FK_LEAST_PEAK ? peak / 127.0f : 0, inverse = peak >= FK_LEAST_PEAK ? 127.0f / peak : 0;
        int all = 0;
        for (int half = 0; half < 2 / parts; half++) {
            vi sum = {0};
            for (int i = part * len + 16 * half; i < part * len + 16 * half + 16; i += FK_LANES) {
                vi rounded = round_to_int(load(x + i) * inverse);
                sum += rounded;
                narrow_to_bytes(to->quantized + i, rounded);
            }
            sums[half] = sum_ints(sum);
            all += sums[half];
        }
        to->scales[part] = scale;
        to->scaled_sums[part] = scale * (float)all;
    }
}

/* Blocks that are quantised together. A file whose instruction set gains by it defines FK_OWN_FOUR_BLOCKS and quantize_four, which
 * does as quantize_block does; it returns 0, and has written nothing, if there is an infinity or a NaN. */
#define BLOCKS_TOGETHER 4

/* n values of one token, whole blocks; see quantize_block. */
INLINE void quantize_row(int parts, const float *x, size_t n, const fk_plane *to) {
    size_t i = 0;
#ifdef FK_OWN_FOUR_BLOCKS
    for (; i + BLOCKS_TOGETHER * FK_BLOCK <= n; i += BLOCKS_TOGETHER * FK_BLOCK) {
        const fk_plane at = plane_at(to, i, parts);
        if (quantize_four(parts, x + i, &at)) continue;
        for (size_t b = 0; b < BLOCKS_TOGETHER * FK_BLOCK; b += FK_BLOCK) {
            const fk_plane block = plane_at(&at, b, parts);
            quantize_block(parts, x + i + b, &block);
        }
    }
#endif
    for (; i < n; i += FK_BLOCK) {
        const fk_plane at = plane_at(to, i, parts);
        quantize_block(parts, x + i, &at);
    }
}

static void quantize(const float *x, size_t tokens, size_t n, size_t cols, int halves, const fk_plane *to) {
    for (size_t t = 0; t < tokens; t++) {
        const fk_plane row = plane_at(to, t * cols, halves ? 2 : 1);
        if (halves)
            quantize_row(2, x + t * n, n, &row);
        else
            quantize_row(1, x + t * n, n, &row);
    }
}

/* ---- bfloat16; ops/tiled.h has another where there are instructions for it ---- */

#if !FK_BF16
static void fill_tiles(const float *x, size_t tokens, size_t cols, uint16_t *tiles) {
    for (size_t k = 0; k < cols; k += FK_TILE_COLS, tiles += FK_TILE) {
        size_t count = cols - k < FK_TILE_COLS ? cols - k : FK_TILE_COLS;
        memset(tiles, 0, FK_TILE * sizeof *tiles);
        for (size_t t = 0; t < tokens; t++)
            for (size_t i = 0; i < count; i++) tiles[t * FK_TILE_COLS + i] = float_to_bfloat(x[t * cols + k + i]);
    }
}
#endif
