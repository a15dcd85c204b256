/* AVX-512 with VNNI, BF16, VBMI and VBMI2: Zen 4, and Sapphire Rapids without its tiles. */
#define FK_VNNI 1
#define FK_BF16 1
#define FK_TABLE fk_table_avx512_bf16
#define FK_NAME "avx512-bf16"
#include "avx512.h"
