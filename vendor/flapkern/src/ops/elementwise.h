/* Normalisation, rotation, activation, addition and rounding of vectors of a forward pass. Included by table.h. */

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out) {
    vf squares = {0};
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) squares += load(x + i) * load(x + i);
    float sum = sum_lanes(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (i = 0; i + FK_LANES <= n; i += FK_LANES) store(out + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void rope(float *x, const float *cosines, const float *sines, size_t pairs) {
    for (size_t i = 0; i < pairs; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cosines[i] - b * sines[i];
        x[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
}

static void rope_halves(float *x, const float *cosines, const float *sines, size_t pairs) {
    float *y = x + pairs;
    size_t i = 0;
    for (; i + FK_LANES <= pairs; i += FK_LANES) {
        const vf a = load(x + i), b = load(y + i), c = load(cosines + i), s = load(sines + i);
        store(x + i, a * c - b * s);
        store(y + i, a * s + b * c);
    }
    for (; i < pairs; i++) {
        const float a = x[i], b = y[i];
        x[i] = a * cosines[i] - b * sines[i];
        y[i] = a * sines[i] + b * cosines[i];
    }
}

/* x / (1 + e^-x) */
INLINE vf silu(vf x) { return x / (1.0f + vexp(-x)); }

static void silu_mul(const float *gate, const float *up, size_t n, float *out) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store(out + i, silu(load(gate + i)) * load(up + i));
    if (i < n) store_some(out + i, silu(load_some(gate + i, n - i)) * load_some(up + i, n - i), n - i);
}

/* x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vf gelu(vf x) { return x / (1.0f + vexp(-1.59576912f * (x + 0.044715f * x * x * x))); }

static void gelu_mul(const float *gate, const float *up, size_t n, float *out) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store(out + i, gelu(load(gate + i)) * load(up + i));
    if (i < n) store_some(out + i, gelu(load_some(gate + i, n - i)) * load_some(up + i, n - i), n - i);
}

static void add(float *x, const float *y, size_t n) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store(x + i, load(x + i) + load(y + i));
    for (; i < n; i++) x[i] += y[i];
}

static void to_half(const float *x, size_t n, uint16_t *out) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store_half(out + i, load(x + i));
    for (; i < n; i++) out[i] = float_to_half(x[i]);
}
