/* The kernels that are the same for every instruction set but for the width of a vector. An instruction set's file
 * defines, in this order:
 *
 *   FK_LANES                           floats per vector; then includes lanes.h
 *   GEMM_TOKENS, GEMM_VECTORS          the GEMM tile: tokens by vectors of weight rows
 *   load_half, store_half              FK_LANES half-precision values from and to memory
 *   dot_q8_0, dot_q4_0, dot_q4_1       one native row times one token's quantised activations
 *   vw                                 a vector of 4 FK_LANES bytes
 *   SIGNED_OFFSET                      128 if dot_signed takes codes + 128 as unsigned bytes, 0 if codes as they are
 *   dot_unsigned, dot_signed           for FK_LANES packed rows: adds 4 or 8 vectors of codes times 16 or 32 activations
 *   look_up                            codes of 4 bits to the entries of a table of 16
 *   PACKED_TOKENS                      tokens of a tile of packed rows
 *   FK_TABLE, FK_NAME                  the table's symbol and name
 *
 * and includes this file. */
#include "flapkern.h"
#include "formats.h"
#include "half.h"

#include "packed.h"

/* ---- rows of plain floats ---- */

INLINE vf load_bfloat(const uint16_t *p) { return (vf)(widen_shorts(p) << 16); }

INLINE float load_scalar(fk_type type, const uint8_t *p) {
    float f;
    switch (type) {
    case FK_TYPE_F16:
        return half_to_float(load_u16(p));
    case FK_TYPE_BF16:
        return bfloat_to_float(load_u16(p));
    default:
        memcpy(&f, p, sizeof f);
        return f;
    }
}

INLINE vf load_lanes(fk_type type, const uint8_t *p) {
    switch (type) {
    case FK_TYPE_F16:
        return load_half((const uint16_t *)p);
    case FK_TYPE_BF16:
        return load_bfloat((const uint16_t *)p);
    default:
        return load((const float *)p);
    }
}

/* `type` is a constant wherever this is inlined. */
INLINE float dot_float(fk_type type, const uint8_t *row, const float *x, size_t n) {
    const size_t width = type == FK_TYPE_F32 ? 4 : 2;
    vf a = {0}, b = {0}, c = {0}, d = {0};
    size_t i = 0;
    for (; i + 4 * FK_LANES <= n; i += 4 * FK_LANES) {
        a += load_lanes(type, row + i * width) * load(x + i);
        b += load_lanes(type, row + (i + FK_LANES) * width) * load(x + i + FK_LANES);
        c += load_lanes(type, row + (i + 2 * FK_LANES) * width) * load(x + i + 2 * FK_LANES);
        d += load_lanes(type, row + (i + 3 * FK_LANES) * width) * load(x + i + 3 * FK_LANES);
    }
    for (; i + FK_LANES <= n; i += FK_LANES) a += load_lanes(type, row + i * width) * load(x + i);
    float sum = sum_lanes((a + b) + (c + d));
    for (; i < n; i++) sum += load_scalar(type, row + i * width) * x[i];
    return sum;
}

/* Rows of a GEMM panel; see below. */
#define GEMM_ROWS (GEMM_VECTORS * FK_LANES)

#include "packed_floats.h"

/* ---- activations to 8 bits ---- */

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

/* ---- activations to bfloat16 ---- */

#ifndef FK_BF16
static void fill_tiles(const float *x, size_t tokens, size_t cols, uint16_t *tiles) {
    for (size_t k = 0; k < cols; k += FK_TILE_COLS, tiles += FK_TILE) {
        size_t count = cols - k < FK_TILE_COLS ? cols - k : FK_TILE_COLS;
        memset(tiles, 0, FK_TILE * sizeof *tiles);
        for (size_t t = 0; t < tokens; t++)
            for (size_t i = 0; i < count; i++) tiles[t * FK_TILE_COLS + i] = float_to_bfloat(x[t * cols + k + i]);
    }
}
#endif

/* ---- decoding ---- */

static void dequantize(fk_type type, const uint8_t *src, size_t n, float *out) {
    const size_t len = block_len(type), bytes = block_bytes(type);
    if (len == 1) {
        size_t i = 0;
        for (; i + FK_LANES <= n; i += FK_LANES) store(out + i, load_lanes(type, src + i * bytes));
        for (; i < n; i++) out[i] = load_scalar(type, src + i * bytes);
        return;
    }
    for (size_t i = 0; i < n; i += len, src += bytes) decode_block(type, src, out + i);
}

/* ---- GEMM ----
 *
 * out [tokens, rows] = X [tokens, cols] W^T. Weights are decoded in panels: GEMM_ROWS rows by up to GEMM_DEPTH columns,
 * column by column, so that one column of a panel is GEMM_VECTORS vectors. A tile of GEMM_TOKENS tokens by one panel is
 * summed in registers. Every element of the output is summed over the columns in the same order whatever tile it falls in. */

#define GEMM_DEPTH 512

/* acc[t][v] += sum over k of x[t * x_stride + k] * panel[k][v]; out is loaded first unless `fresh`. */
INLINE void gemm_tile(int tokens, const float *x, size_t x_stride, const float *panel, size_t depth, int fresh,
                      float *out, size_t out_stride) {
    vf acc[GEMM_TOKENS][GEMM_VECTORS];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < GEMM_VECTORS; v++)
            acc[t][v] = fresh ? (vf){0} : load(out + t * out_stride + v * FK_LANES);
    for (size_t k = 0; k < depth; k++, panel += GEMM_ROWS) {
        vf column[GEMM_VECTORS];
        UNROLL for (int v = 0; v < GEMM_VECTORS; v++) column[v] = load(panel + v * FK_LANES);
        UNROLL for (int t = 0; t < tokens; t++) {
            vf value = splat(x[t * x_stride + k]);
            UNROLL for (int v = 0; v < GEMM_VECTORS; v++) acc[t][v] += value * column[v];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < GEMM_VECTORS; v++) store(out + t * out_stride + v * FK_LANES, acc[t][v]);
}

static void gemm_tile_any(size_t tokens, const float *x, size_t x_stride, const float *panel, size_t depth, int fresh,
                          float *out, size_t out_stride) {
    switch (tokens) {
#define CASE(N)                                                                        \
    case N:                                                                            \
        gemm_tile(N, x, x_stride, panel, depth, fresh, out, out_stride);               \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4)
#if GEMM_TOKENS > 4
        CASE(5) CASE(6)
#endif
#if GEMM_TOKENS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

/* All tokens by one panel; `rows` of its rows are real. Where the panel is wider than the output a block of scratch
 * [GEMM_TOKENS, GEMM_ROWS] stands in for it. */
static void gemm_panel(size_t tokens, const float *x, size_t x_stride, const float *panel, size_t depth, int fresh,
                       size_t rows, float *out, size_t out_stride, float *block) {
    for (size_t t = 0; t < tokens; t += GEMM_TOKENS) {
        size_t count = tokens - t < GEMM_TOKENS ? tokens - t : GEMM_TOKENS;
        const float *from = x + t * x_stride;
        float *to = out + t * out_stride;
        if (rows == GEMM_ROWS) {
            gemm_tile_any(count, from, x_stride, panel, depth, fresh, to, out_stride);
            continue;
        }
        if (!fresh)
            for (size_t i = 0; i < count; i++)
                memcpy(block + i * GEMM_ROWS, to + i * out_stride, rows * sizeof *out);
        gemm_tile_any(count, from, x_stride, panel, depth, fresh, block, GEMM_ROWS);
        for (size_t i = 0; i < count; i++) memcpy(to + i * out_stride, block + i * GEMM_ROWS, rows * sizeof *out);
    }
}

/* Writes rows [row, row + count) of columns [k, k + depth), decoded, into panel [depth, GEMM_ROWS]; missing rows are 0.
 * Packed rows are plain floats, and fill groups. */
static void decode_panel(const fk_weights *w, size_t row, size_t count, size_t k, size_t depth, float *panel,
                         float *line) {
    if (w->layout == FK_LAYOUT_PACKED && count == GEMM_ROWS) {
        switch (w->type) {
        case FK_TYPE_F16: panel_of_floats(FK_TYPE_F16, w, row, k, depth, panel); break;
        case FK_TYPE_BF16: panel_of_floats(FK_TYPE_BF16, w, row, k, depth, panel); break;
        default: panel_of_floats(FK_TYPE_F32, w, row, k, depth, panel);
        }
        return;
    }
    const size_t skip = k / block_len(w->type) * block_bytes(w->type);
    for (size_t r = 0; r < count; r++) {
        if (w->layout == FK_LAYOUT_PACKED) {
            const uint8_t *group = w->data + (row + r) / FK_GROUP * FK_GROUP * w->row_bytes;
            for (size_t i = 0; i < depth; i++)
                line[i] = load_scalar(w->type, group + ((k + i) * FK_GROUP + (row + r) % FK_GROUP) * block_bytes(w->type));
        } else {
            dequantize(w->type, w->data + (row + r) * w->row_bytes + skip, depth, line);
        }
        for (size_t i = 0; i < depth; i++) panel[i * GEMM_ROWS + r] = line[i];
    }
    for (size_t r = count; r < GEMM_ROWS; r++)
        for (size_t i = 0; i < depth; i++) panel[i * GEMM_ROWS + r] = 0;
}

#define GEMM_SCRATCH (GEMM_DEPTH * GEMM_ROWS + GEMM_DEPTH + GEMM_TOKENS * GEMM_ROWS)

static void gemm(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                 size_t out_stride, float *scratch) {
    float *panel = scratch, *line = panel + GEMM_DEPTH * GEMM_ROWS, *block = line + GEMM_DEPTH;
    for (size_t row = row_begin; row < row_end; row += GEMM_ROWS) {
        size_t count = row_end - row < GEMM_ROWS ? row_end - row : GEMM_ROWS;
        for (size_t k = 0; k < w->cols; k += GEMM_DEPTH) {
            size_t depth = w->cols - k < GEMM_DEPTH ? w->cols - k : GEMM_DEPTH;
            decode_panel(w, row, count, k, depth, panel, line);
            gemm_panel(x->tokens, x->values + k, x->cols, panel, depth, k == 0, count, out + row, out_stride, block);
        }
    }
}

#ifdef FK_BF16
#include "tiled.h"
#endif

/* ---- matrix times activations ---- */

/* From here on decoding a panel costs less than decoding every row for every token. */
#define GEMM_MIN_TOKENS 8

/* Native rows of these types are multiplied in their 8-bit form; of the others they are decoded first. */
static int has_native_dot(fk_type type) { return type == FK_TYPE_Q8_0 || type == FK_TYPE_Q4_0 || type == FK_TYPE_Q4_1; }

static int is_float(fk_type type) { return block_len(type) == 1; }

/* In other forms than bfloat16 packed codes are used as they are for any number of tokens; packed floats and native rows
 * are decoded for many. */
static fk_form activation_form(const fk_weights *w, size_t tokens) {
#ifdef FK_BF16
    if (wants_tiles(w, tokens)) return FK_FORM_BF16;
#endif
    if (is_float(w->type)) return FK_FORM_FLOAT;
    return w->layout == FK_LAYOUT_PACKED || (has_native_dot(w->type) && tokens < GEMM_MIN_TOKENS) ? FK_FORM_INT8
                                                                                                   : FK_FORM_FLOAT;
}

static int wants_panels(const fk_weights *w, size_t tokens) {
    return tokens >= GEMM_MIN_TOKENS && (w->layout == FK_LAYOUT_NATIVE || is_float(w->type));
}

static size_t matmul_scratch(const fk_weights *w, size_t tokens) {
#ifdef FK_BF16
    if (wants_tiles(w, tokens)) return TILED_SCRATCH;
#endif
    if (wants_panels(w, tokens)) return GEMM_SCRATCH;
    return w->layout == FK_LAYOUT_PACKED && !is_float(w->type) && tokens > PACKED_TOKENS ? DECODED_SCRATCH : 0;
}

/* One native row times all tokens, decoded piece by piece. */
static void decoded_row(const fk_weights *w, size_t r, const fk_activations *x, float *out, size_t out_stride) {
    float piece[FK_SUPER];
    for (size_t t = 0; t < x->tokens; t++) out[t * out_stride] = 0;
    for (size_t k = 0; k < w->cols; k += FK_SUPER) {
        size_t n = w->cols - k < FK_SUPER ? w->cols - k : FK_SUPER;
        dequantize(w->type, w->data + r * w->row_bytes + k / block_len(w->type) * block_bytes(w->type), n, piece);
        for (size_t t = 0; t < x->tokens; t++)
            out[t * out_stride] += dot_float(FK_TYPE_F32, (const uint8_t *)piece, x->values + t * x->cols + k, n);
    }
}

/* Rows that lie one behind the other, each by itself. */
static void native_rows(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                        size_t out_stride) {
    const size_t blocks = w->cols / FK_BLOCK;
#define ROWS(DOT)                                                                      \
    for (size_t r = row_begin; r < row_end; r++) {                                     \
        const uint8_t *row = w->data + r * w->row_bytes;                               \
        for (size_t t = 0; t < x->tokens; t++) out[t * out_stride + r] = DOT;          \
    }
#define QUANTIZED x->quantized + t * x->cols, x->scales + t * blocks, x->block_sums + t * blocks, blocks
    switch (w->type) {
    case FK_TYPE_Q8_0: ROWS(dot_q8_0(row, QUANTIZED)) break;
    case FK_TYPE_Q4_0: ROWS(dot_q4_0(row, QUANTIZED)) break;
    case FK_TYPE_Q4_1: ROWS(dot_q4_1(row, QUANTIZED)) break;
    case FK_TYPE_F32: ROWS(dot_float(FK_TYPE_F32, row, x->values + t * x->cols, w->cols)) break;
    case FK_TYPE_F16: ROWS(dot_float(FK_TYPE_F16, row, x->values + t * x->cols, w->cols)) break;
    case FK_TYPE_BF16: ROWS(dot_float(FK_TYPE_BF16, row, x->values + t * x->cols, w->cols)) break;
    default:
        for (size_t r = row_begin; r < row_end; r++) decoded_row(w, r, x, out + r, out_stride);
    }
#undef QUANTIZED
#undef ROWS
}

static void matvec(const fk_rows *parts, size_t count, const fk_activations *x) {
    const fk_rows *all = parts + count;
    while (parts < all) {
        const fk_type type = parts->weights.type;
        const fk_rows *end = parts;
        while (end < all && end->weights.layout == FK_LAYOUT_PACKED && end->weights.type == type) end++;
        if (end > parts) in_streams(streams_for(type), streams_of(type), parts, end, x);
        /* What fills no group, or else one matrix of native rows. */
        end += end == parts;
        for (; parts < end; parts++) {
            const int packed = parts->weights.layout == FK_LAYOUT_PACKED;
            const size_t begin = parts->begin + (packed ? whole_groups(parts) * FK_GROUP : 0);
            if (begin < parts->end) native_rows(&parts->weights, begin, parts->end, x, parts->out, 0);
        }
    }
}

static void matmul(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, float *out,
                   size_t out_stride, float *scratch) {
    if (x->tokens == 1) {
        const fk_rows rows = {*w, row_begin, row_end, out};
        matvec(&rows, 1, x);
        return;
    }
#ifdef FK_BF16
    if (wants_tiles(w, x->tokens)) {
        tiled_matmul(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
#endif
    const int panels = wants_panels(w, x->tokens);
    if (w->layout == FK_LAYOUT_PACKED) {
        size_t packed_end = w->rows / FK_GROUP * FK_GROUP;
        size_t end = row_end < packed_end ? row_end : packed_end;
        if (row_begin < end) {
            if (panels)
                gemm(w, row_begin, end, x, out, out_stride, scratch);
            else if (is_float(w->type))
                packed_floats(w, row_begin, end, x, out, out_stride);
            else
                packed_rows(w, row_begin, end, x, out, out_stride, scratch);
        }
        /* The rows that fill no group are native. */
        row_begin = row_begin > packed_end ? row_begin : packed_end;
    } else if (panels) {
        gemm(w, row_begin, row_end, x, out, out_stride, scratch);
        return;
    }
    native_rows(w, row_begin, row_end, x, out, out_stride);
}

/* ---- element by element ---- */

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

/* Fewer than FK_LANES values as a vector, the rest 0. */
INLINE vf load_some(const float *p, size_t n) {
    float lane[FK_LANES] = {0};
    memcpy(lane, p, n * sizeof *p);
    return load(lane);
}

INLINE void store_some(float *p, vf v, size_t n) {
    float lane[FK_LANES];
    store(lane, v);
    memcpy(p, lane, n * sizeof *p);
}

INLINE vf silu(vf x) { return x / (1.0f + vexp(-x)); }

static void silu_mul(const float *gate, const float *up, size_t n, float *out) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store(out + i, silu(load(gate + i)) * load(up + i));
    if (i < n) store_some(out + i, silu(load_some(gate + i, n - i)) * load_some(up + i, n - i), n - i);
}

static void add(float *x, const float *y, size_t n) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store(x + i, load(x + i) + load(y + i));
    for (; i < n; i++) x[i] += y[i];
}

/* The sums over all tokens of some vectors of columns, which stay in registers. */
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
    /* From the middle, since the first token of a text often lies far off. */
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

static void to_half(const float *x, size_t n, uint16_t *out) {
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) store_half(out + i, load(x + i));
    for (; i < n; i++) out[i] = float_to_half(x[i]);
}

#include "attention.h"

const fk_kernels FK_TABLE = {
    .name = FK_NAME,
    .row_granule = GEMM_ROWS < FK_GROUP ? FK_GROUP : GEMM_ROWS,
    .activation_form = activation_form,
    .quantize = quantize,
    .fill_tiles = fill_tiles,
    .moments = moments,
    .matmul_scratch = matmul_scratch,
    .matmul = matmul,
    .matvec = matvec,
    .dequantize = dequantize,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .add = add,
    .to_half = to_half,
    .attend_tokens = ATTEND_TOKENS,
    .attend_scratch = attend_scratch,
    .attend = attend,
};
