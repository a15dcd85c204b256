/* Which table fits this processor: the one place where that is decided. */
#include "flapkern.h"

extern const fk_kernels fk_table_generic;
#if defined(__x86_64__)
extern const fk_kernels fk_table_avx2, fk_table_avx512, fk_table_avx512_vnni;
#endif

const fk_kernels *fk_kernels_for(fk_isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    switch (isa) {
    case FK_ISA_GENERIC:
        return &fk_table_generic;
#if defined(__x86_64__)
    case FK_ISA_AVX2:
        return avx2 ? &fk_table_avx2 : 0;
    case FK_ISA_AVX512:
        return avx512 ? &fk_table_avx512 : 0;
    case FK_ISA_AVX512_VNNI:
        return avx512 && __builtin_cpu_supports("avx512vnni") ? &fk_table_avx512_vnni : 0;
#endif
    default:
        return 0;
    }
}
