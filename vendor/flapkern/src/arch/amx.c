/* AVX-512 with VNNI, BF16, VBMI, VBMI2 and AMX tiles of bfloat16: Sapphire Rapids and later. */
#define FK_VNNI 1
#define FK_BF16 1
#define FK_AMX 1
#define FK_TABLE fk_table_amx
#define FK_NAME "amx"
#ifdef FK_EMULATED_AMX
#include "emulated_amx.h"
#endif
#include "avx512.h"
