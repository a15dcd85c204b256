/* NEON with dot products of bytes: Cortex-A55 and A76, Neoverse N1, Apple M1 and later. */
#define FK_DOTPROD 1
#define FK_I8MM 0
#define FK_TABLE fk_table_neon_dotprod
#define FK_NAME "neon-dotprod"
#include "neon.h"
