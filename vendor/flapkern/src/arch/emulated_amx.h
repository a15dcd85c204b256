/* AMX's tile instructions in software, for tests on processors that have AVX-512 with BF16 and no tiles (the feature `emulated-amx`). As
 * they are described in Intel's Instruction Set Extensions reference, but for the order in which a product's terms are summed: two at a
 * time, as VDPBF16PS does. What would be a fault of the processor ends the program. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AMX_TILES 8
#define TILE_ROWS 16

typedef struct tile_shape {
    int rows;
    size_t row_bytes;
} tile_shape;

/* Each thread has its own, and no shapes before they are configured, or after they were released. */
static _Thread_local __m512i tile_rows[AMX_TILES][TILE_ROWS];
static _Thread_local tile_shape tile_shapes[AMX_TILES];

static tile_shape shape_of(int tile) {
    if (tile < 0 || tile >= AMX_TILES || tile_shapes[tile].rows == 0) abort();
    return tile_shapes[tile];
}

static __mmask64 first_bytes(size_t bytes) { return bytes < 64 ? ((__mmask64)1 << bytes) - 1 : ~(__mmask64)0; }

static void configure_tiles(const void *config) {
    const uint8_t *p = config;
    if (p[0] != 1) abort();
    for (int i = 0; i < AMX_TILES; i++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, p + 16 + 2 * i, sizeof row_bytes);
        tile_shapes[i] = (tile_shape){p[48 + i], row_bytes};
        if (p[48 + i] > TILE_ROWS || row_bytes > 64) abort();
        memset(tile_rows[i], 0, sizeof tile_rows[i]);
    }
}

static void release_tiles(void) { memset(tile_shapes, 0, sizeof tile_shapes); }

static void zero_tile(int tile) {
    shape_of(tile);
    memset(tile_rows[tile], 0, sizeof tile_rows[tile]);
}

static void load_tile(int tile, const void *base, size_t stride) {
    const tile_shape shape = shape_of(tile);
    for (int i = 0; i < TILE_ROWS; i++)
        tile_rows[tile][i] = i < shape.rows ? _mm512_maskz_loadu_epi8(first_bytes(shape.row_bytes), (const uint8_t *)base + i * stride)
                                            : _mm512_setzero_si512();
}

static void store_tile(int tile, void *base, size_t stride) {
    const tile_shape shape = shape_of(tile);
    for (int i = 0; i < shape.rows; i++)
        _mm512_mask_storeu_epi8((uint8_t *)base + i * stride, first_bytes(shape.row_bytes), tile_rows[tile][i]);
}

static void multiply_bfloats(int to, int a, int b) {
    const tile_shape sums = shape_of(to), left = shape_of(a), right = shape_of(b);
    if (left.rows != sums.rows || right.row_bytes != sums.row_bytes || left.row_bytes != 4 * (size_t)right.rows) abort();
    for (int i = 0; i < sums.rows; i++) {
        __m512 sum = (__m512)tile_rows[to][i];
        int32_t pairs[16];
        memcpy(pairs, &tile_rows[a][i], sizeof pairs);
        for (int k = 0; k < right.rows; k++)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pairs[k]), (__m512bh)tile_rows[b][k]);
        tile_rows[to][i] = (__m512i)sum;
    }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(CONFIG) configure_tiles(CONFIG)
#define _tile_release() release_tiles()
#define _tile_zero(TILE) zero_tile(TILE)
#define _tile_loadd(TILE, BASE, STRIDE) load_tile(TILE, BASE, STRIDE)
#define _tile_stored(TILE, BASE, STRIDE) store_tile(TILE, BASE, STRIDE)
#define _tile_dpbf16ps(TO, A, B) multiply_bfloats(TO, A, B)
