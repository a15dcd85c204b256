/* Which table fits this processor: the one place where that is decided. */
#include "flapkern.h"

extern const fk_kernels fk_table_generic;
#if defined(__x86_64__)
#include <cpuid.h>

extern const fk_kernels fk_table_avx2, fk_table_avx_vnni, fk_table_avx512, fk_table_avx512_vnni, fk_table_avx512_bf16,
    fk_table_amx;

/* Whether the processor has the extension of a bit of cpuid's leaf 7. For extensions that not every compiler has a name for;
 * those of them that use vector registers need no other support of the system than AVX or AVX-512 do. */
enum cpuid_register { EAX, EDX };

static int has_extension(unsigned subleaf, enum cpuid_register which, int bit) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx)) return 0;
    return (which == EAX ? eax : edx) >> bit & 1;
}

static int has_avx_vnni(void) { return has_extension(1, EAX, 4); }

static int has_avx512_bf16(void) { return has_extension(1, EAX, 5); }

#ifdef FK_EMULATED_AMX
static int has_amx_bf16(void) { return 1; }
#else

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives tiles only to processes that ask for them. The number of the tiles' data among the states it keeps is 18. */
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static int may_use_tiles(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }
#else
static int may_use_tiles(void) { return 0; }
#endif

static int has_amx_bf16(void) { return has_extension(0, EDX, 22) && has_extension(0, EDX, 24) && may_use_tiles(); }
#endif
#elif defined(__aarch64__)
extern const fk_kernels fk_table_neon, fk_table_neon_dotprod, fk_table_neon_i8mm;

/* What the processor has besides NEON: what the compiler was told to presume, and what the system says. A system that is not
 * asked here counts as one that says no. */
#if defined(__linux__)
#include <sys/auxv.h>

/* Linux's numbers; old headers lack the second. */
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1UL << 20)
#endif
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1UL << 13)
#endif

static int system_has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

static int system_has_i8mm(void) { return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int system_says(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, 0, 0) == 0 && value != 0;
}

static int system_has_dotprod(void) { return system_says("hw.optional.arm.FEAT_DotProd"); }

static int system_has_i8mm(void) { return system_says("hw.optional.arm.FEAT_I8MM"); }
#else
static int system_has_dotprod(void) { return 0; }

static int system_has_i8mm(void) { return 0; }
#endif

#ifdef __ARM_FEATURE_DOTPROD
#define PRESUME_DOTPROD 1
#else
#define PRESUME_DOTPROD 0
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#define PRESUME_I8MM 1
#else
#define PRESUME_I8MM 0
#endif
#endif

const fk_kernels *fk_kernels_for(fk_isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    int bf16 = vnni && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2") && has_avx512_bf16();
#elif defined(__aarch64__)
    int dotprod = PRESUME_DOTPROD || system_has_dotprod();
    int i8mm = dotprod && (PRESUME_I8MM || system_has_i8mm());
#endif
    switch (isa) {
    case FK_ISA_GENERIC:
        return &fk_table_generic;
#if defined(__x86_64__)
    case FK_ISA_AVX2:
        return avx2 ? &fk_table_avx2 : 0;
    case FK_ISA_AVX_VNNI:
        return avx2 && has_avx_vnni() ? &fk_table_avx_vnni : 0;
    case FK_ISA_AVX512:
        return avx512 ? &fk_table_avx512 : 0;
    case FK_ISA_AVX512_VNNI:
        return vnni ? &fk_table_avx512_vnni : 0;
    case FK_ISA_AVX512_BF16:
        return bf16 ? &fk_table_avx512_bf16 : 0;
    case FK_ISA_AMX:
        return bf16 && has_amx_bf16() ? &fk_table_amx : 0;
#elif defined(__aarch64__)
    case FK_ISA_NEON:
        return &fk_table_neon;
    case FK_ISA_NEON_DOTPROD:
        return dotprod ? &fk_table_neon_dotprod : 0;
    case FK_ISA_NEON_I8MM:
        return i8mm ? &fk_table_neon_i8mm : 0;
#endif
    default:
        return 0;
    }
}

/* Measured on Intel's Sapphire Rapids and on AMD's Zen 4 (docs/speed.md); others are taken to want to be asked. */
fk_reading fk_usual_reading(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return (fk_reading){2, 0};
#endif
    return (fk_reading){6, 1};
}
