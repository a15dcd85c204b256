/* Activations in 8 bits and in bfloat16, for the products that read these forms. Included by table.h. */

/* ---- 8 bits ---- */

/* One block to the beginning of a plane. */
INLINE void quantize_block(const float *x, const fk_plane *to) {
    /* Absolute values compare as integers like the numbers they stand for, and NaN is the greatest. */
    vi largest = {0};
    for (int i = 0; i < FK_BLOCK; i += FK_LANES) {
        vi bits = (vi)vabs(load(x + i));
        vi greater = bits > largest;
        largest = (greater & bits) | (~greater & largest);
    }
    const float peak = max_bits(largest);
    /* A block with an infinity or a NaN must not pass for a finite one. */
    if (!(peak < INFINITY)) {
        to->scales[0] = to->block_sums[0] = NAN;
        to->code_sums[0] = to->code_sums[1] = 0;
        memset(to->quantized, 0, FK_BLOCK);
        return;
    }
    const float scale = peak >= FK_LEAST_PEAK ? peak / 127.0f : 0, inverse = peak >= FK_LEAST_PEAK ? 127.0f / peak : 0;
    for (int half = 0; half < 2; half++) {
        vi sum = {0};
        for (int i = 16 * half; i < 16 * half + 16; i += FK_LANES) {
            vi rounded = round_to_int(load(x + i) * inverse);
            sum += rounded;
            narrow_to_bytes(to->quantized + i, rounded);
        }
        to->code_sums[half] = sum_ints(sum);
    }
    to->scales[0] = scale;
    to->block_sums[0] = scale * (float)(to->code_sums[0] + to->code_sums[1]);
}

/* Blocks that are quantised together. A file whose instruction set gains by it defines FK_OWN_FOUR_BLOCKS and quantize_four, which
 * does as quantize_block does; it returns 0, and has written nothing, if there is an infinity or a NaN. */
#define BLOCKS_TOGETHER 4

INLINE void quantize_blocks(const float *x, int blocks, const fk_plane *to) {
#ifdef FK_OWN_FOUR_BLOCKS
    if (blocks == BLOCKS_TOGETHER && quantize_four(x, to)) return;
#endif
    for (int b = 0; b < blocks; b++) {
        const fk_plane at = {to->quantized + b * FK_BLOCK, to->scales + b, to->block_sums + b, to->code_sums + 2 * b};
        quantize_block(x + b * FK_BLOCK, &at);
    }
}

/* left = x - scale * code */
INLINE void left_of_blocks(const float *x, int blocks, const fk_plane *codes, float *left) {
    for (int i = 0; i < blocks * FK_BLOCK; i += FK_LANES)
        store(left + i, load(x + i) - codes->scales[i / FK_BLOCK] * to_float(widen_signed((const uint8_t *)codes->quantized + i)));
}

static void quantize(const float *x, size_t tokens, size_t n, size_t cols, const fk_plane *to, const fk_plane *rest) {
    for (size_t t = 0; t < tokens; t++)
        for (size_t i = 0; i < n; i += BLOCKS_TOGETHER * FK_BLOCK) {
            const size_t first = t * cols + i, block = first / FK_BLOCK;
            const int blocks = (int)((n - i) / FK_BLOCK < BLOCKS_TOGETHER ? (n - i) / FK_BLOCK : BLOCKS_TOGETHER);
            const fk_plane at = {to->quantized + first, to->scales + block, to->block_sums + block, to->code_sums + 2 * block};
            quantize_blocks(x + t * n + i, blocks, &at);
            if (!rest) continue;
            float left[BLOCKS_TOGETHER * FK_BLOCK];
            left_of_blocks(x + t * n + i, blocks, &at, left);
            const fk_plane behind = {rest->quantized + first, rest->scales + block, rest->block_sums + block,
                                     rest->code_sums + 2 * block};
            quantize_blocks(left, blocks, &behind);
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
