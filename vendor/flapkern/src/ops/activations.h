/* Activations in 8 bits and in bfloat16, for the products that read these forms. Included by table.h. */

/* ---- 8 bits ---- */

/* Blocks whose largest value is below this become 0: the inverse of their scale would overflow. */
#define LEAST_PEAK 1e-36f

static void quantize(const float *x, size_t n, int8_t *q, float *scales, float *block_sums, int32_t *code_sums) {
    for (size_t block = 0; block < n / FK_BLOCK; block++, x += FK_BLOCK, q += FK_BLOCK) {
        /* Absolute values compare as integers like the numbers they stand for, and NaN is the greatest. */
        vi largest = {0};
        for (int i = 0; i < FK_BLOCK; i += FK_LANES) {
            vi bits = (vi)vabs(load(x + i));
            vi greater = bits > largest;
            largest = (greater & bits) | (~greater & largest);
        }
        float peak = max_bits(largest);
        float scale = peak >= LEAST_PEAK ? peak / 127.0f : 0;
        float inverse = peak >= LEAST_PEAK ? 127.0f / peak : 0;
        /* A block with an infinity or a NaN must not pass for a finite one. */
        if (!(peak < INFINITY)) {
            scales[block] = block_sums[block] = NAN;
            code_sums[2 * block] = code_sums[2 * block + 1] = 0;
            memset(q, 0, FK_BLOCK);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            vi sum = {0};
            for (int i = 16 * half; i < 16 * half + 16; i += FK_LANES) {
                vi rounded = round_to_int(load(x + i) * inverse);
                sum += rounded;
                narrow_to_bytes(q + i, rounded);
            }
            code_sums[2 * block + half] = sum_ints(sum);
        }
        scales[block] = scale;
        block_sums[block] = scale * (float)(code_sums[2 * block] + code_sums[2 * block + 1]);
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
