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
#include "../formats.h"
#include "../half.h"

#include "native.h"
#include "packed.h"
#include "packed_floats.h"
#include "panels.h"
#include "activations.h"
#if FK_BF16
#include "tiled.h"
#endif
#include "matmul.h"
#include "elementwise.h"
#include "moments.h"
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
