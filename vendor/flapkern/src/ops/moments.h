/* Sums over tokens from which the mean and the variance of each column follow. Included by table.h. */

/* The sums of up to four vectors of columns over all tokens, which stay in registers. */
INLINE void moments_of(const float *x, size_t tokens, size_t cols, int vectors, const float *near, float *sums,
                       float *squares) {
    vf sum[4] = {{0}}, square[4] = {{0}};
    for (size_t t = 0; t < tokens; t++)
        UNROLL for (int i = 0; i < vectors; i++) {
            vf difference = load(x + t * cols + i * FK_LANES) - load(near + i * FK_LANES);
            sum[i] += difference;
            square[i] += difference * difference;
        }
    UNROLL for (int i = 0; i < vectors; i++) {
        store(sums + i * FK_LANES, sum[i]);
        store(squares + i * FK_LANES, square[i]);
    }
}

static void moments(const float *x, size_t tokens, size_t cols, float *near, float *sums, float *squares) {
    /* The token in the middle, since the first token of a text often lies far from the others. */
    memcpy(near, x + tokens / 2 * cols, cols * sizeof *near);
    size_t c = 0;
    for (; c + 4 * FK_LANES <= cols; c += 4 * FK_LANES)
        moments_of(x + c, tokens, cols, 4, near + c, sums + c, squares + c);
    for (; c + FK_LANES <= cols; c += FK_LANES) moments_of(x + c, tokens, cols, 1, near + c, sums + c, squares + c);
    for (; c < cols; c++) {
        float sum = 0, square = 0;
        for (size_t t = 0; t < tokens; t++) {
            float difference = x[t * cols + c] - near[c];
            sum += difference;
            square += difference * difference;
        }
        sums[c] = sum;
        squares[c] = square;
    }
}
