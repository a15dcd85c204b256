/* Attention: a few queries at once for generation, blocks of them for prompts. Included by table.h. */

/* Positions per tile, two GEMM panels or more: a tile is a block of the cache. */
#define ATTEND_TILE FK_KV_BLOCK

/* The keys and the values of the positions of a block. */
INLINE const uint8_t *block_keys(const fk_kv_head *kv, size_t block) { return kv->blocks[block] + kv->keys; }
INLINE const uint8_t *block_values(const fk_kv_head *kv, size_t block) { return kv->blocks[block] + kv->values; }

/* The key and the value of a position. */
INLINE const uint8_t *key_at(const fk_kv_head *kv, size_t position) {
    return block_keys(kv, position / FK_KV_BLOCK) + position % FK_KV_BLOCK * kv->row_bytes;
}

INLINE const uint8_t *value_at(const fk_kv_head *kv, size_t position) {
    return block_values(kv, position / FK_KV_BLOCK) + position % FK_KV_BLOCK * kv->row_bytes;
}

/* FK_LANES values of a row of the cache from `d` on. Rows of Q8_0 are whole blocks. */
INLINE vf load_kv(fk_type type, const uint8_t *row, size_t d) {
    if (type == FK_TYPE_F16) return load_half((const uint16_t *)row + d);
    const uint8_t *block = row + d / FK_BLOCK * 34;
    return to_float(widen_signed(block + 2 + d % FK_BLOCK)) * half_at(block);
}

/* In place, of plain products: those whose scores are cap * tanh(score / cap). Products that are 0 stay so. */
static void cap_scores(float *x, size_t n, float scale, float cap) {
    const float in = 2 * scale / cap, out = cap / scale;
    size_t i = 0;
    /* tanh y = 1 - 2 / (1 + e^2y) */
    for (; i + FK_LANES <= n; i += FK_LANES) store(x + i, out - 2 * out / (1.0f + vexp(load(x + i) * in)));
    if (i < n) store_some(x + i, out - 2 * out / (1.0f + vexp(load_some(x + i, n - i) * in)), n - i);
}

#if FK_BF16
#include "tiled_attention.h"

/* Keys and values are brought into tiles for all of a block's queries. */
#define ATTEND_TOKENS 64
#else
#define ATTEND_TOKENS 16
#endif

/* From so many queries of one generated token on, tiles of keys and values are decoded once for all of them. */
#define ATTEND_MIN_TILED 8

/* Queries of generation that share a pass over keys and values, and vectors of values in a pass. */
#define FEW_QUERIES 4
#define FEW_VECTORS (FK_LANES == 8 ? 2 : 4)

/* Floats of a query's scores: whole vectors. */
static size_t few_pitch(size_t positions) { return (positions + FK_LANES - 1) / FK_LANES * FK_LANES; }

/* How queries are attended to: a few at a time, or in blocks, with AMX's tiles or without. In the decode phase this follows
 * from how many query heads read a KV head, which is the same for every token. */
static int wants_few(fk_phase phase, size_t queries) {
    return phase == FK_PHASE_DECODE && queries < ATTEND_MIN_TILED;
}

#if FK_BF16
static int wants_query_tiles(fk_phase phase, size_t queries) {
    return phase == FK_PHASE_PREFILL || queries >= QUERY_TILE;
}
#endif

static size_t attend_scratch(fk_phase phase, size_t queries, size_t head_dim, size_t positions) {
#if FK_BF16
    if (wants_query_tiles(phase, queries)) return tiled_attend_scratch(queries, head_dim);
#endif
    if (wants_few(phase, queries)) return FEW_QUERIES * few_pitch(positions);
    size_t padded = (head_dim + GEMM_ROWS - 1) / GEMM_ROWS * GEMM_ROWS;
    return queries * ATTEND_TILE          /* scores */
           + 2 * queries                  /* running maxima and sums */
           + GEMM_ROWS * head_dim         /* a panel of keys */
           + ATTEND_TILE * GEMM_ROWS      /* a panel of values */
           + queries * padded             /* the output so far */
           + GEMM_DEPTH + GEMM_TOKENS * GEMM_ROWS;
}

/* In place: e^(scale x - peak); returns the sum. */
INLINE float exponentials(float *x, size_t n, float scale, float peak) {
    vf total = {0};
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) {
        vf e = vexp(load(x + i) * scale - peak);
        store(x + i, e);
        total += e;
    }
    float sum = sum_lanes(total);
    if (i < n) {
        vf e = vexp(load_some(x + i, n - i) * scale - peak);
        store_some(x + i, e, n - i);
        for (; i < n; i++) sum += x[i];
    }
    return sum;
}

INLINE float peak_of(const float *x, size_t n, float start) {
    vf peak = splat(start);
    size_t i = 0;
    for (; i + FK_LANES <= n; i += FK_LANES) peak = vmax(load(x + i), peak);
    float largest = max_lane(peak);
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* ---- a few queries ----
 *
 * Generation streams keys and values from memory: every one is loaded and widened once for up to FEW_QUERIES queries. */

/* The positions of a vector of scores are RUNS runs of neighbours, the first of which are `apart`, since memory gives several
 * sequential streams more than one. A run lies in one block, since it begins at a multiple of its length. */
#define RUNS 4
#define RUN (FK_LANES / RUNS)

INLINE size_t position_of(size_t first, size_t apart, size_t lane) { return first + lane / RUN * apart + lane % RUN; }

/* The keys of the positions of a vector of scores: where each run begins, and how many lanes have a position of their own; the
 * last of these stands in for the others. */
typedef struct key_runs {
    const uint8_t *run[RUNS];
    size_t lanes;
} key_runs;

/* The key of a lane's position. */
INLINE const uint8_t *key_of(const key_runs *keys, size_t lane, size_t row_bytes) {
    const size_t own = lane < keys->lanes ? lane : keys->lanes - 1;
    return keys->run[own / RUN] + own % RUN * row_bytes;
}

/* part[i][lane] = or, if `more`, += q[i] . key of a lane's position, for some vectors of their values from d on. `whole` says that
 * every lane has a position of its own. */
INLINE void few_products(fk_type type, int queries, int vectors, const float *q, const fk_kv_head *kv,
                         const key_runs *keys, int whole, size_t d, int more, vf part[FEW_QUERIES][FK_LANES]) {
    vf query[FEW_QUERIES][FEW_VECTORS];
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int v = 0; v < vectors; v++) query[i][v] = load(q + i * kv->head_dim + d + v * FK_LANES);
    for (size_t lane = 0; lane < FK_LANES; lane++) {
        const uint8_t *row =
            whole ? keys->run[lane / RUN] + lane % RUN * kv->row_bytes : key_of(keys, lane, kv->row_bytes);
        vf key[FEW_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) key[v] = load_kv(type, row, d + v * FK_LANES);
        UNROLL for (int i = 0; i < queries; i++) {
            vf sum = more ? part[i][lane] : (vf){0};
            UNROLL for (int v = 0; v < vectors; v++) sum += key[v] * query[i][v];
            part[i][lane] = sum;
        }
    }
}

/* scores[i][p] = q[i] . key[p] for the positions p of a vector */
INLINE void few_scores_of(fk_type type, int queries, const float *q, const fk_kv_head *kv, const key_runs *keys, int whole,
                          size_t first, size_t apart, float *scores, size_t pitch) {
    const size_t dim = kv->head_dim;
    vf part[FEW_QUERIES][FK_LANES];
    /* `more` is a constant in every call: compilers fuse a product with the sum that it is added to only if there is one. */
    size_t d = 0;
    if (FEW_VECTORS * FK_LANES <= dim) {
        few_products(type, queries, FEW_VECTORS, q, kv, keys, whole, 0, 0, part);
        d = FEW_VECTORS * FK_LANES;
    } else if (FK_LANES <= dim) {
        few_products(type, queries, 1, q, kv, keys, whole, 0, 0, part);
        d = FK_LANES;
    }
    for (; d + FEW_VECTORS * FK_LANES <= dim; d += FEW_VECTORS * FK_LANES)
        few_products(type, queries, FEW_VECTORS, q, kv, keys, whole, d, 1, part);
    for (; d + FK_LANES <= dim; d += FK_LANES) few_products(type, queries, 1, q, kv, keys, whole, d, 1, part);
    if (d < dim)
        for (size_t lane = 0; lane < FK_LANES; lane++)
            for (int i = 0; i < queries; i++) {
                vf sum = d > 0 ? part[i][lane] : (vf){0};
                for (size_t k = d; k < dim; k++)
                    sum[0] += q[i * dim + k] * half_to_float(load_u16(key_of(keys, lane, kv->row_bytes) + 2 * k));
                part[i][lane] = sum;
            }
    UNROLL for (int i = 0; i < queries; i++) {
        float sums[FK_LANES];
        store(sums, sum_each(part[i]));
        for (size_t lane = 0; lane < FK_LANES; lane += RUN)
            memcpy(scores + i * pitch + position_of(first, apart, lane), sums + lane, RUN * sizeof *sums);
    }
}

/* scores[i][p] = q[i] . key[p] for positions below `last`; a lane is a position. */
INLINE void few_scores(fk_type type, int queries, const float *q, const fk_kv_head *kv, size_t last, float *scores,
                       size_t pitch) {
    const size_t whole = last / FK_LANES * FK_LANES, apart = whole / RUNS, bytes = RUN * kv->row_bytes;
    key_runs keys = {.lanes = FK_LANES}, next = keys;
    for (size_t run = 0; run < RUNS && whole > 0; run++) next.run[run] = key_at(kv, run * apart);
    for (size_t first = 0; first < apart; first += RUN) {
        keys = next;
        /* The keys that follow, and the values of these, which are read next, as far as the second cache. */
        for (size_t run = 0; run < RUNS; run++) {
            const size_t position = run * apart + first, following = position + RUN;
            const uint8_t *values = keys.run[run] + (ptrdiff_t)(kv->values - kv->keys);
            next.run[run] += bytes;
            if (following % FK_KV_BLOCK == 0 && following < last) next.run[run] = key_at(kv, following);
            for (size_t at = 0; at < bytes; at += 64) {
                __builtin_prefetch(next.run[run] + at);
                __builtin_prefetch(values + at, 0, 2);
            }
        }
        few_scores_of(type, queries, q, kv, &keys, 1, first, apart, scores, pitch);
    }
    if (whole < last) {
        keys.lanes = last - whole;
        for (size_t run = 0; run * RUN < keys.lanes; run++) keys.run[run] = key_at(kv, whole + run * RUN);
        few_scores_of(type, queries, q, kv, &keys, 0, whole, RUN, scores, pitch);
    }
}

/* out[i] = norm[i] * sum over p of weights[i][p] * value[p], for FEW_VECTORS vectors of values at a time. */
INLINE void few_outputs(fk_type type, int queries, int vectors, const float *weights, size_t pitch, const fk_kv_head *kv,
                        size_t last, size_t d, const float *norms, float *out) {
    vf sum[FEW_QUERIES][FEW_VECTORS];
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = (vf){0};
    for (size_t begin = 0; begin < last; begin += FK_KV_BLOCK) {
        const size_t end = last - begin < FK_KV_BLOCK ? last : begin + FK_KV_BLOCK;
        const uint8_t *row = block_values(kv, begin / FK_KV_BLOCK);
        for (size_t p = begin; p < end; p++, row += kv->row_bytes) {
            vf value[FEW_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++) value[v] = load_kv(type, row, d + v * FK_LANES);
            UNROLL for (int i = 0; i < queries; i++)
                UNROLL for (int v = 0; v < vectors; v++) sum[i][v] += weights[i * pitch + p] * value[v];
        }
    }
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + i * kv->head_dim + d + v * FK_LANES, sum[i][v] * norms[i]);
}

INLINE void attend_together(fk_type type, int queries, const float *q, const fk_sight *sights, const fk_kv_head *kv,
                            float scale, float cap, float *out, float *log_sums, float *scores, size_t pitch) {
    const size_t dim = kv->head_dim;
    float norms[FEW_QUERIES];
    size_t last = 0;
    for (int i = 0; i < queries; i++) last = sights[i].end > last ? sights[i].end : last;
    few_scores(type, queries, q, kv, last, scores, pitch);
    for (int i = 0; i < queries; i++) {
        const size_t begin = sights[i].begin, end = sights[i].end;
        float *row = scores + i * pitch;
        if (cap != 0) cap_scores(row + begin, end - begin, scale, cap);
        const float peak = scale * peak_of(row + begin, end - begin, -INFINITY);
        const float sum = exponentials(row + begin, end - begin, scale, peak);
        for (size_t p = 0; p < begin; p++) row[p] = 0;
        for (size_t p = end; p < last; p++) row[p] = 0;
        norms[i] = 1.0f / sum;
        if (log_sums) log_sums[i] = peak + logf(sum);
    }
    size_t d = 0;
    for (; d + FEW_VECTORS * FK_LANES <= dim; d += FEW_VECTORS * FK_LANES)
        few_outputs(type, queries, FEW_VECTORS, scores, pitch, kv, last, d, norms, out);
    for (; d + FK_LANES <= dim; d += FK_LANES) few_outputs(type, queries, 1, scores, pitch, kv, last, d, norms, out);
    for (; d < dim; d++)
        for (int i = 0; i < queries; i++) {
            float sum = 0;
            for (size_t p = 0; p < last; p++)
                sum += scores[i * pitch + p] * half_to_float(load_u16(value_at(kv, p) + 2 * d));
            out[i * dim + d] = sum * norms[i];
        }
}

INLINE void attend_few_of(fk_type type, const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv,
                          float scale, float cap, float *out, float *log_sums, float *scores) {
    size_t last = 0;
    for (size_t i = 0; i < queries; i++) last = sights[i].end > last ? sights[i].end : last;
    const size_t pitch = few_pitch(last);
    for (size_t i = 0; i < queries; i += FEW_QUERIES) {
        const size_t at = i * kv->head_dim;
        float *logs = log_sums ? log_sums + i : 0;
#define TOGETHER(N) attend_together(type, N, q + at, sights + i, kv, scale, cap, out + at, logs, scores, pitch)
        switch (queries - i) {
        case 1: TOGETHER(1); break;
        case 2: TOGETHER(2); break;
        case 3: TOGETHER(3); break;
        default: TOGETHER(FEW_QUERIES);
        }
#undef TOGETHER
    }
}

static void attend_few(const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv, float scale,
                       float cap, float *out, float *log_sums, float *scores) {
    if (kv->type == FK_TYPE_Q8_0)
        attend_few_of(FK_TYPE_Q8_0, q, queries, sights, kv, scale, cap, out, log_sums, scores);
    else
        attend_few_of(FK_TYPE_F16, q, queries, sights, kv, scale, cap, out, log_sums, scores);
}

/* ---- blocks of queries ---- */

/* A position, counted from the first of a tile of so many; those before and behind it are its ends. */
INLINE size_t in_tile(size_t position, size_t from, size_t positions) {
    return position <= from ? 0 : position - from < positions ? position - from : positions;
}

/* The panel [dim, GEMM_ROWS] of the keys of `count` <= GEMM_ROWS positions, rows of the cache that begin at `row`; missing ones are 0.
 * dim is a multiple of FK_LANES. Rows at `soon`, which are read next and lie as these do, are fetched meanwhile: with few queries the
 * processor does not see in time by itself what comes next. */
INLINE void panel_of_keys(fk_type type, const uint8_t *row, size_t row_bytes, size_t count, size_t dim, const uint8_t *soon,
                          float *panel) {
    UNROLL for (int v = 0; v < GEMM_VECTORS; v++)
        for (size_t d = 0; d < dim; d += FK_LANES) {
            vf keys[FK_LANES];
            UNROLL for (size_t i = 0; i < FK_LANES; i++) {
                const size_t p = v * FK_LANES + i;
                keys[i] = p < count ? load_kv(type, row + p * row_bytes, d) : (vf){0};
                if (p < count) __builtin_prefetch(soon + p * row_bytes + d * block_bytes(type) / block_len(type));
            }
            transpose(keys);
            UNROLL for (size_t i = 0; i < FK_LANES; i++) store(panel + (d + i) * GEMM_ROWS + v * FK_LANES, keys[i]);
        }
}

/* The panel [count, GEMM_ROWS] of values d to d + GEMM_ROWS - 1 of `count` positions; those from `dim` on, which is a multiple of
 * FK_LANES, are 0. `soon` as in panel_of_keys. */
INLINE void panel_of_values(fk_type type, const uint8_t *row, size_t row_bytes, size_t count, size_t d, size_t dim,
                            const uint8_t *soon, float *panel) {
    for (size_t p = 0; p < count; p++, row += row_bytes, soon += row_bytes, panel += GEMM_ROWS) {
        __builtin_prefetch(soon + d * block_bytes(type) / block_len(type));
        UNROLL for (size_t v = 0; v < GEMM_ROWS; v += FK_LANES)
            store(panel + v, d + v < dim ? load_kv(type, row, d + v) : (vf){0});
    }
}

/* Blocks of queries against tiles of positions with an online softmax (Milakov and Gimelshein, arXiv 1805.02867): when a
 * tile raises a query's maximum, what it has summed so far is scaled down. */
static void attend_tiled(const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv, float scale,
                         float cap, float *out, float *log_sums, float *scratch) {
    const size_t dim = kv->head_dim;
    const size_t padded = (dim + GEMM_ROWS - 1) / GEMM_ROWS * GEMM_ROWS;
    float *scores = scratch;
    float *peaks = scores + queries * ATTEND_TILE;
    float *sums = peaks + queries;
    float *key_panel = sums + queries;
    float *value_panel = key_panel + GEMM_ROWS * dim;
    float *total = value_panel + ATTEND_TILE * GEMM_ROWS;
    float *line = total + queries * padded;
    float *block = line + GEMM_DEPTH;
    const int whole_vectors = dim % FK_LANES == 0;

    size_t last = 0;
    for (size_t i = 0; i < queries; i++) {
        peaks[i] = -INFINITY;
        sums[i] = 0;
        last = sights[i].end > last ? sights[i].end : last;
    }
    memset(total, 0, queries * padded * sizeof *total);

    for (size_t from = 0; from < last; from += ATTEND_TILE) {
        const size_t positions = last - from < ATTEND_TILE ? last - from : ATTEND_TILE;
        const uint8_t *values = block_values(kv, from / ATTEND_TILE);
        const fk_weights keys = {.type = kv->type,
                                 .layout = FK_LAYOUT_NATIVE,
                                 .data = block_keys(kv, from / ATTEND_TILE),
                                 .row_bytes = kv->row_bytes,
                                 .rows = positions,
                                 .cols = dim};
        for (size_t p = 0; p < positions; p += GEMM_ROWS) {
            size_t count = positions - p < GEMM_ROWS ? positions - p : GEMM_ROWS;
            if (whole_vectors) {
                const uint8_t *row = keys.data + p * kv->row_bytes, *soon = values + p * kv->row_bytes;
                if (kv->type == FK_TYPE_F16)
                    panel_of_keys(FK_TYPE_F16, row, kv->row_bytes, count, dim, soon, key_panel);
                else
                    panel_of_keys(FK_TYPE_Q8_0, row, kv->row_bytes, count, dim, soon, key_panel);
                gemm_panel(queries, q, dim, key_panel, dim, 1, count, scores + p, ATTEND_TILE, block);
                continue;
            }
            for (size_t k = 0; k < dim; k += GEMM_DEPTH) {
                size_t depth = dim - k < GEMM_DEPTH ? dim - k : GEMM_DEPTH;
                decode_panel(&keys, p, count, k, depth, key_panel, line);
                gemm_panel(queries, q + k, dim, key_panel, depth, k == 0, count, scores + p, ATTEND_TILE, block);
            }
        }
        for (size_t i = 0; i < queries; i++) {
            float *row = scores + i * ATTEND_TILE;
            const size_t begin = in_tile(sights[i].begin, from, positions), end = in_tile(sights[i].end, from, positions);
            if (begin < end) {
                if (cap != 0) cap_scores(row + begin, end - begin, scale, cap);
                float peak = peak_of(row + begin, end - begin, peaks[i]);
                float shrink = peaks[i] == peak ? 1 : peaks[i] == -INFINITY ? 0 : expf(scale * (peaks[i] - peak));
                sums[i] = sums[i] * shrink + exponentials(row + begin, end - begin, scale, scale * peak);
                peaks[i] = peak;
                float *so_far = total + i * padded;
                if (shrink != 1)
                    for (size_t d = 0; d < padded; d++) so_far[d] *= shrink;
            }
            memset(row, 0, begin * sizeof *row);
            memset(row + end, 0, (ATTEND_TILE - end) * sizeof *row);
        }
        /* Values lie position by position already, as a panel wants them. The next keys follow. */
        const uint8_t *soon = last - from > ATTEND_TILE ? block_keys(kv, from / ATTEND_TILE + 1) : values;
        for (size_t d = 0; d < dim; d += GEMM_ROWS) {
            size_t count = dim - d < GEMM_ROWS ? dim - d : GEMM_ROWS;
            if (whole_vectors && kv->type == FK_TYPE_F16)
                panel_of_values(FK_TYPE_F16, values, kv->row_bytes, positions, d, dim, soon, value_panel);
            else if (whole_vectors)
                panel_of_values(FK_TYPE_Q8_0, values, kv->row_bytes, positions, d, dim, soon, value_panel);
            else
                for (size_t p = 0; p < positions; p++) {
                    /* These are F16: heads in Q8_0 are whole blocks, and so whole vectors. */
                    float *column = value_panel + p * GEMM_ROWS;
                    dequantize(kv->type, values + p * kv->row_bytes + 2 * d, count, column);
                    for (size_t i = count; i < GEMM_ROWS; i++) column[i] = 0;
                }
            gemm_panel(queries, scores, ATTEND_TILE, value_panel, positions, 0, GEMM_ROWS, total + d, padded, block);
        }
    }
    for (size_t i = 0; i < queries; i++) {
        for (size_t d = 0; d < dim; d++) out[i * dim + d] = total[i * padded + d] / sums[i];
        if (log_sums) log_sums[i] = scale * peaks[i] + logf(sums[i]);
    }
}

static void attend(fk_phase phase, const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv, float scale,
                   float cap, float *out, float *log_sums, float *scratch) {
#if FK_BF16
    if (wants_query_tiles(phase, queries)) {
        attend_in_tiles(q, queries, sights, kv, scale, cap, out, log_sums, scratch);
        return;
    }
#endif
    if (wants_few(phase, queries))
        attend_few(q, queries, sights, kv, scale, cap, out, log_sums, scratch);
    else
        attend_tiled(q, queries, sights, kv, scale, cap, out, log_sums, scratch);
}
