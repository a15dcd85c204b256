/* NEON alone: the Cortex-A53, A57, A72 and their like. */
#define FK_DOTPROD 0
#define FK_I8MM 0
#define FK_TABLE fk_table_neon
#define FK_NAME "neon"
#include "neon.h"
