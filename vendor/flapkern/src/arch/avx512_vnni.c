/* AVX-512 with the byte dot products of VNNI: Ice Lake, Zen 4 and later. */
#define FK_VNNI 1
#define FK_TABLE fk_table_avx512_vnni
#define FK_NAME "avx512-vnni"
#include "avx512.h"
