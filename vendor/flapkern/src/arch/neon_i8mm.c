/* NEON with dot products and 8-bit matrix instructions: Cortex-A510 and A710, Neoverse V1, Apple M2 and later. */
#define FK_DOTPROD 1
#define FK_I8MM 1
#define FK_TABLE fk_table_neon_i8mm
#define FK_NAME "neon-i8mm"
#include "neon.h"
