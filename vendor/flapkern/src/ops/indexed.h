/* Groups of sparse and of narrow weights: they differ in length, and an index says where each begins. Included by table.h.
 *
 * Where a block begins follows from what the blocks before it say, so that groups are read from their beginnings on. What they say is
 * trusted with nothing but results: no block is read from beyond a limit, from where the longest block ends inside the bytes. */

INLINE uint64_t load_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int is_indexed(const fk_weights *w) { return w->layout == FK_LAYOUT_SPARSE || w->layout == FK_LAYOUT_NARROW; }

/* How many bytes ahead of a block is fetched, and the most lines of 64 bytes of each. */
#define INDEXED_AHEAD 1024
#define MOST_AHEAD 32

/* Where the last block of sound bytes ends, and no block may begin behind. */
INLINE const uint8_t *limit_of(const fk_weights *w) { return w->data + (w->bytes - FK_SPARSE_TAIL); }

INLINE const uint8_t *within(const uint8_t *p, const uint8_t *limit) { return p < limit ? p : limit; }

/* Where group `group` begins, or the last but one ends. */
static const uint8_t *indexed_group(const fk_weights *w, size_t group) {
    const uint64_t offset = load_u64(w->index + 8 * group), last = w->bytes - FK_SPARSE_TAIL;
    return w->data + (offset < last ? offset : last);
}

/* How far a group has been read. */
typedef struct cursor {
    /* Where what comes next begins. */
    const uint8_t *p;
    /* Of narrow groups: the columns that were read, the listed numbers that come next, and how many. */
    size_t column;
    const uint8_t *listed;
    size_t count;
} cursor;
