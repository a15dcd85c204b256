/* Attention in bfloat16 tiles, with AMX or with AVX-512's dot products of pairs. Included by table.h.
 *
 * Sixteen queries at a time, one in every lane: scores^T [positions, 16] = K Q^T and out^T [head_dim, 16] = V^T P^T. So keys
 * and values are the first factors, as they lie and transposed, which is done once for all queries; softmax needs nothing
 * across lanes; and what it leaves is in order to be the next second factor. Online softmax as in attend_tiled. */

#define QUERY_TILE 16

typedef struct attend_shape {
    size_t queries, query_tiles;
    size_t key_steps;   /* steps of 32 values of a head */
    size_t value_tiles; /* tiles of 16 values of a head */
} attend_shape;

static attend_shape shape_of_attention(size_t queries, size_t head_dim) {
    return (attend_shape){queries, (queries + QUERY_TILE - 1) / QUERY_TILE, (head_dim + FK_TILE_COLS - 1) / FK_TILE_COLS,
                          (head_dim + 15) / 16};
}

/* Tiles of 16 positions, and steps of 32 positions, of ATTEND_TILE positions. */
#define POSITION_TILES (ATTEND_TILE / 16)
#define POSITION_STEPS (ATTEND_TILE / FK_TILE_COLS)

static size_t tiled_attend_scratch(size_t queries, size_t head_dim) {
    attend_shape s = shape_of_attention(queries, head_dim);
    return s.query_tiles * s.key_steps * FK_TILE / 2       /* queries */
           + POSITION_TILES * s.key_steps * FK_TILE / 2    /* keys */
           + POSITION_STEPS * s.value_tiles * FK_TILE / 2  /* values, transposed */
           + POSITION_STEPS * FK_TILE / 2                  /* softmax of the scores */
           + FK_TILE / 2                                   /* a tile to transpose */
           + ATTEND_TILE * QUERY_TILE                      /* scores */
           + s.query_tiles * s.value_tiles * 16 * QUERY_TILE /* the output so far */
           + s.query_tiles * 4 * QUERY_TILE + 16;          /* peaks, sums, sights; alignment */
}

/* Values d to d + 15 of a row of the cache that has `dim` values; those beyond are 0. A row that does not exist has dim 0. */
INLINE vf load_cached(fk_type type, const uint8_t *row, size_t d, size_t dim) {
    if (d >= dim) return (vf){0};
    if (type == FK_TYPE_F16) {
        const __mmask16 there = dim - d >= 16 ? 0xffff : (__mmask16)((1u << (dim - d)) - 1);
        return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, (const uint16_t *)row + d));
    }
    return load_kv(type, row, d);
}

/* Brings queries [count, dim] into tiles of second factors: [key_steps, 16 pairs of values, QUERY_TILE, 2]. */
static void tile_queries(const float *q, size_t count, size_t dim, size_t steps, uint16_t *tiles, uint16_t *rows) {
    for (size_t s = 0; s < steps; s++, tiles += FK_TILE) {
        const size_t n = dim - s * FK_TILE_COLS;
        for (size_t i = 0; i < QUERY_TILE; i++) {
            __m512i row = _mm512_setzero_si512();
            if (i < count) {
                const float *from = q + i * dim + s * FK_TILE_COLS;
                row = to_bfloats(load_masked(from, n), load_masked(from + FK_LANES, n > FK_LANES ? n - FK_LANES : 0));
            }
            _mm512_store_si512(rows + i * FK_TILE_COLS, row);
        }
        transpose_words(rows, 2 * FK_TILE_COLS, tiles);
    }
}

/* Asks for a row of the cache that is read soon: with few queries the processor does not see in time by itself what comes next. */
INLINE void fetch_row(const fk_kv_head *kv, const uint8_t *row) {
    for (size_t at = 0; at < kv->row_bytes; at += 64) __builtin_prefetch(row + at);
}

/* Brings the keys of the first `count` positions of a block into tiles of first factors: [POSITION_TILES, key_steps,
 * 16 positions, 32 values]. Where `fetches`, their values are asked for meanwhile. */
INLINE void tile_keys(fk_type type, const fk_kv_head *kv, size_t block, size_t count, size_t steps, int fetches, uint16_t *tiles) {
    for (size_t p = 0; p < ATTEND_TILE; p++) {
        if (fetches && p < count) fetch_row(kv, block_values(kv, block) + p * kv->row_bytes);
        for (size_t s = 0; s < steps; s++) {
            const uint8_t *row = block_keys(kv, block) + p * kv->row_bytes;
            const size_t d = s * FK_TILE_COLS, dim = p < count ? kv->head_dim : 0;
            _mm512_store_si512(tiles + (p / 16 * steps + s) * FK_TILE + p % 16 * FK_TILE_COLS,
                               to_bfloats(load_cached(type, row, d, dim), load_cached(type, row, d + 16, dim)));
        }
    }
}

/* Brings the values of the first `count` positions of a block into tiles of first factors: [value_tiles, POSITION_STEPS,
 * 16 values, 32 positions]. */
INLINE void tile_values(fk_type type, const fk_kv_head *kv, size_t block, size_t count, size_t value_tiles,
                        uint16_t *tiles, uint16_t *pairs) {
    for (size_t d = 0; d < value_tiles; d++)
        for (size_t s = 0; s < POSITION_STEPS; s++, tiles += FK_TILE) {
            for (size_t pair = 0; pair < TILE_PAIRS; pair++) {
                const size_t p = s * FK_TILE_COLS + 2 * pair;
                const uint8_t *row = block_values(kv, block) + p * kv->row_bytes;
                store_pairs(pairs + 32 * pair, load_cached(type, row, 16 * d, p < count ? kv->head_dim : 0),
                            load_cached(type, row + kv->row_bytes, 16 * d, p + 1 < count ? kv->head_dim : 0));
            }
            transpose_words(pairs, 64, tiles);
        }
}

/* 2^x with an error of 4e-5 of its size, which is far below a step of bfloat16; 0 below 2^-126. NaN stays NaN. */
INLINE vf rough_exp2(vf x) {
    __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-140), (__m512)x);
    __m512 n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = (vf)clamped - (vf)n;
    /* The Taylor series of e^(r ln 2), |r| <= 1/2. */
    vf p = r * 9.61812911e-3f + 5.55041087e-2f;
    p = p * r + 2.40226507e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, n);
}

/* Queries for which half a vector is enough. */
#define FEW_LANES 8

#if FK_AMX
/* scores [ATTEND_TILE, QUERY_TILE] = the products of the first `tiles` tiles of keys and a tile of queries; the rest is 0. */
static void tile_scores(const uint16_t *keys, const uint16_t *queries, size_t steps, int tiles, int few, float *scores) {
    (void)few;
    compiler_barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t s = 0; s < steps; s++, keys += FK_TILE) {
        _tile_loadd(6, queries + s * FK_TILE, 64);
        _tile_loadd(4, keys, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles > 1) {
            _tile_loadd(5, keys + steps * FK_TILE, 64);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (tiles > 2) {
            _tile_loadd(4, keys + 2 * steps * FK_TILE, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (tiles > 3) {
            _tile_loadd(5, keys + 3 * steps * FK_TILE, 64);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
    compiler_barrier();
}

/* total [16 value_tiles, QUERY_TILE] (+)= values times weights, over the first `steps` steps of 32 positions. Adds to what
 * total holds unless `fresh`. */
static void tile_output(const uint16_t *values, const uint16_t *weights, size_t value_tiles, size_t steps, int few, int fresh,
                        float *total) {
    (void)few;
    compiler_barrier();
    _tile_loadd(6, weights, 64);
    if (steps > 1) _tile_loadd(7, weights + FK_TILE, 64);
    for (size_t d = 0; d < value_tiles; d++, total += 256, values += POSITION_STEPS * FK_TILE) {
        if (fresh)
            _tile_zero(0);
        else
            _tile_loadd(0, total, 64);
        _tile_loadd(4, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (steps > 1) {
            _tile_loadd(5, values + FK_TILE, 64);
            _tile_dpbf16ps(0, 5, 7);
        }
        _tile_stored(0, total, 64);
    }
    compiler_barrier();
}
#else
/* The same two products. With at most FEW_LANES queries half a vector is enough, which takes half the time. */
static void tile_scores(const uint16_t *keys, const uint16_t *queries, size_t steps, int tiles, int few, float *scores) {
    const size_t stride = steps * FK_TILE;
    for (int tile = 0; tile < tiles; tile++, keys += stride, scores += 256)
        if (few)
            multiply_half_tile(keys, queries, steps, 1, scores);
        else
            multiply_tiles(1, 1, keys, stride, queries, stride, steps, 1, scores, QUERY_TILE);
    memset(scores, 0, (size_t)(POSITION_TILES - tiles) * 256 * sizeof *scores);
}

static void tile_output(const uint16_t *values, const uint16_t *weights, size_t value_tiles, size_t steps, int few, int fresh,
                        float *total) {
    const size_t stride = POSITION_STEPS * FK_TILE;
    for (size_t d = 0; d < value_tiles; d++, values += stride, total += 256)
        if (few)
            multiply_half_tile(values, weights, steps, fresh, total);
        else
            multiply_tiles(1, 1, values, stride, weights, stride, steps, fresh, total, QUERY_TILE);
}
#endif

/* What the queries of a tile see. */
typedef struct tile_sight {
    vi begin, end;
} tile_sight;

/* The lanes whose query sees a position from p to p + count - 1: all of them if `whole`. */
INLINE __mmask16 sees(tile_sight sight, int p, int count, int whole) {
    return whole ? 0xffff
                 : _mm512_cmpgt_epi32_mask((__m512i)sight.end, _mm512_set1_epi32(p)) &
                       _mm512_cmplt_epi32_mask((__m512i)sight.begin, _mm512_set1_epi32(p + count));
}

/* The factor by which what the lanes summed before shrinks as their peaks rise to `peak`: 2 to the power of the difference of the two
 * times `scale`. Exactly 1 for lanes that see nothing of these positions, since the compiler may round the two products differently:
 * what comes out for a query must not depend on whether others in its tile see more. */
INLINE vf shrink_of(vf before, vf peak, tile_sight sight, int whole, float scale) {
    return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(1), sees(sight, 0, ATTEND_TILE, whole), (__m512)rough_exp2(before * scale - peak * scale));
}

/* Turns one tile of scores into weights for the values, raises the lanes' peaks and adds to their sums. Returns the factor by
 * which what they summed before shrinks. `sight` counts from the tile's first position; `whole` says that every lane sees
 * every position. */
INLINE vf tile_softmax(const float *scores, int positions, tile_sight sight, int whole, float scale, vf *peaks, vf *sums,
                       uint16_t *weights) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    __m512 peak = (__m512)*peaks;
    for (int p = 0; p < positions; p++)
        peak = _mm512_max_ps(_mm512_mask_blend_ps(sees(sight, p, 1, whole), none, _mm512_load_ps(scores + 16 * p)), peak);
    const vf offset = (vf)peak * scale, shrink = shrink_of(*peaks, (vf)peak, sight, whole, scale);
    vf sum = *sums * shrink;
    for (int p = 0; p < positions; p += 2) {
        vf e[2];
        UNROLL for (int i = 0; i < 2; i++) {
            e[i] = rough_exp2((vf)_mm512_load_ps(scores + 16 * (p + i)) * scale - offset);
            e[i] = (vf)_mm512_maskz_mov_ps(sees(sight, p + i, 1, whole), (__m512)e[i]);
        }
        /* Sums are of the rounded weights, since these are what the values are multiplied with. */
        __m512i two = pairs_of(e[0], e[1]);
        _mm512_store_si512(weights + 16 * p, two);
        sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)two, (__m512bh)ones);
    }
    *peaks = (vf)peak;
    *sums = sum;
    return shrink;
}

#if !FK_AMX
/* Queries whose sums stay in registers while positions, and then values, take the lanes. */
#define FEW_QUERIES 4
/* Tiles of 16 values whose sums do. */
#define FEW_VALUE_TILES 4

/* The keys of the first `tiles` tiles of 16 positions of a block, of which there are `count` positions, as second factors: [tiles,
 * key_steps, 16 pairs of values, 16 positions, 2]. Their values are asked for meanwhile. */
INLINE void pairs_of_keys(fk_type type, const fk_kv_head *kv, size_t block, size_t count, size_t steps, size_t tiles, uint16_t *to) {
    for (size_t tile = 0; tile < tiles; tile++)
        for (size_t s = 0; s < steps; s++, to += FK_TILE) {
            vf words[16];
            UNROLL for (size_t i = 0; i < 16; i++) {
                const size_t p = 16 * tile + i, d = s * FK_TILE_COLS, dim = p < count ? kv->head_dim : 0;
                const uint8_t *row = block_keys(kv, block) + p * kv->row_bytes;
                if (s == 0 && p < count) fetch_row(kv, block_values(kv, block) + p * kv->row_bytes);
                words[i] = (vf)to_bfloats(load_cached(type, row, d, dim), load_cached(type, row, d + 16, dim));
            }
            transpose(words);
            UNROLL for (size_t i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, (__m512i)words[i]);
        }
}

/* The values of the first `pairs` pairs of positions: [value_tiles, ATTEND_TILE / 2, 16 values, 2]. */
INLINE void pairs_of_values(fk_type type, const fk_kv_head *kv, size_t block, size_t count, size_t value_tiles, size_t pairs,
                            uint16_t *to) {
    for (size_t pair = 0; pair < pairs; pair++) {
        const uint8_t *row = block_values(kv, block) + 2 * pair * kv->row_bytes;
        const size_t even = 2 * pair < count ? kv->head_dim : 0, odd = 2 * pair + 1 < count ? kv->head_dim : 0;
        for (size_t d = 0; d < value_tiles; d++)
            store_pairs(to + (d * ATTEND_TILE / 2 + pair) * 32, load_cached(type, row, 16 * d, even),
                        load_cached(type, row + kv->row_bytes, 16 * d, odd));
    }
}

/* Pair number `pair` of a row of bfloat16, in all lanes. */
INLINE __m512bh pair_at(const uint16_t *row, size_t pair) {
    int32_t two;
    memcpy(&two, row + 2 * pair, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}

/* total [n, value_tiles, 16] += weights [n, ATTEND_TILE] times the first `pairs` pairs of values, for `tiles` tiles from the first on (n
 * and `tiles` are constants). */
INLINE void add_few_values(int n, int tiles, const uint16_t *values, const uint16_t *weights, size_t pairs, float *total, size_t stride) {
    __m512 sum[FEW_QUERIES][FEW_VALUE_TILES];
    UNROLL for (int i = 0; i < n; i++)
        UNROLL for (int d = 0; d < tiles; d++) sum[i][d] = (__m512)load(total + i * stride + 16 * d);
    for (size_t pair = 0; pair < pairs; pair++) {
        __m512bh by[FEW_QUERIES];
        UNROLL for (int i = 0; i < n; i++) by[i] = pair_at(weights + i * ATTEND_TILE, pair);
        UNROLL for (int d = 0; d < tiles; d++) {
            const __m512bh two = (__m512bh)_mm512_load_si512(values + (d * ATTEND_TILE / 2 + pair) * 32);
            UNROLL for (int i = 0; i < n; i++) sum[i][d] = _mm512_dpbf16_ps(sum[i][d], by[i], two);
        }
    }
    UNROLL for (int i = 0; i < n; i++)
        UNROLL for (int d = 0; d < tiles; d++) store(total + i * stride + 16 * d, (vf)sum[i][d]);
}

/* Which of the 16 positions from p on query i sees, a bit for each. */
INLINE __mmask16 positions_seen(tile_sight sight, int i, size_t p) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, place = lane + (int32_t)p;
    return _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(sight.end[i]), (__m512i)place) &
           _mm512_cmple_epi32_mask(_mm512_set1_epi32(sight.begin[i]), (__m512i)place);
}

/* attend for n <= FEW_QUERIES queries (a constant). In attend_in_tiles a lane is a query, so that most lanes would have none; here the
 * lanes of scores are positions, and those of the output values of a head. Every sum runs in the same order as there, so that the
 * results are the same to the bit. */
INLINE void attend_few_pairs(fk_type type, int n, const float *q, const fk_sight *sights, const fk_kv_head *kv, float scale, float cap,
                             float *out, float *log_sums, float *scratch) {
    const size_t dim = kv->head_dim;
    const attend_shape shape = shape_of_attention(n, dim);
    const size_t steps = shape.key_steps, value_tiles = shape.value_tiles, padded = 16 * value_tiles;
    uint16_t *queries = (uint16_t *)aligned(scratch);
    uint16_t *keys = queries + steps * FK_TILE;
    uint16_t *values = keys + POSITION_TILES * steps * FK_TILE;
    uint16_t *weights = values + POSITION_STEPS * value_tiles * FK_TILE;
    float *total = (float *)(weights + POSITION_STEPS * FK_TILE);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);

    memset(total, 0, n * padded * sizeof *total);
    vf peaks = splat(-INFINITY), sums = {0};
    size_t last = 0;
    tile_sight sight;
    for (int i = 0; i < 16; i++) {
        /* As there, lanes without a query see what the last query sees. */
        const fk_sight one = sights[i < n ? i : n - 1];
        sight.begin[i] = (int32_t)one.begin;
        sight.end[i] = (int32_t)one.end;
        last = one.end > last ? one.end : last;
    }
    for (int i = 0; i < n; i++)
        for (size_t s = 0; s < steps; s++) {
            const float *from = q + i * dim + s * FK_TILE_COLS;
            const size_t left = dim - s * FK_TILE_COLS;
            _mm512_store_si512(queries + (i * steps + s) * FK_TILE_COLS,
                               to_bfloats(load_masked(from, left), load_masked(from + 16, left > 16 ? left - 16 : 0)));
        }

    const float plain_scale = scale;
    scale *= 1.44269504f;
    for (size_t from = 0; from < last; from += ATTEND_TILE) {
        const size_t positions = last - from < ATTEND_TILE ? last - from : ATTEND_TILE, block = from / ATTEND_TILE;
        const tile_sight seen = {sight.begin - (int32_t)from, sight.end - (int32_t)from};
        const int most = (int)_mm512_reduce_max_epi32((__m512i)seen.end);
        if (most <= 0 || (int)_mm512_reduce_min_epi32((__m512i)seen.begin) >= ATTEND_TILE) continue;
        const int whole = _mm512_reduce_max_epi32((__m512i)seen.begin) <= 0 &&
                          _mm512_reduce_min_epi32((__m512i)seen.end) >= ATTEND_TILE;
        /* Steps of two tiles of positions. */
        const size_t used = most > ATTEND_TILE ? POSITION_STEPS : (size_t)(most + FK_TILE_COLS - 1) / FK_TILE_COLS;
        for (size_t p = from + ATTEND_TILE; p < last && p < from + 2 * ATTEND_TILE; p++) fetch_row(kv, key_at(kv, p));
        pairs_of_keys(type, kv, block, positions, steps, 2 * used, keys);
        pairs_of_values(type, kv, block, positions, value_tiles, 16 * used, values);

        vf scores[FEW_QUERIES][POSITION_TILES];
        for (size_t two = 0; two < used; two++) {
            const uint16_t *tiles = keys + 2 * two * steps * FK_TILE;
            __m512 sum[FEW_QUERIES][2];
            UNROLL for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
            for (size_t pair = 0; pair < steps * TILE_PAIRS; pair++) {
                const __m512bh low = (__m512bh)_mm512_load_si512(tiles + 32 * pair);
                const __m512bh high = (__m512bh)_mm512_load_si512(tiles + steps * FK_TILE + 32 * pair);
                UNROLL for (int i = 0; i < n; i++) {
                    const __m512bh by = pair_at(queries + i * steps * FK_TILE_COLS, pair);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], by, low);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], by, high);
                }
            }
            UNROLL for (int i = 0; i < n; i++) scores[i][2 * two] = (vf)sum[i][0], scores[i][2 * two + 1] = (vf)sum[i][1];
        }

        vf peak = peaks;
        for (int i = 0; i < n; i++) {
            if (cap != 0) cap_scores((float *)scores[i], used * FK_TILE_COLS, plain_scale, cap);
            __m512 top = _mm512_set1_ps(-INFINITY);
            for (size_t tile = 0; tile < 2 * used; tile++) {
                const __mmask16 there = positions_seen(seen, i, 16 * tile);
                top = _mm512_mask_max_ps(top, there, (__m512)scores[i][tile], top);
            }
            const float highest = _mm512_reduce_max_ps(top);
            peak[i] = highest > peaks[i] ? highest : peaks[i];
        }
        const vf offset = peak * scale, shrink = shrink_of(peaks, peak, seen, whole, scale);
        peaks = peak;
        sums *= shrink;
        for (int i = 0; i < n; i++) {
            const vf shift = splat(offset[i]);
            for (size_t tile = 0; tile < 2 * used; tile++) {
                const __mmask16 there = positions_seen(seen, i, 16 * tile);
                scores[i][tile] = (vf)_mm512_maskz_mov_ps(there, (__m512)rough_exp2(scores[i][tile] * scale - shift));
            }
            for (size_t two = 0; two < used; two++)
                _mm512_store_si512(weights + i * ATTEND_TILE + two * FK_TILE_COLS, to_bfloats(scores[i][2 * two], scores[i][2 * two + 1]));
        }
        /* Sums are of the rounded weights, since these are what the values are multiplied with. */
        __m512 sum[FEW_QUERIES];
        UNROLL for (int i = 0; i < n; i++) sum[i] = _mm512_set1_ps(sums[i]);
        for (size_t pair = 0; pair < 16 * used; pair++)
            UNROLL for (int i = 0; i < n; i++) sum[i] = _mm512_dpbf16_ps(sum[i], pair_at(weights + i * ATTEND_TILE, pair), ones);
        for (int i = 0; i < n; i++) {
            sums[i] = _mm512_cvtss_f32(sum[i]);
            if (shrink[i] == 1) continue;
            for (size_t d = 0; d < padded; d += 16) store(total + i * padded + d, load(total + i * padded + d) * shrink[i]);
        }
        size_t d = 0;
        for (; d + FEW_VALUE_TILES <= value_tiles; d += FEW_VALUE_TILES)
            add_few_values(n, FEW_VALUE_TILES, values + d * ATTEND_TILE / 2 * 32, weights, 16 * used, total + 16 * d, padded);
        for (; d < value_tiles; d++) add_few_values(n, 1, values + d * ATTEND_TILE / 2 * 32, weights, 16 * used, total + 16 * d, padded);
    }

    for (int i = 0; i < n; i++) {
        const float inverse = 1.0f / sums[i];
        if (log_sums) log_sums[i] = 0.693147181f * (scale * peaks[i] + log2f(sums[i]));
        for (size_t d = 0; d < dim; d += 16) {
            const __mmask16 there = dim - d >= 16 ? 0xffff : (__mmask16)((1u << (dim - d)) - 1);
            _mm512_mask_storeu_ps(out + i * dim + d, there, (__m512)(load(total + i * padded + d) * inverse));
        }
    }
}

#define FEW_PAIRS(TYPE, N)                                                                                                    \
    static __attribute__((noinline)) void attend_##TYPE##_##N(const float *q, const fk_sight *sights, const fk_kv_head *kv,  \
                                                              float scale, float cap, float *out, float *log_sums,          \
                                                              float *scratch) {                                             \
        attend_few_pairs(FK_TYPE_##TYPE, N, q, sights, kv, scale, cap, out, log_sums, scratch);                             \
    }
#define EACH_FEW_PAIRS(OF) OF(F16, 1) OF(F16, 2) OF(F16, 3) OF(F16, 4) OF(Q8_0, 1) OF(Q8_0, 2) OF(Q8_0, 3) OF(Q8_0, 4)
EACH_FEW_PAIRS(FEW_PAIRS)
#undef FEW_PAIRS

/* attend_few_pairs for this type and number of queries; returns 0, and has done nothing, where there are more. */
static int attend_pairs(const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv, float scale, float cap, float *out,
                        float *log_sums, float *scratch) {
#define FEW_PAIRS(TYPE, N)                                                             \
    if (queries == N && kv->type == FK_TYPE_##TYPE) {                                  \
        attend_##TYPE##_##N(q, sights, kv, scale, cap, out, log_sums, scratch);        \
        return 1;                                                                      \
    }
    EACH_FEW_PAIRS(FEW_PAIRS)
#undef FEW_PAIRS
    return 0;
}
#endif

/* attend for tiles of QUERY_TILE queries. */
static void attend_in_tiles(const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv, float scale,
                            float cap, float *out, float *log_sums, float *scratch) {
#if !FK_AMX
    if (attend_pairs(q, queries, sights, kv, scale, cap, out, log_sums, scratch)) return;
#endif
    const size_t dim = kv->head_dim;
    const attend_shape shape = shape_of_attention(queries, dim);
    const size_t steps = shape.key_steps, value_tiles = shape.value_tiles;
    uint16_t *query_tiles = (uint16_t *)aligned(scratch);
    uint16_t *keys = query_tiles + shape.query_tiles * steps * FK_TILE;
    uint16_t *values = keys + POSITION_TILES * steps * FK_TILE;
    uint16_t *weights = values + POSITION_STEPS * value_tiles * FK_TILE;
    uint16_t *turning = weights + POSITION_STEPS * FK_TILE;
    float *scores = (float *)(turning + FK_TILE);
    float *total = scores + ATTEND_TILE * QUERY_TILE;
    vf *peaks = (vf *)(total + shape.query_tiles * value_tiles * 16 * QUERY_TILE);
    vf *sums = peaks + shape.query_tiles;
    tile_sight *tile_sights = (tile_sight *)(sums + shape.query_tiles);

    /* Lanes without a query stay 0. */
    const int few = queries <= FEW_LANES;
    if (few) memset(scores, 0, (size_t)((float *)peaks - scores) * sizeof *scores);

    size_t last = 0;
    for (size_t tile = 0; tile < shape.query_tiles; tile++) {
        const size_t first = tile * QUERY_TILE, count = queries - first < QUERY_TILE ? queries - first : QUERY_TILE;
        tile_queries(q + first * dim, count, dim, steps, query_tiles + tile * steps * FK_TILE, turning);
        peaks[tile] = splat(-INFINITY);
        sums[tile] = (vf){0};
        for (size_t i = 0; i < QUERY_TILE; i++) {
            /* Lanes without a query see what the last query sees. */
            const fk_sight sight = sights[first + (i < count ? i : count - 1)];
            tile_sights[tile].begin[i] = (int32_t)sight.begin;
            tile_sights[tile].end[i] = (int32_t)sight.end;
            last = sight.end > last ? sight.end : last;
        }
    }

    /* Scores for powers of 2 instead of e. */
    const float plain_scale = scale;
    scale *= 1.44269504f;
    begin_tiles();
    for (size_t from = 0; from < last; from += ATTEND_TILE) {
        const size_t positions = last - from < ATTEND_TILE ? last - from : ATTEND_TILE;
        /* The keys that follow. */
        for (size_t p = from + ATTEND_TILE; few && p < last && p < from + 2 * ATTEND_TILE; p++) fetch_row(kv, key_at(kv, p));
        if (kv->type == FK_TYPE_Q8_0) {
            tile_keys(FK_TYPE_Q8_0, kv, from / ATTEND_TILE, positions, steps, few, keys);
            tile_values(FK_TYPE_Q8_0, kv, from / ATTEND_TILE, positions, value_tiles, values, turning);
        } else {
            tile_keys(FK_TYPE_F16, kv, from / ATTEND_TILE, positions, steps, few, keys);
            tile_values(FK_TYPE_F16, kv, from / ATTEND_TILE, positions, value_tiles, values, turning);
        }
        for (size_t tile = 0; tile < shape.query_tiles; tile++) {
            const tile_sight seen = {tile_sights[tile].begin - (int32_t)from, tile_sights[tile].end - (int32_t)from};
            const int first = (int)_mm512_reduce_min_epi32((__m512i)seen.begin);
            const int most = (int)_mm512_reduce_max_epi32((__m512i)seen.end);
            if (most <= 0 || first >= ATTEND_TILE) continue;
            /* Every lane sees every position; and none has seen any before. */
            const int whole = _mm512_reduce_max_epi32((__m512i)seen.begin) <= 0 &&
                              _mm512_reduce_min_epi32((__m512i)seen.end) >= ATTEND_TILE;
            const int fresh = first >= 0;
            float *so_far = total + tile * value_tiles * 256;
            const int tiles = most > ATTEND_TILE ? POSITION_TILES : (most + 15) / 16;
            const int used = (tiles + 1) / 2;
            tile_scores(keys, query_tiles + tile * steps * FK_TILE, steps, tiles, few, scores);
            if (cap != 0) cap_scores(scores, (size_t)tiles * 256, plain_scale, cap);
            const vf shrink =
                whole ? tile_softmax(scores, ATTEND_TILE, seen, 1, scale, peaks + tile, sums + tile, weights)
                      : tile_softmax(scores, used * FK_TILE_COLS, seen, 0, scale, peaks + tile, sums + tile, weights);
            if (!fresh && _mm512_cmpneq_ps_mask((__m512)shrink, _mm512_set1_ps(1)) != 0)
                for (size_t d = 0; d < 16 * value_tiles; d++) store(so_far + 16 * d, load(so_far + 16 * d) * shrink);
            tile_output(values, weights, value_tiles, used, few, fresh, so_far);
        }
    }
    end_tiles();

    for (size_t tile = 0; tile < shape.query_tiles; tile++) {
        const size_t first = tile * QUERY_TILE, count = queries - first < QUERY_TILE ? queries - first : QUERY_TILE;
        const vf inverse = 1.0f / sums[tile];
        if (log_sums)
            for (size_t i = 0; i < count; i++)
                log_sums[first + i] = 0.693147181f * (scale * peaks[tile][i] + log2f(sums[tile][i]));
        for (size_t d = 0; d < value_tiles; d++) {
            float *so_far = total + (tile * value_tiles + d) * 256;
            for (size_t i = 0; i < 16; i++) store(so_far + 16 * i, load(so_far + 16 * i) * inverse);
            transpose_words(so_far, 64, turning);
            const size_t n = dim - 16 * d;
            for (size_t i = 0; i < count; i++)
                _mm512_mask_storeu_ps(out + (first + i) * dim + 16 * d, n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1),
                                      _mm512_load_ps((const float *)turning + 16 * i));
        }
    }
}
