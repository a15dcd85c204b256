/* Vectors of FK_LANES numbers in terms of the compiler's vector extension, so that all instruction sets share one source. The
 * file that includes this defines FK_LANES before. */
#ifndef FK_LANES
#error "define FK_LANES"
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Floats, signed and unsigned integers of 32 bits, as many shorts, as many bytes, and four bytes for each lane. */
typedef float vf __attribute__((vector_size(FK_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(FK_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(FK_LANES * 4)));
typedef uint16_t vs __attribute__((vector_size(FK_LANES * 2)));
typedef int8_t vb __attribute__((vector_size(FK_LANES)));
typedef uint8_t vw __attribute__((vector_size(4 * FK_LANES)));

typedef uint8_t sixteen_bytes __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* The first address from p on that is a multiple of 64. */
INLINE float *aligned(float *p) { return (float *)(((uintptr_t)p + 63) / 64 * 64); }

/* Fewer than FK_LANES values as a vector, the rest 0. */
INLINE vf load_some(const float *p, size_t n) {
    float lane[FK_LANES] = {0};
    memcpy(lane, p, n * sizeof *p);
    return load(lane);
}

/* Stores the first n of FK_LANES values. */
INLINE void store_some(float *p, vf v, size_t n) {
    float lane[FK_LANES];
    store(lane, v);
    memcpy(p, lane, n * sizeof *p);
}

INLINE vf splat(float x) { return x - (vf){0}; }

/* a in the lanes where `mask` is all ones, b where it is 0. */
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }

INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* Conversions between lanes and smaller numbers in memory. Compilers make poor code of these, so that a file whose instruction
 * set has instructions for them defines FK_OWN_WIDTHS and all four functions. */
#ifndef FK_OWN_WIDTHS
INLINE vi widen_bytes(const uint8_t *p) {
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vi) & 255;
}

INLINE vi widen_signed(const uint8_t *p) {
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vi);
}

INLINE vi widen_shorts(const void *p) {
    vs shorts;
    memcpy(&shorts, p, sizeof shorts);
    return __builtin_convertvector(shorts, vi);
}

INLINE void narrow_to_bytes(int8_t *p, vi v) {
    vb bytes = __builtin_convertvector(v, vb);
    memcpy(p, &bytes, sizeof bytes);
}
#endif

/* Sums and maxima over all lanes. A file whose instruction set has better ones defines FK_OWN_REDUCTIONS and all four. */
#ifndef FK_OWN_REDUCTIONS
INLINE float sum_lanes(vf v) {
    float lane[FK_LANES];
    store(lane, v);
    for (int width = FK_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

INLINE int32_t sum_ints(vi v) {
    int32_t sum = 0;
    for (int i = 0; i < FK_LANES; i++) sum += v[i];
    return sum;
}

INLINE float max_lane(vf v) {
    float lane[FK_LANES];
    store(lane, v);
    for (int width = FK_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

/* The float whose bits are the greatest of the lanes, compared as integers. */
INLINE float max_bits(vi v) {
    int32_t lane[FK_LANES];
    memcpy(lane, &v, sizeof lane);
    for (int width = FK_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    float f;
    memcpy(&f, lane, sizeof f);
    return f;
}
#endif

/* A vector of the sums of FK_LANES vectors, in their order. A file whose instruction set can add them up together defines
 * FK_OWN_SUM_EACH and this function. */
#ifndef FK_OWN_SUM_EACH
INLINE vf sum_each(const vf *v) {
    vf sums = {0};
    for (int i = 0; i < FK_LANES; i++) sums[i] = sum_lanes(v[i]);
    return sums;
}
#endif

/* In place: lane j of vector i becomes lane i of vector j. A file whose instruction set shuffles lanes defines FK_OWN_TRANSPOSE and
 * this function. */
#ifndef FK_OWN_TRANSPOSE
INLINE void transpose(vf v[FK_LANES]) {
    float lane[FK_LANES][FK_LANES];
    memcpy(lane, v, sizeof lane);
    for (int i = 0; i < FK_LANES; i++)
        for (int j = 0; j < FK_LANES; j++) v[i][j] = lane[j][i];
}
#endif

/* 1.5 * 2^23. The sum of this and a float |x| < 2^22 has the integer nearest to x, ties to even, in its low bits. */
#define ROUNDER 12582912.0f

INLINE vi round_to_int(vf x) { return (vi)(x + ROUNDER) - (vi)splat(ROUNDER); }

/* e^x to about 2 units in the last place: x is k ln 2 + r with |r| <= ln 2 / 2, and e^r a polynomial. The result is 0 below
 * -87.3 and infinite above 88.7; NaN stays NaN. A file whose instruction set scales by powers of two defines FK_OWN_EXP and
 * this function. */
#ifndef FK_OWN_EXP
INLINE vf vexp(vf x) {
    vf clamped = pick(x < -87.3f, splat(-87.3f), pick(x > 88.7f, splat(88.7f), x));
    vi k = round_to_int(clamped * 1.44269504f);
    vf n = __builtin_convertvector(k, vf);
    vf r = clamped - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    /* The Taylor series up to r^7 / 7!: its next term is below 2^-24 on this interval. */
    vf p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* 2^k in two steps, since k may be 128. */
    vi half = k >> 1;
    vf scaled = p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
    scaled = pick(x < -87.3f, splat(0.0f), scaled);
    scaled = pick(x > 88.7f, splat(INFINITY), scaled);
    return pick(x == x, scaled, x);
}
#endif
