/* Values that lie one after another spread over the places whose bits are set in a mask, for sparse weights. Included by
 * table.h.
 *
 * An instruction set that has instructions for it has its own functions, as contract.h says. The others look up, for eight bits
 * of a mask at a time, which byte comes to which place, and move sixteen bytes at once by shuffle_bytes. */

/* The bits that are set in a mask. Processors that count bits with an instruction of their own are told from others by the
 * compiler's flags. */
#if defined(__POPCNT__)
INLINE size_t count_bits(uint64_t mask) { return (size_t)__builtin_popcountll(mask); }

/* The bits that are set below `place`, a multiple of 8 from 8 on. */
INLINE size_t bits_below(uint64_t mask, int place) { return count_bits(mask << (64 - place)); }
#else
/* In byte i, how many bits are set in bytes 0 to i. */
INLINE uint64_t count_by_bytes(uint64_t mask) {
    mask -= mask >> 1 & 0x5555555555555555u;
    mask = (mask & 0x3333333333333333u) + (mask >> 2 & 0x3333333333333333u);
    mask = (mask + (mask >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return mask * 0x0101010101010101u;
}

INLINE size_t count_bits(uint64_t mask) { return (size_t)(count_by_bytes(mask) >> 56); }

INLINE size_t bits_below(uint64_t mask, int place) { return (size_t)(count_by_bytes(mask) >> (place - 8) & 255); }
#endif

#if !defined(FK_OWN_EXPAND_LINE) || !defined(FK_OWN_HALVES_LINE)
/* Entry m of a table says for each of eight places which of the values comes there if the bits of m are set: as many as are set
 * below it, or none (bit 7 is set, and stays so when up to eight is added). */
#define SET(M, I) ((M) >> (I) & 1)
#define BELOW(M, I)                                                                                                \
    ((I > 0 ? SET(M, 0) : 0) + (I > 1 ? SET(M, 1) : 0) + (I > 2 ? SET(M, 2) : 0) + (I > 3 ? SET(M, 3) : 0) +       \
     (I > 4 ? SET(M, 4) : 0) + (I > 5 ? SET(M, 5) : 0) + (I > 6 ? SET(M, 6) : 0) + (I > 7 ? SET(M, 7) : 0))
#define FROM(M, I) (SET(M, I) ? BELOW(M, I) : 0x80)
#define LOW(M, I) (SET(M, I) ? 2 * BELOW(M, I) : 0x80)
#define HIGH(M, I) (SET(M, I) ? 2 * BELOW(M, I) + 1 : 0x80)

#define EIGHT(M) FROM(M, 0), FROM(M, 1), FROM(M, 2), FROM(M, 3), FROM(M, 4), FROM(M, 5), FROM(M, 6), FROM(M, 7)
#define EIGHT_ZEROS 0, 0, 0, 0, 0, 0, 0, 0
#define EIGHT_SUMS(M) \
    BELOW(M, 8), BELOW(M, 8), BELOW(M, 8), BELOW(M, 8), BELOW(M, 8), BELOW(M, 8), BELOW(M, 8), BELOW(M, 8)

/* The first eight of sixteen places, and in the others how many values these take; and the last eight without the first. */
#define FIRST(M) {EIGHT(M), EIGHT_SUMS(M)}
#define SECOND(M) {EIGHT_ZEROS, EIGHT(M)}
/* Eight places of two bytes each. */
#define PAIRS(M)                                                                                                   \
    {LOW(M, 0), HIGH(M, 0), LOW(M, 1), HIGH(M, 1), LOW(M, 2), HIGH(M, 2), LOW(M, 3), HIGH(M, 3),                   \
     LOW(M, 4), HIGH(M, 4), LOW(M, 5), HIGH(M, 5), LOW(M, 6), HIGH(M, 6), LOW(M, 7), HIGH(M, 7)}

#define FOUR(X, M) X(M), X(M + 1), X(M + 2), X(M + 3)
#define SIXTEEN(X, M) FOUR(X, M), FOUR(X, M + 4), FOUR(X, M + 8), FOUR(X, M + 12)
#define SIXTY_FOUR(X, M) SIXTEEN(X, M), SIXTEEN(X, M + 16), SIXTEEN(X, M + 32), SIXTEEN(X, M + 48)
#define ALL_MASKS(X) SIXTY_FOUR(X, 0), SIXTY_FOUR(X, 64), SIXTY_FOUR(X, 128), SIXTY_FOUR(X, 192)

INLINE sixteen_bytes load_sixteen(const void *p) {
    sixteen_bytes v;
    memcpy(&v, p, sizeof v);
    return v;
}
#endif

#ifndef FK_OWN_EXPAND_LINE
static const uint8_t first_places[256][16] __attribute__((aligned(64))) = {ALL_MASKS(FIRST)};
static const uint8_t second_places[256][16] __attribute__((aligned(64))) = {ALL_MASKS(SECOND)};

INLINE void expand_line(const uint8_t *p, uint64_t mask, vw *line) {
    sixteen_bytes part[4];
    UNROLL for (int q = 0; q < 4; q++) {
        const sixteen_bytes from =
            load_sixteen(first_places[mask >> (16 * q) & 255]) + load_sixteen(second_places[mask >> (16 * q + 8) & 255]);
        part[q] = shuffle_bytes(load_sixteen(q > 0 ? p + bits_below(mask, 16 * q) : p), from);
    }
    UNROLL for (int v = 0; v < GROUP_VECTORS; v++) line[v] = join_sixteens(part + FK_LANES / 4 * v);
}
#endif

#ifndef FK_OWN_MASK_LINE
INLINE void mask_line(uint64_t mask, vw *line) {
    const sixteen_bytes bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const sixteen_bytes byte = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint64_t twice[2] = {mask, mask};
    const sixteen_bytes all = load_sixteen(twice);
    sixteen_bytes part[4];
    UNROLL for (int q = 0; q < 4; q++)
        part[q] = (sixteen_bytes)((shuffle_bytes(all, byte + (uint8_t)(2 * q)) & bits) == bits) & 1;
    UNROLL for (int v = 0; v < GROUP_VECTORS; v++) line[v] = join_sixteens(part + FK_LANES / 4 * v);
}
#endif

#ifndef FK_OWN_HALVES_LINE
static const uint8_t pair_places[256][16] __attribute__((aligned(64))) = {ALL_MASKS(PAIRS)};

/* Of each column the first eight rows, and the last. */
struct halves_line {
    sixteen_bytes half[8];
};

INLINE void expand_halves(fk_type type, const uint8_t *p, const uint8_t *masks, halves_line *line) {
    (void)type;
    const uint64_t mask = load_u64(masks);
    UNROLL for (int i = 0; i < 8; i++)
        line->half[i] = shuffle_bytes(load_sixteen(i > 0 ? p + 2 * bits_below(mask, 8 * i) : p),
                                      load_sixteen(pair_places[mask >> (8 * i) & 255]));
}

INLINE vf column_of(fk_type type, const halves_line *line, int c, int v) {
    return widen_halves(type, line->half[2 * c + v * FK_LANES / 8], v % (8 / FK_LANES));
}
#endif
