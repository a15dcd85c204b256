/* The table of one instruction set's kernels, from operations whose source is the same for all. An instruction set's file in
 * arch/ includes this last. */
#include "flapkern.h"
#include "../arch/contract.h"
#include "../formats.h"
#include "../half.h"

#include "native.h"
#include "indexed.h"
#include "packed.h"
#include "packed_floats.h"
#include "narrow.h"
#include "expand.h"
#include "sparse.h"
#include "panels.h"
#include "activations.h"
#if FK_BF16
#include "tiled.h"
#endif
#include "matmul.h"
#include "multiply.h"
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
    .multiply_scratch = MULTIPLY_SCRATCH,
    .multiply = multiply,
    .dequantize = dequantize,
    .rms_norm = rms_norm,
    .rope = rope,
    .rope_halves = rope_halves,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .add = add,
    .to_half = to_half,
    .attend_tokens = ATTEND_TOKENS,
    .attend_scratch = attend_scratch,
    .attend = attend,
};
