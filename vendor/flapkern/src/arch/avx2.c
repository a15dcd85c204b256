/* AVX2, FMA and F16C: laptops and desktops since about 2013. */
#define FK_VNNI 0
#define FK_TABLE fk_table_avx2
#define FK_NAME "avx2"
#include "avx2.h"
