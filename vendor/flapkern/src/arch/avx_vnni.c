/* AVX2 with the byte dot products of AVX-VNNI: Alder Lake and its successors, which lack AVX-512. */
#define FK_VNNI 1
#define FK_TABLE fk_table_avx_vnni
#define FK_NAME "avx-vnni"
#include "avx2.h"
