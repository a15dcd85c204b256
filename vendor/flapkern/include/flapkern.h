/* flapkern: the vector kernels of flapjack.
 *
 * Weights come in ggml's block formats, as they lie in a GGUF file (ggml's ggml-common.h and the GGUF specification are
 * the sources of the layouts). The library knows neither models nor files nor threads: a caller splits the rows of a
 * matrix among its threads and calls with ranges. Nothing here allocates, and nothing keeps state.
 *
 * One table of functions exists for each instruction set; fk_kernels_for() hands it out if the processor has the set.
 * Results of one table do not depend on how a caller splits its rows. They differ from table to table in the last bits.
 */
#ifndef FLAPKERN_H
#define FLAPKERN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Element types of weights; the numbers are GGUF's. */
typedef enum fk_type {
    FK_TYPE_F32 = 0,
    FK_TYPE_F16 = 1,
    FK_TYPE_Q4_0 = 2,
    FK_TYPE_Q4_1 = 3,
    FK_TYPE_Q5_0 = 6,
    FK_TYPE_Q5_1 = 7,
    FK_TYPE_Q8_0 = 8,
    FK_TYPE_Q8_1 = 9,
    FK_TYPE_Q2_K = 10,
    FK_TYPE_Q3_K = 11,
    FK_TYPE_Q4_K = 12,
    FK_TYPE_Q5_K = 13,
    FK_TYPE_Q6_K = 14,
    FK_TYPE_IQ2_XXS = 16,
    FK_TYPE_IQ2_XS = 17,
    FK_TYPE_IQ3_XXS = 18,
    FK_TYPE_IQ1_S = 19,
    FK_TYPE_IQ4_NL = 20,
    FK_TYPE_IQ3_S = 21,
    FK_TYPE_IQ2_S = 22,
    FK_TYPE_IQ4_XS = 23,
    FK_TYPE_IQ1_M = 29,
    FK_TYPE_BF16 = 30,
    FK_TYPE_TQ1_0 = 34,
    FK_TYPE_TQ2_0 = 35,
    FK_TYPE_MXFP4 = 39
} fk_type;

/* How a matrix lies in memory. */
typedef enum fk_layout {
    FK_LAYOUT_NATIVE = 0, /* row after row, as GGUF stores it */
    FK_LAYOUT_PACKED = 1, /* groups of FK_GROUP rows interleaved, block by block; see below */
    FK_LAYOUT_SPARSE = 2, /* the same without the weights that were removed; see below */
    FK_LAYOUT_NARROW = 3  /* packed 16-bit floats in 12 bits; see below */
} fk_layout;

/* Rows of a packed group. A matrix has rows / FK_GROUP groups; the rows that are left over follow in native form.
 *
 * A packed group takes the bytes that its rows took. Block by block it holds the fields of its rows' blocks in the order in
 * which the format has them, each field interleaved element by element: element i of row r lies at index 16 i + r of the
 * field. Elements are half-precision numbers of 2 bytes, packed scales of 1 byte, and codes (and the bits that belong to
 * them) in words of 4 bytes, so that a line of 64 bytes holds the same four columns of 16 rows. A block of the types of
 * plain floats is one value: column by column, 16 rows each.
 *
 * Q8_1, MXFP4, TQ1_0, TQ2_0 and the types IQ1, IQ2 and IQ3 come in native rows only, which are decoded before they are
 * multiplied. */
#define FK_GROUP 16

/* Sparse weights are of the types F16, BF16, Q8_0, Q4_0, Q4_1, IQ4_NL and Q4_K. A weight that was removed is 0, in types with
 * a minimum too. All rows lie in groups; what the last group has beyond the last row is empty.
 *
 * The bytes begin with an index: for each group, and once more for the end of the last, the number of bytes from the beginning
 * of the bytes, 8 bytes each, little-endian. Zeros follow up to a multiple of 64. Every group begins at a multiple of 64, with
 * zeros before it. Behind the last are FK_SPARSE_TAIL zeros, which vector units may read and the last block cannot outgrow.
 *
 * A group is block by block: the fields of a packed group's block but for codes; then for each 32 columns the masks of eight
 * lines of 64 weights, 8 bytes each, little-endian; then the values of the weights whose bits are set, line after line. Bit
 * 4 r + i of the mask of line j is column 4 j + i of row r, as in a packed line. 8-bit codes take a byte each. Of 4-bit codes,
 * those of columns 0 to 15 are in the low halves of bytes, those of columns 16 to 31 in the high halves, each in their order from
 * the first byte on: as many bytes as the longer half has codes. Codes of Q4_0 are stored exclusive-or 8, so that what is not
 * there, 0, stands for a weight of 0. Plain floats count as blocks of 32 columns without fields, the last of which may have
 * fewer; bit 16 i + r of the mask of line j is column 4 j + i of row r, and values take 2 bytes each. docs/format.md has more. */
#define FK_SPARSE_TAIL 1152

/* Narrow weights are F16 or BF16 weights without loss in 12 bits each. They suit models that were trained in bfloat16: nearly all weights
 * of these are bfloat16 numbers between 2^-15 and 2, also where a file has them in F16. Such numbers differ only in the sign, four bits
 * of the exponent and seven of the fraction. Rows lie in groups, behind an index and before a tail, as those of sparse weights do.
 *
 * A group has, in this order:
 *   Columns in eights, as far as columns fill blocks of 32. Eight columns are three lines of 64 bytes, and a line is a word of 4 bytes
 *   for each of 16 rows, little-endian. Line j = 0, 1, 2 has column 2 j in the lower halves of its words and column 2 j + 1 in the
 *   upper halves. Bit 15 of a half is the sign, bits 0 to 10 are bits 0 to 10 of the number in bfloat16; that number's bits 11 to 14 are
 *   1, 1, 1, 0 and not stored. In their place the halves have the bits of columns 6 and 7: lines 0 and 1 bits 0 to 3 and 4 to 7, line 2
 *   bits 8 to 10 and the sign.
 *   The columns that fill no block, as packed ones.
 *   A list of those numbers in blocks that are not such numbers; where they belong, the block has 2^-15 in their stead. First how many,
 *   in 4 bytes, and four zeros; then for each, ordered by columns: the column, the row of the group, the number in the type of the
 *   weights, and zeros, 2 bytes each.
 *   Zeros up to a multiple of 64.
 *
 * Rows have at most FK_NARROW_COLS columns. */
#define FK_NARROW_COLS 65536

typedef enum fk_isa {
    FK_ISA_GENERIC = 0,
    FK_ISA_AVX2 = 1,         /* AVX2, FMA, F16C */
    FK_ISA_AVX_VNNI = 2,     /* the same and AVX-VNNI, without AVX-512 */
    FK_ISA_AVX512 = 3,       /* AVX-512 F, BW, DQ, VL */
    FK_ISA_AVX512_VNNI = 4,  /* the same and VNNI */
    FK_ISA_AVX512_BF16 = 5,  /* these, BF16, VBMI and VBMI2 */
    FK_ISA_AMX = 6,          /* these, and AMX tiles with bfloat16 products */
    FK_ISA_NEON = 7,         /* 64-bit ARM */
    FK_ISA_NEON_DOTPROD = 8, /* the same and its dot product instructions */
    FK_ISA_NEON_I8MM = 9,    /* these and its 8-bit matrix instructions */
    FK_ISA_COUNT = 10
} fk_isa;

/* Values per block of quantised activations and of the quantised weight types here. */
#define FK_BLOCK 32
/* Values per super-block of the K-quants, IQ1 to IQ3, IQ4_XS and TQ. */
#define FK_SUPER 256

/* A weight matrix W [rows, cols], row-major. */
typedef struct fk_weights {
    fk_type type;
    fk_layout layout;
    const uint8_t *data;
    size_t row_bytes; /* of native and packed rows */
    size_t rows;
    size_t cols;
    /* Of sparse and narrow weights: all bytes that begin at `data`, and the entry of the index for the group of row 0. Whatever these bytes
     * are, kernels read nothing beyond them. */
    size_t bytes;
    const uint8_t *index;
} fk_weights;

/* Rows [begin, end) of a matrix, and where their products with a token go: out[r] for row r. begin of packed, sparse and narrow
 * weights is a multiple of FK_GROUP, and so is end unless it is the last row's. */
typedef struct fk_rows {
    fk_weights weights;
    size_t begin;
    size_t end;
    float *out;
} fk_rows;

/* How the weights of one token's products are read: `streams` groups of rows side by side (1 to 6; half as many of super-blocks),
 * and whether they are asked for ahead of their use. What is fastest is a matter of the processor: some have to be asked for
 * several places at once, others see by themselves where a reader goes and are only disturbed. Results do not depend on it. */
typedef struct fk_reading {
    uint32_t streams;
    int fetches;
} fk_reading;

/* In which arithmetic a token is computed. What comes out for a token depends on its phase and on nothing else: neither on
 * how many tokens are computed together nor on which. */
typedef enum fk_phase {
    FK_PHASE_PREFILL = 0, /* tokens of a prompt: weights are decoded once for many tokens */
    FK_PHASE_DECODE = 1   /* generated tokens: weights are streamed from memory */
} fk_phase;

/* The forms in which matmul reads activations. */
typedef enum fk_form {
    FK_FORM_FLOAT = 0, /* as they are */
    FK_FORM_INT8 = 1,  /* 8 bits with a scale for each block of FK_BLOCK */
    FK_FORM_BF16 = 2   /* bfloat16 in tiles */
} fk_form;

/* Tokens and columns of a tile of bfloat16 activations, and its values. */
#define FK_TILE_TOKENS 16
#define FK_TILE_COLS 32
#define FK_TILE (FK_TILE_TOKENS * FK_TILE_COLS)

/* Activations X [tokens, cols], row-major, and their other forms, as far as fk_kernels.activation_form asks for them.
 * 8 bits: x = scale * q, with a scale for each block of FK_BLOCK values, or for each half of one, so that a large value takes
 * precision from fewer others. bfloat16: tiles of FK_TILE_TOKENS tokens by FK_TILE_COLS columns, [tiles of tokens, tiles of
 * columns, FK_TILE_TOKENS, FK_TILE_COLS]; what lies beyond X is 0. */
typedef struct fk_activations {
    fk_phase phase;
    size_t tokens;
    size_t cols;
    const float *values;     /* [tokens, cols] */
    const int8_t *quantized; /* [tokens, cols] */
    int halves;              /* whether each half of a block has a scale of its own; never where one token is generated */
    const float *scales;     /* [tokens, cols / FK_BLOCK], or for halves [tokens, cols / 16] */
    const float *scaled_sums; /* scale * sum(q), as many as there are scales */
    const int32_t *code_sums; /* [tokens, cols / 16]: sum(q) of each half of a block */
    const uint16_t *tiles;    /* on a multiple of 64 bytes */
} fk_activations;

/* Blocks of activations whose largest value is below this become 0 in 8 bits: the inverse of their scale would overflow. */
#define FK_LEAST_PEAK 1e-36f

/* Where activations in 8 bits are written, in the form of fk_activations; pointers are to the places of the first value. */
typedef struct fk_plane {
    int8_t *quantized;
    float *scales;
    float *scaled_sums;
    int32_t *code_sums;
} fk_plane;

/* Positions of a block of the KV cache. */
#define FK_KV_BLOCK 64

/* The keys and values of one KV head, as FK_TYPE_F16, or as FK_TYPE_Q8_0 if head_dim is a multiple of FK_BLOCK. They lie in
 * blocks: position p is row p % FK_KV_BLOCK of block p / FK_KV_BLOCK, whose keys [FK_KV_BLOCK, head_dim] of this head begin
 * `keys` bytes behind the beginning of the block, and whose values `values` bytes behind it. */
typedef struct fk_kv_head {
    fk_type type;
    const uint8_t *const *blocks; /* where each block begins */
    size_t keys;
    size_t values;
    size_t row_bytes;
    size_t head_dim;
} fk_kv_head;

/* The positions [begin, end) that a query sees; begin < end. */
typedef struct fk_sight {
    size_t begin;
    size_t end;
} fk_sight;

/* A factor of a product of floats: the value for place `line` of the output's rows (or columns) and place k of the sum is
 * values[line * line_stride + k * sum_stride]. One of the strides is 1. */
typedef struct fk_factor {
    const float *values;
    size_t line_stride;
    size_t sum_stride;
} fk_factor;

typedef struct fk_kernels {
    const char *name;

    /* Rows are best split at multiples of this. */
    size_t row_granule;

    /* The form that matmul reads of activations in this phase for these weights. Besides it reads `values` for the rows of
     * packed weights that fill no group. */
    fk_form (*activation_form)(const fk_weights *w, fk_phase phase);

    /* x [tokens, n] to 8 bits, into a plane of `cols` columns; both widths are multiples of FK_BLOCK. With `halves`, each half of a
     * block has a scale of its own. */
    void (*quantize)(const float *x, size_t tokens, size_t n, size_t cols, int halves, const fk_plane *to);

    /* x [tokens, cols] of at most FK_TILE_TOKENS tokens to a row of bfloat16 tiles, rounded to nearest even. */
    void (*fill_tiles)(const float *x, size_t tokens, size_t cols, uint16_t *tiles);

    /* What the mean and the variance of each column of x [tokens, cols] follow from without cancellation, tokens >= 1: near, a
     * token of x, sums of x - near, and sums of (x - near)^2; [cols] each. */
    void (*moments)(const float *x, size_t tokens, size_t cols, float *near, float *sums, float *squares);

    /* Floats of scratch that matmul needs for this matrix and so many tokens; `added` are the rows of a product that is added, else 0. */
    size_t (*matmul_scratch)(const fk_weights *w, fk_phase phase, size_t tokens, size_t added);

    /* out[t * out_stride + r] = (what is there if `add`, else 0) + W[r] . X[t] for rows r in [row_begin, row_end) and all tokens t. For
     * types in blocks cols is a multiple of the block. row_begin of weights that are not native is a multiple of FK_GROUP. */
    void (*matmul)(const fk_weights *w, size_t row_begin, size_t row_end, const fk_activations *x, int add, float *out,
                   size_t out_stride, float *scratch);

    /* As matmul for one token in the decode phase and rows of several matrices that read it in the same forms; packed rows of
     * one type are read side by side, and so are sparse and narrow ones. */
    void (*matvec)(const fk_rows *parts, size_t count, const fk_activations *x, const fk_reading *how);

    /* Floats of scratch that multiply needs. */
    size_t multiply_scratch;

    /* out[i * out_stride + j] = (what is there if `add`, else 0) + the sum over k < depth of A(i, k) B(j, k) for i < rows, j < cols: a
     * product of floats for training, summed in float, with factors rounded to bfloat16 where there are instructions for it. An
     * element's sum runs over k in an order that depends on nothing but depth. Elements j > i + reach need not be computed: of a
     * symmetric product half is enough. */
    void (*multiply)(const fk_factor *a, const fk_factor *b, size_t rows, size_t cols, size_t depth, size_t reach, int add,
                     float *out, size_t out_stride, float *scratch);

    /* Decodes n values (whole blocks) of a row. */
    void (*dequantize)(fk_type type, const uint8_t *src, size_t n, float *out);

    /* out = x / sqrt(mean(x^2) + eps) * weight; all of n values. out may be x. */
    void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *out);

    /* Rotates pairs (x[2i], x[2i + 1]) by angles given as cosines and sines, i < pairs. */
    void (*rope)(float *x, const float *cosines, const float *sines, size_t pairs);

    /* The same for pairs (x[i], x[i + pairs]). */
    void (*rope_halves)(float *x, const float *cosines, const float *sines, size_t pairs);

    /* out = silu(gate) * up, n values. out may be gate. */
    void (*silu_mul)(const float *gate, const float *up, size_t n, float *out);

    /* out = gelu(gate) * up, in the form with tanh, n values. out may be gate. */
    void (*gelu_mul)(const float *gate, const float *up, size_t n, float *out);

    /* x += y, n values. */
    void (*add)(float *x, const float *y, size_t n);

    /* To half precision, round to nearest even. */
    void (*to_half)(const float *x, size_t n, uint16_t *out);

    /* Tokens whose queries are best attended to together. */
    size_t attend_tokens;

    /* Floats of scratch that attend needs where sights end at `positions` at most. */
    size_t (*attend_scratch)(fk_phase phase, size_t queries, size_t head_dim, size_t positions);

    /* Attention of `queries` query vectors q [queries, head_dim] to one KV head; query i sees the positions sights[i]. In the
     * decode phase the queries are those of one token. scale multiplies the scores, which then become cap * tanh(score / cap)
     * unless cap is 0. Writes out [queries, head_dim] and, unless it is null, log_sums [queries]: the logarithm of the sum of e^score, by which
     * results for parts of the positions are joined. */
    void (*attend)(fk_phase phase, const float *q, size_t queries, const fk_sight *sights, const fk_kv_head *kv, float scale,
                   float cap, float *out, float *log_sums, float *scratch);
} fk_kernels;

/* The kernels for an instruction set; NULL if they were not compiled in or the processor lacks it. */
const fk_kernels *fk_kernels_for(fk_isa isa);

/* How this processor is best read from, as far as its maker tells. */
fk_reading fk_usual_reading(void);

#ifdef __cplusplus
}
#endif

#endif
