/* What the file of an instruction set defines before it includes ops/table.h. The compiler stops here at a macro that is
 * missing, and names a function that is missing or has another type by its declaration here.
 *
 * Optional are FK_BF16 and FK_AMX (1 for the products of ops/tiled.h, and for its AMX variant), and whatever lanes.h and
 * ops/packed.h have a plain version of: FK_OWN_WIDTHS, FK_OWN_REDUCTIONS, FK_OWN_SUM_EACH, FK_OWN_TRANSPOSE, FK_OWN_EXP,
 * FK_OWN_SPREAD; FK_OWN_FOUR_BLOCKS of ops/activations.h; and what ops/expand.h makes of shuffle_bytes: FK_OWN_EXPAND_LINE, FK_OWN_MASK_LINE, FK_OWN_HALVES_LINE. And
 * FK_OWN_SETTLE of ops/sparse.h. */

/* FK_LANES is the number of floats in a vector; lanes.h makes the vector types of it. */
#ifndef FK_LANES
#error "define FK_LANES and include lanes.h"
#endif
#if FK_GROUP % FK_LANES != 0
#error "a group of packed rows must be whole vectors of FK_LANES"
#endif

/* The tile of a product in single precision that stays in registers: GEMM_TOKENS tokens by GEMM_VECTORS vectors of weight
 * rows. */
#if !defined(GEMM_TOKENS) || !defined(GEMM_VECTORS)
#error "define GEMM_TOKENS and GEMM_VECTORS"
#endif
#if GEMM_TOKENS != 4 && GEMM_TOKENS != 6 && GEMM_TOKENS != 12
#error "ops/panels.h has tiles of 4, 6 and 12 tokens"
#endif

/* Tokens that are multiplied with a vector of packed rows at a time. */
#ifndef PACKED_TOKENS
#error "define PACKED_TOKENS"
#endif

/* 128 if dot_signed takes signed codes as unsigned bytes, 128 added to each; 0 if it takes them as they are. */
#ifndef SIGNED_OFFSET
#error "define SIGNED_OFFSET"
#endif

/* The symbol of the table, which dispatch.c declares, and the name that users know it by. */
#if !defined(FK_TABLE) || !defined(FK_NAME)
#error "define FK_TABLE and FK_NAME"
#endif

#if FK_AMX && !FK_BF16
#error "FK_AMX takes FK_BF16"
#endif
#if FK_BF16 && FK_LANES != 16
#error "FK_BF16 takes vectors of 16 lanes"
#endif

/* FK_LANES half-precision numbers from memory, and to memory, rounded to nearest even. */
INLINE vf load_half(const uint16_t *p);
INLINE void store_half(uint16_t *p, vf v);

/* The half-precision number at any address. */
INLINE float half_at(const uint8_t *p);

/* The product of one native row and one token's 8-bit activations: `blocks` blocks of 32 codes q with their scales and
 * sums (scale * sum of codes). */
static float dot_q8_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks);
static float dot_q4_0(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks);
static float dot_q4_1(const uint8_t *row, const int8_t *q, const float *scales, const float *sums, size_t blocks);

/* sum + the products of FK_LANES packed rows with one token, a lane for each row. codes are `words` vectors (4 or 8) of
 * four columns each; x has the codes of the 4 * words activations. Unsigned codes have `bits` bits, at most 6. */
INLINE vi dot_unsigned(vi sum, const vw *codes, int words, int bits, const int8_t *x);
INLINE vi dot_signed(vi sum, const vw *codes, int words, const int8_t *x);

/* The entries of a table of 16 bytes at codes of 4 bits. */
INLINE vw look_up(const int8_t *table, vw codes);

/* A line of 64 bytes, as packed weights have them, is 64 / sizeof(vw) vectors, and a column of 16 rows FK_GROUP / FK_LANES. */

/* Spreads bytes from p on over the places of a line whose bits are set in `mask`, in order; the others become 0. Up to 64 bytes
 * from p on are read. */
INLINE void expand_line(const uint8_t *p, uint64_t mask, vw *line);

/* 1 in the bytes of a line whose bits are set in `mask`, 0 in the others. */
INLINE void mask_line(uint64_t mask, vw *line);

/* Spreads F16 or BF16 numbers from p on over the places of four columns by the mask of 8 bytes at `masks`; the others become 0.
 * Up to 64 bytes behind the last number are read. And vector v of column c of these. */
typedef struct halves_line halves_line;
INLINE void expand_halves(fk_type type, const uint8_t *p, const uint8_t *masks, halves_line *line);
INLINE vf column_of(fk_type type, const halves_line *line, int c, int v);

#ifndef FK_OWN_EXPAND_LINE
/* The bytes with the numbers in `from`; 0 where these have bit 7 set. */
INLINE sixteen_bytes shuffle_bytes(sixteen_bytes bytes, sixteen_bytes from);

/* A vector of as many bytes as it has. */
INLINE vw join_sixteens(const sixteen_bytes *parts);
#endif
#ifndef FK_OWN_HALVES_LINE
/* Vector v (of 8 / FK_LANES) of eight F16 or BF16 numbers. */
INLINE vf widen_halves(fk_type type, sixteen_bytes halves, int v);
#endif
