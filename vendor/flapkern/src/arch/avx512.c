/* AVX-512 F, BW, DQ and VL: servers of 2017 and later. */
#define FK_VNNI 0
#define FK_TABLE fk_table_avx512
#define FK_NAME "avx512"
#include "avx512.h"
