/* Every kernel of every instruction set that this processor has against plain code in double precision, on pseudo-random
 * data. It needs nothing but the library and POSIX, so that it runs where Rust's tests do not, under an emulator for one.
 *
 * usage: check [name...]    with names, these tables and no others must be on offer
 *
 * Prints a line for each table; exits with 1 if anything failed. Every buffer ends where a page without access begins: a
 * kernel that reads or writes beyond one does not live to tell. */
#define _GNU_SOURCE
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../src/formats.h"

#define COUNT(A) (sizeof(A) / sizeof *(A))

/* ---- memory ---- */

static struct area {
    void *map;
    size_t bytes;
} areas[64];
static size_t area_count;

/* `bytes` bytes that end `gap` bytes before the forbidden page, filled with 0xaa. */
static void *guarded(size_t bytes, size_t gap) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t room = (bytes + gap + page - 1) / page * page;
    char *map = mmap(0, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map + room, page, PROT_NONE) != 0 || area_count == COUNT(areas)) {
        fprintf(stderr, "no memory for the test\n");
        exit(2);
    }
    memset(map, 0xaa, room);
    areas[area_count++] = (struct area){map, room + page};
    return map + room - bytes - gap;
}

static float *floats(size_t n) { return guarded(n * sizeof(float), 0); }

/* Frees what was taken since `mark`, a former area_count. */
static void release(size_t mark) {
    while (area_count > mark) {
        area_count--;
        munmap(areas[area_count].map, areas[area_count].bytes);
    }
}

/* ---- pseudo-random numbers: splitmix64 ---- */

static uint64_t random_state = 1;

static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static size_t random_below(size_t n) { return (size_t)(random_bits() % n); }

static float random_in(float low, float high) {
    return low + (high - low) * (float)(random_bits() >> 40) * 0x1p-24f;
}

/* Bell-shaped enough. */
static float random_normal(void) {
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += random_in(-1, 1);
    return sum * 0.87f;
}

static void fill_normal(float *x, size_t n, float size) {
    for (size_t i = 0; i < n; i++) x[i] = size * random_normal();
}

/* ---- number formats by their definitions ---- */

static uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static float of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint16_t u16_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static void put_u16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static double half_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 0x3ff;
    double magnitude = exponent == 31  ? fraction ? NAN : INFINITY
                       : exponent == 0 ? ldexp(fraction, -24)
                                       : ldexp(1024 + fraction, exponent - 25);
    return h >> 15 ? -magnitude : magnitude;
}

/* The nearest half-precision number, of two the even one. */
static uint16_t half_of(float f) {
    uint16_t sign = (uint16_t)(bits_of(f) >> 16 & 0x8000);
    double magnitude = fabs((double)f);
    if (isnan(f)) return 0x7e00;
    if (magnitude >= 65520) return sign | 0x7c00;
    int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    /* In units of the last place: 1024 and more is normal, and 2048 carries into the exponent by itself. */
    int units = (int)rint(ldexp(magnitude, 10 - exponent));
    return (uint16_t)(sign + (exponent + 14) * 1024 + units);
}

/* A run of equal elements in a block: bytes of each, and how many. */
struct field {
    size_t size, count;
};

struct format {
    fk_type type;
    const char *name;
    size_t values;          /* of a block */
    struct field fields[5]; /* of a block, in the order of its bytes */
};

/* Elements of two bytes are numbers in half precision, but for the second of IQ4_XS, which holds bits of scales. */
static const struct format formats[] = {
    {FK_TYPE_F32, "f32", 1, {{4, 1}}},
    {FK_TYPE_F16, "f16", 1, {{2, 1}}},
    {FK_TYPE_BF16, "bf16", 1, {{2, 1}}},
    {FK_TYPE_Q8_0, "q8_0", 32, {{2, 1}, {4, 8}}},
    {FK_TYPE_Q4_0, "q4_0", 32, {{2, 1}, {4, 4}}},
    {FK_TYPE_Q4_1, "q4_1", 32, {{2, 2}, {4, 4}}},
    {FK_TYPE_Q5_0, "q5_0", 32, {{2, 1}, {4, 1}, {4, 4}}},
    {FK_TYPE_Q5_1, "q5_1", 32, {{2, 2}, {4, 1}, {4, 4}}},
    {FK_TYPE_Q2_K, "q2_k", 256, {{1, 16}, {4, 16}, {2, 2}}},
    {FK_TYPE_Q3_K, "q3_k", 256, {{4, 8}, {4, 16}, {1, 12}, {2, 1}}},
    {FK_TYPE_Q4_K, "q4_k", 256, {{2, 2}, {1, 12}, {4, 32}}},
    {FK_TYPE_Q5_K, "q5_k", 256, {{2, 2}, {1, 12}, {4, 8}, {4, 32}}},
    {FK_TYPE_Q6_K, "q6_k", 256, {{4, 32}, {4, 16}, {1, 16}, {2, 1}}},
    {FK_TYPE_IQ4_NL, "iq4_nl", 32, {{2, 1}, {4, 4}}},
    {FK_TYPE_IQ4_XS, "iq4_xs", 256, {{2, 1}, {2, 1}, {1, 4}, {4, 32}}},
};

#define AND_ONE(...) +1
_Static_assert(COUNT(formats) == 0 FK_FLOAT_TYPES(AND_ONE) FK_BLOCK_TYPES(AND_ONE), "every type has its format here");

static size_t bytes_of(const struct format *f) {
    size_t bytes = 0;
    for (int i = 0; i < 5; i++) bytes += f->fields[i].size * f->fields[i].count;
    return bytes;
}

static int is_blocked(const struct format *f) { return f->values > 1; }

static size_t row_bytes(const struct format *f, size_t cols) { return cols / f->values * bytes_of(f); }

/* Value i of a row. `size` receives the sum of the sizes of what it is added up from, which rounding errors are in
 * proportion to. */
static double decode(const struct format *f, const uint8_t *row, size_t i, double *size) {
    const uint8_t *block = row + i / f->values * bytes_of(f);
    size_t at = i % f->values;
    if (!is_blocked(f)) {
        uint32_t low = u16_at(block);
        double value = f->type == FK_TYPE_F16    ? half_value((uint16_t)low)
                       : f->type == FK_TYPE_BF16 ? of_bits(low << 16)
                                                 : of_bits(low | (uint32_t)u16_at(block + 2) << 16);
        *size = fabs(value);
        return value;
    }
    double scale = half_value(u16_at(block)), code, offset = 0;
    const uint8_t *codes = block + 2 * f->fields[0].count;
    switch (f->type) {
    case FK_TYPE_Q5_0:
    case FK_TYPE_Q5_1:
    case FK_TYPE_Q2_K:
    case FK_TYPE_Q3_K:
    case FK_TYPE_Q4_K:
    case FK_TYPE_Q5_K:
    case FK_TYPE_Q6_K:
    case FK_TYPE_IQ4_NL:
    case FK_TYPE_IQ4_XS: {
        /* The library's scalar decoding, which the Rust tests hold against definitions of their own. */
        static const uint8_t *last;
        static size_t next;
        static float all[FK_SUPER], largest;
        /* Once for values asked for in their order. */
        if (block != last || at != next || at == 0) {
            decode_block(f->type, block, all);
            largest = 0;
            for (size_t k = 0; k < f->values; k++) largest = fmaxf(largest, fabsf(all[k]));
        }
        last = block;
        next = at + 1;
        *size = largest;
        return all[at];
    }
    case FK_TYPE_Q8_0: code = codes[at] < 128 ? codes[at] : codes[at] - 256; break;
    default:
        code = at < 16 ? codes[at] & 15 : codes[at - 16] >> 4;
        offset = f->type == FK_TYPE_Q4_0 ? -8 * scale : half_value(u16_at(block + 2));
    }
    *size = fabs(scale * code) + fabs(offset);
    return scale * code + offset;
}

static uint16_t random_half(float low, float high) { return half_of(random_in(low, high)); }

/* A row of moderate numbers; blocks of zeros and negative and denormal scales among them. */
static void random_row(const struct format *f, uint8_t *row, size_t cols) {
    for (size_t b = 0; b < cols / f->values; b++, row += bytes_of(f)) {
        float v = random_normal();
        switch (f->type) {
        case FK_TYPE_F32: memcpy(row, &v, 4); continue;
        case FK_TYPE_F16: put_u16(row, half_of(v)); continue;
        case FK_TYPE_BF16: put_u16(row, (uint16_t)(bits_of(v) >> 16)); continue;
        default: break;
        }
        for (size_t i = 0; i < bytes_of(f); i++) row[i] = (uint8_t)random_bits();
        size_t at = 0;
        for (int i = 0; i < 5; at += f->fields[i].size * f->fields[i].count, i++)
            for (size_t k = 0; f->fields[i].size == 2 && k < f->fields[i].count; k++) {
                if (f->type == FK_TYPE_IQ4_XS && i == 1) continue;
                int tiny = f->values == FK_BLOCK && random_below(8) == 0;
                put_u16(row + at + 2 * k, tiny ? (uint16_t)random_below(0x400) : random_half(-0.1f, 0.1f));
            }
        if (random_below(16) == 0) memset(row, 0, bytes_of(f));
    }
}

/* Whole groups to the packed layout, as the header describes it; rows that are left over stay. */
static void pack(const struct format *f, size_t rows, size_t cols, const uint8_t *native, uint8_t *packed) {
    const size_t stride = row_bytes(f, cols), grouped = rows / FK_GROUP * FK_GROUP;
    uint8_t *to = packed;
    for (size_t group = 0; group < grouped; group += FK_GROUP)
        for (size_t b = 0; b < cols / f->values; b++) {
            const uint8_t *from = native + group * stride + b * bytes_of(f);
            for (int i = 0; i < 5; from += f->fields[i].size * f->fields[i].count, i++)
                for (size_t k = 0; k < f->fields[i].count; k++)
                    for (size_t r = 0; r < FK_GROUP; r++, to += f->fields[i].size)
                        memcpy(to, from + r * stride + k * f->fields[i].size, f->fields[i].size);
        }
    memcpy(to, native + grouped * stride, (rows - grouped) * stride);
}

/* ---- sparse weights, as the header describes them ---- */

static int has_sparse(const struct format *f) {
#define OR_IS(TYPE) || f->type == FK_TYPE_##TYPE
    return 0 FK_SPARSE_BLOCK_TYPES(OR_IS) FK_SPARSE_FLOAT_TYPES(OR_IS);
}

/* Bytes of a block before its codes. */
static size_t field_bytes(const struct format *f) {
    return !is_blocked(f) ? 0 : bytes_of(f) - f->values / (f->type == FK_TYPE_Q8_0 ? 1 : 2);
}

/* The stored code of value i of a row in blocks. */
static uint8_t code_at(const struct format *f, const uint8_t *row, size_t i) {
    const uint8_t *block = row + i / f->values * bytes_of(f), *codes = block + field_bytes(f);
    const size_t part = i % f->values / FK_BLOCK, at = i % FK_BLOCK;
    switch (f->type) {
    case FK_TYPE_Q8_0: return codes[at];
    case FK_TYPE_Q4_K: return codes[part / 2 * FK_BLOCK + at] >> (4 * (part % 2)) & 15;
    default: return (at < 16 ? codes[at] & 15 : codes[at - 16] >> 4) ^ (f->type == FK_TYPE_Q4_0 ? 8 : 0);
    }
}

static uint8_t *put_u64(uint8_t *p, uint64_t v) {
    for (int i = 0; i < 8; i++) *p++ = (uint8_t)(v >> (8 * i));
    return p;
}

static uint8_t *put_zeros(const uint8_t *from, uint8_t *to) {
    while ((size_t)(to - from) % 64 != 0) *to++ = 0;
    return to;
}

/* Whether value c of row r stays: keep [rows, cols], one byte each. What lies beyond the matrix does not. */
struct kept {
    const uint8_t *keep;
    size_t rows, cols;
};

static int stays(const struct kept *k, size_t r, size_t c) {
    return r < k->rows && c < k->cols && k->keep[r * k->cols + c];
}

/* 32 columns from k on of the group of row `group`. */
static uint8_t *put_part(const struct format *f, const uint8_t *native, const struct kept *kept, size_t group, size_t k,
                         uint8_t *to) {
    const size_t stride = row_bytes(f, kept->cols);
    const int floats = !is_blocked(f);
    uint8_t *values = to + 64, *half[2] = {values, values};
    if (!floats && f->type != FK_TYPE_Q8_0) memset(values, 0, FK_GROUP * FK_BLOCK / 2);
    for (size_t line = 0; line < 8; line++) {
        uint64_t mask = 0;
        for (size_t bit = 0; bit < 64; bit++) {
            const size_t r = group + (floats ? bit % 16 : bit / 4), c = k + 4 * line + (floats ? bit / 16 : bit % 4);
            if (!stays(kept, r, c)) continue;
            mask |= (uint64_t)1 << bit;
            if (floats) {
                memcpy(values, native + r * stride + 2 * c, 2);
                values += 2;
            } else if (f->type == FK_TYPE_Q8_0) {
                *values++ = code_at(f, native + r * stride, c);
            } else {
                *half[line / 4]++ |= (uint8_t)(code_at(f, native + r * stride, c) << (line < 4 ? 0 : 4));
            }
        }
        to = put_u64(to, mask);
    }
    if (floats || f->type == FK_TYPE_Q8_0) return values;
    return half[0] > half[1] ? half[0] : half[1];
}

/* The bytes of a sparse matrix of the weights that stay. */
static uint8_t *sparse_of(const struct format *f, const uint8_t *native, const struct kept *kept, size_t *bytes) {
    const size_t groups = (kept->rows + FK_GROUP - 1) / FK_GROUP, stride = row_bytes(f, kept->cols);
    const size_t step = is_blocked(f) ? f->values : FK_BLOCK, steps = (kept->cols + step - 1) / step;
    const size_t most = 64 * (groups + 2) + groups * steps * step * FK_GROUP * 3 + FK_SPARSE_TAIL;
    uint8_t *all = malloc(most + 8 * groups), *to = put_zeros(all, all + 8 * (groups + 1));
    memset(all, 0, 8 * (groups + 1));
    for (size_t g = 0; g < groups; g++) {
        put_u64(all + 8 * g, (uint64_t)(to - all));
        for (size_t s = 0; s < steps; s++) {
            size_t at = s * bytes_of(f);
            for (int i = 0; i < 5 && at < s * bytes_of(f) + field_bytes(f); i++)
                for (size_t n = 0; n < f->fields[i].count; n++, at += f->fields[i].size)
                    for (size_t r = g * FK_GROUP; r < (g + 1) * FK_GROUP; r++, to += f->fields[i].size) {
                        memset(to, 0, f->fields[i].size);
                        if (r < kept->rows) memcpy(to, native + r * stride + at, f->fields[i].size);
                    }
            for (size_t k = s * step; k < (s + 1) * step; k += FK_BLOCK)
                to = put_part(f, native, kept, g * FK_GROUP, k, to);
        }
        to = put_zeros(all, to);
    }
    put_u64(all + 8 * groups, (uint64_t)(to - all));
    memset(to, 0, FK_SPARSE_TAIL);
    *bytes = (size_t)(to - all) + FK_SPARSE_TAIL;
    uint8_t *out = guarded(*bytes, 0);
    memcpy(out, all, *bytes);
    free(all);
    return out;
}

/* ---- narrow weights, as the header describes them ---- */

static int has_narrow(const struct format *f) { return f->type == FK_TYPE_F16 || f->type == FK_TYPE_BF16; }

static uint16_t number_at(const uint8_t *native, size_t rows, size_t cols, size_t r, size_t c) {
    const uint8_t *p = native + 2 * (r * cols + c);
    return r < rows ? (uint16_t)(p[0] | p[1] << 8) : 0;
}

/* The number in bfloat16, if narrow weights have it in its block; 0 if they list it. */
static uint16_t narrow_number(const struct format *f, uint16_t number) {
    if (f->type == FK_TYPE_BF16) return (number & 0x7800) == 0x3800 ? number : 0;
    const double value = half_value(number), size = fabs(value);
    if (!(size >= 0x1p-15 && size < 2)) return 0;
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return bits & 0xffff ? 0 : (uint16_t)(bits >> 16);
}

/* Changes most numbers of a matrix to such as need not be listed. */
static void make_narrow(const struct format *f, uint8_t *native, size_t rows, size_t cols) {
    const size_t some = random_below(3) == 0 ? 3 : 100;
    for (size_t i = 0; i < rows * cols; i++) {
        uint16_t number = number_at(native, rows, cols, i / cols, i % cols);
        if (random_below(some) == 0) continue;
        if (random_below(50) == 0)
            /* Below the smallest normal number of F16, and of eight digits all the same. */
            number = f->type == FK_TYPE_F16 ? (number & 0x81fc) | 0x200 : (number & 0x807f) | 0x3800;
        else
            number = f->type == FK_TYPE_F16 ? (number & 0xb7f8) | 0x0400 : (number & 0x87ff) | 0x3800;
        put_u16(native + 2 * i, number);
    }
}

static uint8_t *narrow_of(const struct format *f, const uint8_t *native, size_t rows, size_t cols, size_t *bytes) {
    const size_t groups = (rows + FK_GROUP - 1) / FK_GROUP, in_blocks = cols / 32 * 32;
    uint8_t *all = calloc(1, 64 * (groups + 2) + groups * (64 + 32 * cols + 8 * 16 * cols) + FK_SPARSE_TAIL + 8 * groups);
    uint8_t *to = put_zeros(all, all + 8 * (groups + 1));
    for (size_t g = 0; g < groups; g++) {
        put_u64(all + 8 * g, (uint64_t)(to - all));
        uint8_t *others = to + in_blocks / 8 * 192 + (cols - in_blocks) * 32, *next = others + 8;
        uint32_t count = 0;
        for (size_t c = 0; c < in_blocks; c++)
            for (size_t r = 0; r < FK_GROUP; r++) {
                const uint16_t number = number_at(native, rows, cols, g * FK_GROUP + r, c);
                uint16_t in_place = narrow_number(f, number);
                if (in_place == 0) {
                    in_place = 0x3800;
                    if (g * FK_GROUP + r < rows) {
                        put_u16(next, (uint16_t)c);
                        put_u16(next + 2, (uint16_t)r);
                        put_u16(next + 4, number);
                        put_u16(next + 6, 0);
                        next += 8, count++;
                    }
                }
                /* Bits to where the header says. */
                uint8_t *lines = to + c / 8 * 192;
                for (int bit = 0; bit < 16; bit++) {
                    if (bit >= 11 && bit < 15) continue;
                    size_t line = c % 8 / 2, at = (size_t)bit;
                    if (line == 3) {
                        line = bit < 4 ? 0 : bit < 8 ? 1 : 2;
                        at = bit == 15 ? 14 : 11 + (size_t)bit % 4;
                    }
                    at += 16 * (c % 2);
                    lines[64 * line + 4 * r + at / 8] |= (uint8_t)((in_place >> bit & 1) << at % 8);
                }
            }
        to += in_blocks / 8 * 192;
        for (size_t c = in_blocks; c < cols; c++)
            for (size_t r = 0; r < FK_GROUP; r++, to += 2) put_u16(to, number_at(native, rows, cols, g * FK_GROUP + r, c));
        for (int i = 0; i < 4; i++) others[i] = (uint8_t)(count >> 8 * i);
        to = put_zeros(all, next);
    }
    put_u64(all + 8 * groups, (uint64_t)(to - all));
    *bytes = (size_t)(to - all) + FK_SPARSE_TAIL;
    uint8_t *out = guarded(*bytes, 0);
    memcpy(out, all, *bytes);
    free(all);
    return out;
}

/* ---- the tables and what they got wrong ---- */

static struct table {
    const fk_kernels *kernels;
    long checks, failures;
    int printed; /* failures of this kind of check that were printed */
} tables[FK_ISA_COUNT];
static size_t table_count;

#define EACH_TABLE(T) (struct table *T = tables; T < tables + table_count; T++)

__attribute__((format(printf, 3, 4))) static int expect(struct table *t, int holds, const char *format, ...) {
    t->checks++;
    if (holds) return 1;
    t->failures++;
    if (t->printed++ < 5) {
        va_list arguments;
        va_start(arguments, format);
        printf("%s: ", t->kernels->name);
        vprintf(format, arguments);
        printf("\n");
        va_end(arguments);
    }
    return 0;
}

static int near(double got, double expected, double allowed) { return fabs(got - expected) <= allowed; }

/* ---- matrix times activations ---- */

/* The largest |x| of some values; NaN if there is one. */
static float peak_of(const float *x, size_t n) {
    float peak = 0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(x[i])) return NAN;
        peak = fmaxf(peak, fabsf(x[i]));
    }
    return peak;
}

struct inputs {
    fk_activations x;
    double *exact, *rounded; /* the values, and what is left of them in 8 bits */
};

/* Activations with their 8-bit form, by its definition, with a scale for each block or for each half. What `values` has beyond
 * whole blocks goes unquantised. */
static struct inputs inputs_in(const float *values, size_t tokens, size_t cols, int halves) {
    const size_t len = halves ? FK_BLOCK / 2 : FK_BLOCK, parts = cols / len, sums = cols / 16;
    int8_t *q = guarded(tokens * cols, 0);
    float *scales = floats(tokens * parts), *scaled_sums = floats(tokens * parts);
    int32_t *code_sums = guarded(tokens * sums * sizeof *code_sums, 0);
    struct inputs in = {{FK_PHASE_PREFILL, tokens, cols, values, q, halves, scales, scaled_sums, code_sums, 0},
                        guarded(tokens * cols * sizeof(double), 0),
                        guarded(tokens * cols * sizeof(double), 0)};
    for (size_t i = 0; i < tokens * cols; i++) in.exact[i] = values[i];
    for (size_t s = 0; s < tokens * sums; s++) code_sums[s] = 0;
    for (size_t p = 0; p < tokens * parts && cols % FK_BLOCK == 0; p++) {
        const float peak = peak_of(values + p * len, len);
        int32_t sum = 0;
        scales[p] = peak < 1e-36f ? 0 : isfinite(peak) ? peak / 127 : NAN;
        for (size_t i = p * len; i < (p + 1) * len; i++) {
            q[i] = scales[p] > 0 ? (int8_t)rint((double)values[i] * 127 / peak) : 0;
            code_sums[i / 16] += q[i];
            sum += q[i];
            in.rounded[i] = (double)scales[p] * q[i];
        }
        scaled_sums[p] = scales[p] * (float)sum;
    }
    return in;
}

static struct inputs inputs_of(const float *values, size_t tokens, size_t cols) { return inputs_in(values, tokens, cols, 0); }

/* W X and the sum of the sizes of its terms for both forms of the activations, [tokens, rows] each. Weights that do not stay are
 * 0; all stay if `kept` is null. */
struct product {
    double *value[2], *size[2];
};

static struct product product_of(const struct format *f, const uint8_t *native, size_t rows, const struct inputs *in,
                                 const struct kept *kept) {
    const size_t cols = in->x.cols, tokens = in->x.tokens;
    struct product p;
    for (int form = 0; form < 2; form++) {
        p.value[form] = guarded(tokens * rows * sizeof(double), 0);
        p.size[form] = guarded(tokens * rows * sizeof(double), 0);
    }
    double *w = guarded(cols * sizeof *w, 0), *size = guarded(cols * sizeof *size, 0);
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < cols; i++) w[i] = decode(f, native + r * row_bytes(f, cols), i, &size[i]);
        for (size_t i = 0; kept && i < cols; i++) w[i] = stays(kept, r, i) ? w[i] : 0;
        for (size_t t = 0; t < tokens; t++)
            for (int form = 0; form < 2; form++) {
                const double *x = (form ? in->rounded : in->exact) + t * cols;
                double sum = 0, sizes = 0;
                for (size_t i = 0; i < cols && !(form && !is_blocked(f)); i++) {
                    sum += w[i] * x[i];
                    sizes += size[i] * fabs(x[i]);
                }
                p.value[form][t * rows + r] = sum;
                p.size[form][t * rows + r] = sizes;
            }
    }
    return p;
}

static const char *phase_name(fk_phase phase) { return phase == FK_PHASE_PREFILL ? "prompt" : "generated"; }

static const char *layout_name(fk_layout layout) {
    switch (layout) {
    case FK_LAYOUT_PACKED: return "packed";
    case FK_LAYOUT_SPARSE: return "sparse";
    case FK_LAYOUT_NARROW: return "narrow";
    default: return "native";
    }
}

/* Columns of the output that are not the product's. */
#define MARGIN 3
#define UNTOUCHED 12345.0f

/* Calls matmul once for all rows (ends is 0) or for ranges that end at `ends` and at the last row. With `add`, products are added to
 * UNTOUCHED, which stands everywhere before. */
static float *multiply_into(const fk_kernels *k, const fk_weights *w, const fk_activations *x, const size_t *ends, size_t n, int add) {
    const size_t stride = w->rows + MARGIN;
    float *out = floats(x->tokens * stride);
    float *scratch = floats(k->matmul_scratch(w, x->phase, x->tokens, add ? w->rows : 0));
    for (size_t i = 0; i < x->tokens * stride; i++) out[i] = UNTOUCHED;
    size_t begin = 0;
    for (size_t i = 0; i <= n; i++) {
        size_t end = i < n ? ends[i] : w->rows;
        if (end <= begin || end > w->rows) continue;
        k->matmul(w, begin, end, x, add, out, stride, scratch);
        begin = end;
    }
    return out;
}

static float *multiply(const fk_kernels *k, const fk_weights *w, const fk_activations *x, const size_t *ends, size_t n) {
    return multiply_into(k, w, x, ends, n, 0);
}

/* One token by rows of several matrices at once, of which `out` has what each makes by itself. */
static void check_together(struct table *table, const struct format *f, const fk_weights *w, const fk_activations *x,
                           const float *out) {
    const float plain[] = {1, -2, 3, -4, 5, -6, 7, -8};
    float *line = floats(w->cols);
    for (size_t i = 0; i < w->cols; i++) line[i] = plain[i % COUNT(plain)];
    fk_activations both = *x;
    /* A native matrix of floats between the others: it asks for values, which are there only if x has them. */
    const fk_weights other = {FK_TYPE_F32, FK_LAYOUT_NATIVE, (const uint8_t *)line, 4 * w->cols, 1, w->cols, 0, 0};
    const size_t middle = w->rows / 2 / FK_GROUP * FK_GROUP;
    float *first = floats(w->rows), *second = floats(w->rows), *third = floats(w->rows), alone, together;
    const fk_rows parts[] = {{*w, 0, middle, first},
                             {*w, middle, w->rows, first},
                             {*w, 0, 0, second},
                             {*w, 0, w->rows, second},
                             {other, 0, both.values != 0, &together},
                             {*w, 0, w->rows, third}};
    /* The second asks for more streams than there are, the last for none. */
    const fk_reading readings[] = {{6, 1}, {99, 0}, {2, 0}, {1, 1}, {0, 0}};
    if (both.values) table->kernels->matmul(&other, 0, 1, &both, 0, &alone, 1, 0);
    for (size_t i = 0; i < COUNT(readings); i++) {
        table->kernels->matvec(parts, COUNT(parts), &both, &readings[i]);
        int same = !both.values || memcmp(&alone, &together, sizeof alone) == 0;
        for (size_t r = 0; r < w->rows; r++)
            same &= memcmp(first + r, out + r, sizeof *out) == 0 && memcmp(second + r, out + r, sizeof *out) == 0 &&
                    memcmp(third + r, out + r, sizeof *out) == 0;
        expect(table, same, "matvec %s %s: %zu x %zu in %u streams differs from matmul", f->name, layout_name(w->layout),
               w->rows, w->cols, (unsigned)readings[i].streams);
        memset(first, -1, w->rows * sizeof *first);
        memset(second, -1, w->rows * sizeof *second);
        memset(third, -1, w->rows * sizeof *third);
    }
}

/* The activations in tiles, with room for one more token behind them. */
static uint16_t *tiles_of(const fk_kernels *k, const fk_activations *x) {
    const size_t row_of_tiles = (x->cols + FK_TILE_COLS - 1) / FK_TILE_COLS * FK_TILE;
    const size_t tile_rows = (x->tokens + FK_TILE_TOKENS - 1) / FK_TILE_TOKENS;
    uint16_t *tiles = guarded((tile_rows + 1) * row_of_tiles * sizeof *tiles, 0);
    for (size_t i = 0; i < tile_rows; i++) {
        const size_t t = i * FK_TILE_TOKENS, count = x->tokens - t < FK_TILE_TOKENS ? x->tokens - t : FK_TILE_TOKENS;
        k->fill_tiles(x->values + t * x->cols, count, x->cols, tiles + i * row_of_tiles);
    }
    return tiles;
}

/* What comes out for a token is the same alone as among others, to the bit. */
static void check_each_alone(struct table *table, const struct format *f, const fk_weights *w, const fk_activations *x) {
    const size_t mark = area_count, tokens = x->tokens, stride = w->rows + MARGIN, blocks = x->cols / FK_BLOCK;
    const size_t parts = x->halves ? 2 * blocks : blocks;
    const size_t row_of_tiles = (x->cols + FK_TILE_COLS - 1) / FK_TILE_COLS * FK_TILE;
    const size_t tile_rows = (tokens + FK_TILE_TOKENS - 1) / FK_TILE_TOKENS;
    fk_activations together = *x;
    uint16_t *tiles = 0;
    if (table->kernels->activation_form(w, x->phase) == FK_FORM_BF16) {
        tiles = tiles_of(table->kernels, x);
        together.tiles = tiles;
    }
    const float *out = multiply(table->kernels, w, &together, 0, 0);
    for (size_t t = 0; t < tokens; t++) {
        const size_t inner = area_count;
        fk_activations one = *x;
        one.tokens = 1;
        one.values += t * x->cols;
        one.quantized += t * x->cols;
        one.scales += t * parts;
        one.scaled_sums += t * parts;
        one.code_sums += 2 * t * blocks;
        if (tiles) {
            one.tiles = tiles + tile_rows * row_of_tiles;
            table->kernels->fill_tiles(one.values, 1, x->cols, tiles + tile_rows * row_of_tiles);
        }
        const float *alone = multiply(table->kernels, w, &one, 0, 0);
        int same = 1;
        for (size_t r = 0; r < w->rows; r++) same &= alone[r] == out[t * stride + r] || isnan(alone[r]);
        expect(table, same, "matmul %s %s: %zu x %zu, %s token %zu of %zu differs from what it is alone", f->name,
               layout_name(w->layout), w->rows, w->cols, phase_name(x->phase), t, tokens);
        release(inner);
    }
    release(mark);
}

/* One matrix in one layout and tokens of one phase. */
static void check_product(struct table *table, const struct format *f, fk_layout layout, fk_phase phase, const uint8_t *data,
                          size_t bytes, size_t rows, const struct inputs *in, const struct product *p, const char *what) {
    const size_t mark = area_count, cols = in->x.cols, tokens = in->x.tokens, stride = rows + MARGIN;
    const fk_weights w = {f->type, layout, data, row_bytes(f, cols), rows, cols, bytes, data};
    fk_activations x = in->x;
    x.phase = phase;
    if (tokens > 1) check_each_alone(table, f, &w, &x);
    const fk_form asked = table->kernels->activation_form(&w, phase);
    /* Products in bfloat16 are for tests that know what it rounds off. */
    if (asked == FK_FORM_BF16) return;
    const int form = asked == FK_FORM_INT8;
    /* The rows that fill no packed group are native ones, which of most types are decoded and not multiplied in 8 bits. */
    const int has_dot = !x.halves && (f->type == FK_TYPE_Q8_0 || f->type == FK_TYPE_Q4_0 || f->type == FK_TYPE_Q4_1);
    const size_t decoded_from = layout == FK_LAYOUT_PACKED && !has_dot ? rows / FK_GROUP * FK_GROUP : rows;
    /* A kernel must not look at the form that it did not ask for. */
    if (form) {
        if (decoded_from == rows) x.values = 0;
    } else {
        x.quantized = 0;
        x.scales = x.scaled_sums = 0;
        x.code_sums = 0;
    }
    const float *out = multiply(table->kernels, &w, &x, 0, 0);
    int good = 1;
    for (size_t t = 0; t < tokens && good; t++) {
        for (size_t r = 0; r < rows && good; r++) {
            size_t at = t * rows + r;
            int own = r < decoded_from ? form : 0;
            double expected = p->value[own][at], allowed = 4e-6 * p->size[own][at] + 1e-37;
            float got = out[t * stride + r];
            good = isfinite(expected) ? near(got, expected, allowed) : !isfinite(got);
            expect(table, good, "matmul %s %s %s: %zu x %zu, %s token %zu of %zu, row %zu: %g for %g", what, f->name,
                   layout_name(layout), rows, cols, phase_name(phase), t, tokens, r, got, expected);
        }
        for (size_t r = rows; r < stride; r++)
            expect(table, out[t * stride + r] == UNTOUCHED, "matmul %s: writes beyond row %zu", f->name, rows);
    }
    const size_t native_ends[] = {1, 2, 7, 16, 29, 32, 50}, packed_ends[] = {16, 48};
    const float *split = layout != FK_LAYOUT_NATIVE
                             ? multiply(table->kernels, &w, &x, packed_ends, COUNT(packed_ends))
                             : multiply(table->kernels, &w, &x, native_ends, COUNT(native_ends));
    expect(table, memcmp(out, split, tokens * stride * sizeof *out) == 0 || !isfinite(p->value[form][0]),
           "matmul %s %s: %zu x %zu, %zu %s tokens: depends on how rows are split", f->name, layout_name(layout), rows,
           cols, tokens, phase_name(phase));
    const float *added = layout != FK_LAYOUT_NATIVE
                             ? multiply_into(table->kernels, &w, &x, packed_ends, COUNT(packed_ends), 1)
                             : multiply_into(table->kernels, &w, &x, native_ends, COUNT(native_ends), 1);
    for (size_t i = 0; i < tokens * stride && isfinite(p->value[form][0]); i++)
        expect(table, added[i] == UNTOUCHED + (i % stride < rows ? out[i] : 0),
               "matmul %s %s: %zu x %zu, %zu %s tokens: %g comes of adding %g to %g", f->name, layout_name(layout), rows, cols,
               tokens, phase_name(phase), added[i], out[i], UNTOUCHED);
    if (tokens == 1 && phase == FK_PHASE_DECODE) check_together(table, f, &w, &x, out);
    release(mark);
}

/* Which weights stay, in patterns that take turns: half of them, two of four, none, all, blocks and rows of none and all, few. */
static uint8_t *random_keep(size_t rows, size_t cols) {
    static size_t turn;
    uint8_t *keep = guarded(rows * cols, 0);
    const size_t pattern = turn++ % 6;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            uint8_t *k = keep + r * cols + c;
            const size_t piece = r / FK_GROUP + c / FK_BLOCK;
            switch (pattern) {
            case 0: *k = random_below(2) == 0; break;
            case 1: *k = c % 4 == 0 ? random_below(2) == 0 : c % 4 == 1 ? !k[-1] : c % 4 == 2 ? k[-2] : k[-2]; break;
            case 2: *k = 0; break;
            case 3: *k = 1; break;
            case 4: *k = r % 5 == 0 ? 0 : r % 5 == 1 ? 1 : piece % 3 == 0 ? 0 : piece % 3 == 1 ? 1 : random_below(2) == 0; break;
            default: *k = random_below(20) == 0;
            }
        }
    return keep;
}

/* The same matrix without some of its weights. */
static void check_sparse_matrix(const struct format *f, const uint8_t *native, size_t rows, const float *values, size_t tokens,
                                size_t cols, int halves, const char *what) {
    const size_t mark = area_count;
    struct inputs in = inputs_in(values, tokens, cols, halves);
    const struct kept kept = {random_keep(rows, cols), rows, cols};
    struct product p = product_of(f, native, rows, &in, &kept);
    size_t bytes;
    const uint8_t *sparse = sparse_of(f, native, &kept, &bytes);
    for EACH_TABLE (table)
        for (int phase = FK_PHASE_PREFILL; phase <= (halves ? FK_PHASE_PREFILL : FK_PHASE_DECODE); phase++)
            check_product(table, f, FK_LAYOUT_SPARSE, (fk_phase)phase, sparse, bytes, rows, &in, &p, what);
    release(mark);
}

/* The same matrix with numbers of which most need not be listed. Prompts make of it what they make of it packed, to the bit, where all rows are
 * in groups; a generated token adds what is listed at the end. */
static void check_narrow_matrix(const struct format *f, const uint8_t *native, size_t rows, const float *values, size_t tokens,
                                size_t cols, const char *what) {
    const size_t mark = area_count, all = rows * row_bytes(f, cols), stride = rows + MARGIN;
    uint8_t *these = guarded(all, 0), *packed = guarded(all, tokens % 2);
    memcpy(these, native, all);
    make_narrow(f, these, rows, cols);
    pack(f, rows, cols, these, packed);
    struct inputs in = inputs_in(values, tokens, cols, 0);
    struct product p = product_of(f, these, rows, &in, 0);
    size_t bytes;
    const uint8_t *narrow = narrow_of(f, these, rows, cols, &bytes);
    const fk_weights as_packed = {f->type, FK_LAYOUT_PACKED, packed, row_bytes(f, cols), rows, cols, all, packed};
    const fk_weights as_narrow = {f->type, FK_LAYOUT_NARROW, narrow, row_bytes(f, cols), rows, cols, bytes, narrow};
    for EACH_TABLE (table) {
        for (int phase = FK_PHASE_PREFILL; phase <= FK_PHASE_DECODE; phase++)
            check_product(table, f, FK_LAYOUT_NARROW, (fk_phase)phase, narrow, bytes, rows, &in, &p, what);
        const size_t inner = area_count;
        fk_activations x = in.x;
        x.phase = FK_PHASE_PREFILL;
        x.tiles = tiles_of(table->kernels, &x);
        const float *a = multiply(table->kernels, &as_packed, &x, 0, 0), *b = multiply(table->kernels, &as_narrow, &x, 0, 0);
        for (size_t t = 0; t < tokens; t++)
            expect(table,
                   memcmp(a + t * stride, b + t * stride, rows / FK_GROUP * FK_GROUP * sizeof *a) == 0 ||
                       !isfinite(p.value[0][t * rows]),
                   "matmul %s narrow: %zu x %zu, token %zu of %zu of a prompt differs from packed", f->name, rows, cols, t, tokens);
        release(inner);
    }
    release(mark);
}

/* One matrix in all of its layouts by all tables, in both phases, or in that of prompts if halves of blocks have scales. */
static void check_scales_of(const struct format *f, const uint8_t *native, size_t rows, const float *values, size_t tokens,
                            size_t cols, int halves, const char *what) {
    const size_t mark = area_count;
    struct inputs in = inputs_in(values, tokens, cols, halves);
    struct product p = product_of(f, native, rows, &in, 0);
    uint8_t *packed = guarded(rows * row_bytes(f, cols), tokens % 2);
    pack(f, rows, cols, native, packed);
    for EACH_TABLE (table)
        for (int phase = FK_PHASE_PREFILL; phase <= (halves ? FK_PHASE_PREFILL : FK_PHASE_DECODE); phase++) {
            check_product(table, f, FK_LAYOUT_NATIVE, (fk_phase)phase, native, 0, rows, &in, &p, what);
            check_product(table, f, FK_LAYOUT_PACKED, (fk_phase)phase, packed, 0, rows, &in, &p, what);
        }
    release(mark);
    if (has_sparse(f)) check_sparse_matrix(f, native, rows, values, tokens, cols, halves, what);
    if (has_narrow(f)) check_narrow_matrix(f, native, rows, values, tokens, cols, what);
}

static void check_matrix(const struct format *f, const uint8_t *native, size_t rows, const float *values, size_t tokens,
                         size_t cols, const char *what) {
    check_scales_of(f, native, rows, values, tokens, cols, 0, what);
    /* Of every second number of tokens, so as to save time. */
    if (is_blocked(f) && tokens % 2 == 1) check_scales_of(f, native, rows, values, tokens, cols, 1, what);
}

/* Widths, heights and numbers of tokens. Weights are bytes and may lie anywhere: every other matrix is at an odd address. */
static void check_products(void) {
    static const size_t blocked_cols[] = {32, 64, 96, 160, 288, 544, 1056},
                        float_cols[] = {1, 2, 3, 17, 32, 45, 64, 131, 577, 1030}, heights[] = {1, 2, 15, 16, 17, 33, 48, 70};
    for (const struct format *f = formats; f < formats + COUNT(formats); f++)
        for (size_t tokens = 1; tokens <= 33; tokens++) {
            const size_t mark = area_count;
            size_t cols = f->values == FK_SUPER ? FK_SUPER * (1 + random_below(3))
                          : is_blocked(f)       ? blocked_cols[random_below(COUNT(blocked_cols))]
                                                : float_cols[random_below(COUNT(float_cols))];
            size_t rows = heights[random_below(COUNT(heights))];
            /* The widest and highest are for few tokens, so as to save time. */
            if (tokens > 13 && rows * cols > 8192) cols = f->values == FK_SUPER ? FK_SUPER : is_blocked(f) ? 96 : 45;
            uint8_t *native = guarded(rows * row_bytes(f, cols), tokens % 2);
            for (size_t r = 0; r < rows; r++) random_row(f, native + r * row_bytes(f, cols), cols);
            float *x = floats(tokens * cols);
            fill_normal(x, tokens * cols, 1);
            for (size_t i = 0; i < cols && i < FK_BLOCK; i++) x[tokens / 2 * cols + i] = 0;
            check_matrix(f, native, rows, x, tokens, cols, "of random numbers");
            release(mark);
        }
}

/* Sparse and narrow bytes that are damaged anywhere: masks and lists that say more than there is, offsets beyond the end. Something comes
 * out, and nothing beyond the bytes is read, which would end the program. */
static void check_damaged(void) {
    enum { ROWS = 35, COLS = 256, TOKENS = 3 };
    for (const struct format *f = formats; f < formats + COUNT(formats); f++)
        for (int round = 0; round < 24 && has_sparse(f); round++) {
            const size_t mark = area_count;
            uint8_t *native = guarded(ROWS * row_bytes(f, COLS), 0);
            for (size_t r = 0; r < ROWS; r++) random_row(f, native + r * row_bytes(f, COLS), COLS);
            const struct kept kept = {random_keep(ROWS, COLS), ROWS, COLS};
            size_t bytes;
            const int narrow = has_narrow(f) && round % 2;
            if (narrow) make_narrow(f, native, ROWS, COLS);
            uint8_t *sparse = narrow ? narrow_of(f, native, ROWS, COLS, &bytes) : sparse_of(f, native, &kept, &bytes);
            const size_t from = round < 8 ? random_below(32) : random_below(bytes), rest = bytes - from;
            const size_t len = round % 4 == 0 ? 1 : round % 4 == 1 ? random_below(rest) : random_below(rest < 99 ? rest : 99);
            for (size_t i = from; i < from + len; i++) sparse[i] = round % 3 == 0 ? 0xff : (uint8_t)random_bits();
            float *x = floats(TOKENS * COLS);
            fill_normal(x, TOKENS * COLS, 1);
            const struct inputs in = inputs_of(x, TOKENS, COLS);
            uint16_t *tiles = guarded(COLS / FK_TILE_COLS * FK_TILE * sizeof *tiles, 0);
            const fk_weights w = {f->type, narrow ? FK_LAYOUT_NARROW : FK_LAYOUT_SPARSE, sparse, 0, ROWS, COLS, bytes, sparse};
            for EACH_TABLE (table)
                for (size_t tokens = 1; tokens <= TOKENS; tokens += 2)
                    for (int phase = FK_PHASE_PREFILL; phase <= FK_PHASE_DECODE; phase++) {
                        const size_t inner = area_count;
                        fk_activations some = in.x;
                        some.tokens = tokens;
                        some.phase = (fk_phase)phase;
                        table->kernels->fill_tiles(x, tokens, COLS, tiles);
                        some.tiles = tiles;
                        const float *out = multiply(table->kernels, &w, &some, 0, 0);
                        expect(table, out[ROWS] == UNTOUCHED, "matmul %s %s, damaged: writes beyond the last row", f->name,
                               layout_name(w.layout));
                        release(inner);
                    }
            release(mark);
        }
}

/* Codes and activations at the ends of their ranges, where sums of few bits would overflow. */
static void check_largest_sums(void) {
    static const uint8_t codes[] = {0x80, 0x7f, 0xff, 0x00, 0x88, 0x0f, 0xf0};
    for (const struct format *f = formats; f < formats + COUNT(formats); f++)
        for (size_t c = 0; c < COUNT(codes) && f->values == FK_BLOCK; c++)
            for (size_t tokens = 1; tokens <= 9; tokens += 4)
                for (int signs = 0; signs < 4; signs++) {
                    enum { ROWS = 17, COLS = 96 };
                    const size_t mark = area_count;
                    uint8_t *native = guarded(ROWS * row_bytes(f, COLS), 0);
                    memset(native, codes[c], ROWS * row_bytes(f, COLS));
                    for (size_t b = 0; b < ROWS * COLS / FK_BLOCK; b++)
                        for (size_t i = 0; i < f->fields[0].count; i++) put_u16(native + b * bytes_of(f) + 2 * i, 0x3c00);
                    float *x = floats(tokens * COLS);
                    for (size_t i = 0; i < tokens * COLS; i++)
                        x[i] = signs == 0 ? 1 : signs == 1 ? -1 : signs == 2 ? (i % 2 ? 1 : -1) : i % 32 < 16 ? 1 : -1;
                    check_matrix(f, native, ROWS, x, tokens, COLS, "of extreme codes");
                    release(mark);
                }
}

/* The least denormal, the largest denormal, the least normal, the largest finite scale, a negative one, zeros. */
static void check_extreme_scales(void) {
    static const uint16_t scales[] = {0x0001, 0x03ff, 0x0400, 0x7bff, 0xbc00, 0x0000, 0x8001};
    static const float sizes[] = {1e-40f, 1e-20f, 1, 1e20f};
    for (const struct format *f = formats; f < formats + COUNT(formats); f++)
        for (size_t s = 0; s < COUNT(scales) && f->values == FK_BLOCK; s++)
            for (size_t a = 0; a < COUNT(sizes); a++)
                for (size_t tokens = 1; tokens <= 12; tokens += 11) {
                    enum { ROWS = 19, COLS = 96 };
                    const size_t mark = area_count;
                    uint8_t *native = guarded(ROWS * row_bytes(f, COLS), 0);
                    for (size_t r = 0; r < ROWS; r++) random_row(f, native + r * row_bytes(f, COLS), COLS);
                    for (size_t b = 0; b < ROWS * COLS / FK_BLOCK; b++) {
                        put_u16(native + b * bytes_of(f), scales[s]);
                        if (f->fields[0].count > 1) put_u16(native + b * bytes_of(f) + 2, 0xc000);
                    }
                    float *x = floats(tokens * COLS);
                    fill_normal(x, tokens * COLS, sizes[a]);
                    check_matrix(f, native, ROWS, x, tokens, COLS, "of extreme scales");
                    release(mark);
                }
}

static void check_not_finite(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (const struct format *f = formats; f < formats + COUNT(formats); f++)
        for (size_t i = 0; i < COUNT(bad); i++)
            for (size_t tokens = 1; tokens <= 9; tokens += 8) {
                enum { ROWS = 20, COLS = 256 };
                const size_t mark = area_count;
                uint8_t *native = guarded(ROWS * row_bytes(f, COLS), 0);
                for (size_t r = 0; r < ROWS; r++) random_row(f, native + r * row_bytes(f, COLS), COLS);
                float *x = floats(tokens * COLS);
                fill_normal(x, tokens * COLS, 1);
                x[37] = bad[i];
                check_matrix(f, native, ROWS, x, tokens, COLS, "of what is not finite");
                release(mark);
            }
}

/* ---- 8-bit activations ---- */

static void check_quantize(void) {
    enum { BLOCKS = 24, N = BLOCKS * FK_BLOCK };
    static const float sizes[] = {1e-42f, 1e-37f, 0.9e-36f, 1.1e-36f, 1e-30f, 1e-3f, 1, 300, 1e30f, 3e38f};
    const size_t mark = area_count;
    float *x = floats(N);
    for (size_t i = 0; i < N; i++) {
        size_t b = i / FK_BLOCK;
        x[i] = b < COUNT(sizes) ? sizes[b] * random_in(-1, 1) : random_normal();
    }
    for (size_t i = 0; i < FK_BLOCK; i++) {
        x[10 * FK_BLOCK + i] = 0;
        x[11 * FK_BLOCK + i] = -0.0f;
        x[12 * FK_BLOCK + i] = 3;
        x[13 * FK_BLOCK + i] = -3;
        x[14 * FK_BLOCK + i] = (float)i - 16 + 0.5f; /* half-way between codes, if the peak is 127 */
    }
    x[14 * FK_BLOCK] = 127;
    x[15 * FK_BLOCK + 5] = INFINITY;
    x[16 * FK_BLOCK + 31] = -INFINITY;
    x[17 * FK_BLOCK] = NAN;
    x[18 * FK_BLOCK + 9] = of_bits(0xffc00080);
    for (size_t i = 0; i < FK_BLOCK; i++) x[19 * FK_BLOCK + i] = INFINITY;
    x[20 * FK_BLOCK + 7] = 3.4028234e38f;
    for EACH_TABLE (t) {
        const size_t inner = area_count;
        int8_t *q = guarded(N, 0);
        float *scales = floats(2 * BLOCKS), *scaled_sums = floats(2 * BLOCKS);
        int32_t *code_sums = guarded(2 * BLOCKS * sizeof *code_sums, 0);
        const fk_plane to = {q, scales, scaled_sums, code_sums};
        for (size_t parts = 1; parts <= 2; parts++) {
            const size_t len = FK_BLOCK / parts;
            t->kernels->quantize(x, 1, N, N, parts == 2, &to);
            for (size_t p = 0; p < BLOCKS * parts; p++) {
                const float peak = peak_of(x + p * len, len);
                int32_t sum = 0;
                for (size_t i = p * len; i < (p + 1) * len; i++) sum += q[i];
                if (!isfinite(peak)) {
                    expect(t, isnan(scales[p]) && isnan(scaled_sums[p]), "quantize: part %zu of %zu passes for finite", p, len);
                    continue;
                }
                const int32_t *halves = code_sums + 2 * p / parts;
                const int both = parts == 1 ? halves[0] + halves[1] : halves[0];
                expect(t, both == sum, "quantize: part %zu of %zu: code sums %d for %d", p, len, both, sum);
                expect(t, scaled_sums[p] == scales[p] * (float)sum, "quantize: part %zu of %zu: sum %g", p, len, scaled_sums[p]);
                double step = peak < 1e-36f ? 0 : (double)peak / 127;
                expect(t, near(scales[p], step, step * 2e-7), "quantize: part %zu of %zu: scale %g for %g", p, len, scales[p], step);
                for (size_t i = p * len; i < (p + 1) * len; i++) {
                    double error = fabs(x[i] - (double)scales[p] * q[i]);
                    expect(t, step == 0 ? q[i] == 0 : error <= step * 0.50005 && q[i] >= -127,
                           "quantize: %g by %g is %d", x[i], scales[p], q[i]);
                }
            }
            /* The same in three rows of a wider plane. */
            enum { TOKENS = 3, WIDE = N / TOKENS + 2 * FK_BLOCK, WIDE_BLOCKS = TOKENS * WIDE / FK_BLOCK };
            const fk_plane wide = {guarded(TOKENS * WIDE, 0), floats(2 * WIDE_BLOCKS), floats(2 * WIDE_BLOCKS),
                                   guarded(2 * WIDE_BLOCKS * sizeof(int32_t), 0)};
            memset(wide.quantized, 99, TOKENS * WIDE);
            t->kernels->quantize(x, TOKENS, N / TOKENS, WIDE, parts == 2, &wide);
            for (size_t b = 0; b < BLOCKS; b++) {
                const size_t row = b / (BLOCKS / TOKENS), at = row * WIDE / FK_BLOCK + b % (BLOCKS / TOKENS);
                expect(t, memcmp(q + b * FK_BLOCK, wide.quantized + at * FK_BLOCK, FK_BLOCK) == 0 &&
                              memcmp(scales + parts * b, wide.scales + parts * at, parts * sizeof(float)) == 0 &&
                              memcmp(scaled_sums + parts * b, wide.scaled_sums + parts * at, parts * sizeof(float)) == 0 &&
                              memcmp(code_sums + 2 * b, wide.code_sums + 2 * at, 2 * sizeof(int32_t)) == 0,
                       "quantize: block %zu is another in a row of several", b);
            }
            for (size_t i = 0; i < 2 * FK_BLOCK; i++)
                expect(t, wide.quantized[WIDE - 1 - i] == 99, "quantize: writes beyond its columns");
        }
        release(inner);
    }
    release(mark);
}

/* ---- decoding and rounding ---- */

static void check_dequantize(void) {
    static const size_t blocked_cols[] = {32, 96, 1056}, float_cols[] = {1, 2, 3, 5, 16, 31, 67, 530};
    for (const struct format *f = formats; f < formats + COUNT(formats); f++)
        for (size_t c = 0; c < (is_blocked(f) ? COUNT(blocked_cols) : COUNT(float_cols)); c++)
            for EACH_TABLE (t) {
                const size_t mark = area_count;
                const size_t n = f->values == FK_SUPER ? (c + 1) * FK_SUPER : is_blocked(f) ? blocked_cols[c] : float_cols[c];
                uint8_t *row = guarded(row_bytes(f, n), c % 2);
                random_row(f, row, n);
                float *out = floats(n);
                t->kernels->dequantize(f->type, row, n, out);
                for (size_t i = 0; i < n; i++) {
                    double size, expected = decode(f, row, i, &size);
                    expect(t, near(out[i], expected, is_blocked(f) ? 2e-7 * size : 0), "dequantize %s: %g for %g",
                           f->name, out[i], expected);
                }
                release(mark);
            }
    /* All of the 16-bit numbers. */
    for EACH_TABLE (t) {
        const size_t mark = area_count;
        uint8_t *all = guarded(2 << 16, 0);
        float *out = floats(1 << 16);
        for (size_t i = 0; i < 1 << 16; i++) put_u16(all + 2 * i, (uint16_t)i);
        for (const struct format *f = formats + 1; f < formats + 3; f++) {
            t->kernels->dequantize(f->type, all, 1 << 16, out);
            for (size_t i = 0; i < 1 << 16; i++) {
                double size, expected = decode(f, all, i, &size);
                expect(t, isnan(expected) ? isnan(out[i]) : bits_of(out[i]) == bits_of((float)expected),
                       "dequantize %s: %#zx is %g", f->name, i, out[i]);
            }
        }
        release(mark);
    }
}

static void check_to_half(void) {
    enum { N = 4 << 16 };
    static const float odd[] = {65519.996f, 65520, 65535, 65536, 1e30f, -1e30f, 1e-30f, 1e-45f, 1.17549435e-38f, -0.0f,
                                INFINITY, -INFINITY, NAN, 0x1p-25f, 0x1.000002p-25f, 0x1p-24f, 0x1.8p-24f, -65520};
    const size_t mark = area_count;
    float *x = floats(N);
    /* Every number, half-way to the next, and both neighbours of that. */
    for (size_t h = 0; h < 1 << 16; h++) {
        double here = half_value((uint16_t)h), next = half_value((uint16_t)(h + 1));
        float middle = isfinite(here) && isfinite(next) ? (float)((here + next) / 2) : 0;
        x[4 * h] = (float)here;
        x[4 * h + 1] = middle;
        x[4 * h + 2] = nextafterf(middle, INFINITY);
        x[4 * h + 3] = nextafterf(middle, -INFINITY);
    }
    for EACH_TABLE (t) {
        const size_t inner = area_count;
        uint16_t *out = guarded(N * sizeof *out, 0);
        t->kernels->to_half(x, N, out);
        for (size_t i = 0; i < N; i++)
            expect(t, isnan(x[i]) ? isnan(half_value(out[i])) : out[i] == half_of(x[i]), "to_half: %a is %#x for %#x", x[i],
                   out[i], half_of(x[i]));
        for (size_t n = 0; n <= COUNT(odd); n++) {
            uint16_t *few = guarded(n * sizeof *few, 0);
            t->kernels->to_half(odd, n, few);
            for (size_t i = 0; i < n; i++)
                expect(t, isnan(odd[i]) ? isnan(half_value(few[i])) : few[i] == half_of(odd[i]), "to_half: %a is %#x",
                       odd[i], few[i]);
            release(area_count - 1);
        }
        release(inner);
    }
    release(mark);
}

/* ---- element by element ---- */

static void check_elements(void) {
    for (size_t n = 0; n <= 131; n += n < 70 ? 1 : 61)
        for EACH_TABLE (t) {
            const size_t mark = area_count;
            float *x = floats(n), *y = floats(n), *out = floats(n);
            fill_normal(x, n, n % 3 == 0 ? 1 : n % 3 == 1 ? 1e-4f : 1e4f);
            fill_normal(y, n, 1);
            double mean = 0;
            for (size_t i = 0; i < n; i++) mean += (double)x[i] * x[i];
            double norm = 1 / sqrt(mean / (double)n + 1e-5);
            if (n > 0) t->kernels->rms_norm(x, y, n, 1e-5f, out);
            for (size_t i = 0; i < n; i++)
                expect(t, near(out[i], x[i] * norm * y[i], fabs(x[i] * norm * y[i]) * 3e-6 + 1e-44),
                       "rms_norm: value %zu of %zu: %g for %g", i, n, out[i], x[i] * norm * y[i]);
            /* In place it is the same. */
            float *same = floats(n);
            memcpy(same, x, n * sizeof *x);
            if (n > 0) t->kernels->rms_norm(same, y, n, 1e-5f, same);
            expect(t, n == 0 || memcmp(same, out, n * sizeof *out) == 0, "rms_norm: %zu values in place", n);

            memcpy(out, x, n * sizeof *x);
            t->kernels->add(out, y, n);
            for (size_t i = 0; i < n; i++)
                expect(t, out[i] == x[i] + y[i], "add: value %zu of %zu: %g", i, n, out[i]);

            float *cosines = floats(n / 2), *sines = floats(n / 2);
            for (size_t i = 0; i < n / 2; i++) {
                cosines[i] = cosf((float)i);
                sines[i] = sinf((float)i);
            }
            memcpy(out, x, n * sizeof *x);
            t->kernels->rope(out, cosines, sines, n / 2);
            for (size_t i = 0; i < n / 2; i++) {
                double a = x[2 * i], b = x[2 * i + 1], size = (fabs(a) + fabs(b)) * 2e-7;
                expect(t, near(out[2 * i], a * cosines[i] - b * sines[i], size) &&
                              near(out[2 * i + 1], a * sines[i] + b * cosines[i], size),
                       "rope: pair %zu of %zu", i, n / 2);
            }
            expect(t, n % 2 == 0 || out[n - 1] == x[n - 1], "rope: touches what is in no pair");

            memcpy(out, x, n * sizeof *x);
            t->kernels->rope_halves(out, cosines, sines, n / 2);
            for (size_t i = 0; i < n / 2; i++) {
                double a = x[i], b = x[n / 2 + i], size = (fabs(a) + fabs(b)) * 2e-7;
                expect(t, near(out[i], a * cosines[i] - b * sines[i], size) &&
                              near(out[n / 2 + i], a * sines[i] + b * cosines[i], size),
                       "rope_halves: pair %zu of %zu", i, n / 2);
            }
            expect(t, n % 2 == 0 || out[n - 1] == x[n - 1], "rope_halves: touches what is in no pair");

            float *gate = floats(n);
            for (size_t i = 0; i < n; i++)
                gate[i] = out[i] = n % 4 == 3 ? random_in(-1000, 1000) : random_in(-95, 95);
            t->kernels->silu_mul(out, y, n, out);
            for (size_t i = 0; i < n; i++) {
                double expected = gate[i] / (1 + exp(-(double)gate[i])) * y[i];
                expect(t, near(out[i], expected, fabs(expected) * 2e-6 + 1e-35), "silu_mul: %g times %g: %g for %g",
                       gate[i], y[i], out[i], expected);
            }
            for (size_t i = 0; i < n; i++) gate[i] = out[i] = n % 4 == 3 ? random_in(-1000, 1000) : random_in(-7, 7);
            t->kernels->gelu_mul(out, y, n, out);
            for (size_t i = 0; i < n; i++) {
                double g = gate[i], u = 0.7978845608028654 * (g + 0.044715 * g * g * g);
                double expected = g / (1 + exp(-2 * u)) * y[i];
                /* The exponent is a float. */
                expect(t, near(out[i], expected, fabs(expected) * (2e-6 + 3e-7 * fabs(u)) + 1e-35),
                       "gelu_mul: %g times %g: %g for %g", g, y[i], out[i], expected);
            }
            release(mark);
        }
}

static void check_moments(void) {
    static const size_t tokens[] = {1, 2, 15, 16, 64}, cols[] = {0, 1, 3, 4, 15, 16, 31, 64, 67, 200};
    for (size_t k = 0; k < COUNT(tokens) * COUNT(cols); k++)
        for EACH_TABLE (t) {
            const size_t mark = area_count, n = tokens[k % COUNT(tokens)], width = cols[k / COUNT(tokens)];
            float *x = floats(n * width), *middle = floats(width), *sums = floats(width), *squares = floats(width);
            fill_normal(x, n * width, 1);
            for (size_t i = 0; i < n * width; i++) x[i] += 1000;
            t->kernels->moments(x, n, width, middle, sums, squares);
            for (size_t c = 0; c < width; c++) {
                double sum = 0, square = 0, size = 0;
                for (size_t i = 0; i < n; i++) {
                    double difference = (double)x[i * width + c] - middle[c];
                    sum += difference;
                    size += fabs(difference);
                    square += difference * difference;
                }
                expect(t, near(sums[c], sum, 2e-6 * size) && near(squares[c], square, 4e-6 * square),
                       "moments: column %zu of %zu, %zu tokens: %g, %g for %g, %g", c, width, n, sums[c], squares[c], sum,
                       square);
            }
            release(mark);
        }
}

/* ---- products of floats ---- */

static double in_bfloat(float f) { return of_bits((bits_of(f) + 0x7fff + (bits_of(f) >> 16 & 1)) & 0xffff0000u); }

static void check_multiply(void) {
    static const size_t shapes[][3] = {{1, 1, 1}, {3, 2, 5}, {16, 16, 32}, {17, 15, 33}, {5, 7, 0}, {33, 47, 540}, {97, 261, 70}};
    for (size_t s = 0; s < COUNT(shapes) * 8; s++)
        for EACH_TABLE (t) {
            const size_t mark = area_count, *shape = shapes[s / 8], rows = shape[0], cols = shape[1], depth = shape[2];
            const int lines_apart[2] = {s & 1, s >> 1 & 1}, add = s >> 2 & 1;
            const int rounds = strcmp(t->kernels->name, "avx512-bf16") == 0 || strcmp(t->kernels->name, "amx") == 0;
            fk_factor f[2];
            for (int i = 0; i < 2; i++) {
                const size_t lines = i ? cols : rows;
                float *values = floats(lines * depth);
                fill_normal(values, lines * depth, 1);
                f[i] = lines_apart[i] ? (fk_factor){values, depth, 1} : (fk_factor){values, 1, lines};
            }
            float *out = floats(rows * cols), *before = floats(rows * cols), *scratch = floats(t->kernels->multiply_scratch);
            fill_normal(before, rows * cols, 1);
            memcpy(out, before, rows * cols * sizeof *out);
            /* With a reach, what lies beyond it may be anything. */
            const size_t reach = s % 3 == 0 ? SIZE_MAX : s % 3 == 1 ? 0 : 7;
            t->kernels->multiply(&f[0], &f[1], rows, cols, depth, reach, add, out, cols, scratch);
            for (size_t i = 0; i < rows * cols; i++) {
                if (reach != SIZE_MAX && i % cols > i / cols + reach) continue;
                double sum = add ? before[i] : 0, size = fabs(sum);
                for (size_t k = 0; k < depth; k++) {
                    const float a = f[0].values[i / cols * f[0].line_stride + k * f[0].sum_stride];
                    const float b = f[1].values[i % cols * f[1].line_stride + k * f[1].sum_stride];
                    const double term = rounds ? in_bfloat(a) * in_bfloat(b) : (double)a * b;
                    sum += term;
                    size += fabs(term);
                }
                expect(t, near(out[i], sum, 4e-6 * size), "multiply: %zu of %zu x %zu, depth %zu: %g for %g", i, rows, cols, depth,
                       out[i], sum);
            }
            release(mark);
        }
}

/* ---- attention ---- */

/* Keys and values of some positions in blocks. Every block begins with bytes of another layer. In every other cache values come
 * before keys. What the last block lacks of positions is not a number, or, at its end, not there. */
struct cache {
    fk_kv_head kv;
    double *keys, *values; /* [positions, head_dim] */
};

static struct cache random_cache(fk_type type, size_t head_dim, size_t positions) {
    enum { OTHER_LAYER = 38 };
    const size_t blocks = (positions + FK_KV_BLOCK - 1) / FK_KV_BLOCK, values_first = positions % 2;
    const struct format *f = formats;
    while (f->type != type) f++;
    const size_t bytes = row_bytes(f, head_dim), whole = FK_KV_BLOCK * bytes;
    const uint8_t **starts = guarded(blocks * sizeof *starts, 0);
    const size_t first = OTHER_LAYER, second = OTHER_LAYER + whole;
    struct cache cache = {{type, starts, values_first ? second : first, values_first ? first : second, bytes, head_dim},
                          guarded(positions * head_dim * sizeof(double), 0),
                          guarded(positions * head_dim * sizeof(double), 0)};
    float *line = floats(head_dim);
    /* The last block is the first in memory. */
    for (size_t b = blocks; b-- > 0;) {
        const size_t there = positions - b * FK_KV_BLOCK < FK_KV_BLOCK ? positions - b * FK_KV_BLOCK : FK_KV_BLOCK;
        const size_t size = OTHER_LAYER + whole + there * bytes;
        uint8_t *block = guarded(size, 0);
        for (size_t i = 0; i + 2 <= size; i += 2) put_u16(block + i, 0x7e00);
        for (size_t p = 0; p < there; p++)
            for (int which = 0; which < 2; which++) {
                uint8_t *row = block + (which ? cache.kv.values : cache.kv.keys) + p * bytes;
                double *exact = (which ? cache.values : cache.keys) + (b * FK_KV_BLOCK + p) * head_dim, unused;
                fill_normal(line, head_dim, which ? 1 : 1.5f);
                if (type == FK_TYPE_F16)
                    for (size_t d = 0; d < head_dim; d++) put_u16(row + 2 * d, half_of(line[d]));
                else
                    for (size_t d = 0; d < head_dim; d++) {
                        uint8_t *at = row + d / FK_BLOCK * bytes_of(f);
                        if (d % FK_BLOCK == 0) put_u16(at, half_of((which ? 2.0f : 3.0f) / 127));
                        at[2 + d % FK_BLOCK] = (uint8_t)(int8_t)rintf(line[d] * 40);
                    }
                for (size_t d = 0; d < head_dim; d++) exact[d] = decode(f, row, d, &unused);
            }
        starts[b] = block;
    }
    return cache;
}

/* Whether bfloat16 rounds scores and weights of what a table makes of these queries. */
static int in_bfloats(const struct table *t, fk_phase phase, size_t queries) {
    const int has_bfloats = strcmp(t->kernels->name, "amx") == 0 || strcmp(t->kernels->name, "avx512-bf16") == 0;
    return has_bfloats && (phase == FK_PHASE_PREFILL || queries >= 16);
}

/* Attends to the queries from `begin` on. */
static void attend_to(const struct table *t, fk_phase phase, const float *q, size_t begin, size_t end, const fk_sight *sights,
                      const fk_kv_head *kv, float scale, float cap, float *out) {
    const size_t mark = area_count, count = end - begin, dim = kv->head_dim;
    size_t most = 0;
    for (size_t i = begin; i < end; i++) most = sights[i].end > most ? sights[i].end : most;
    float *scratch = floats(t->kernels->attend_scratch(phase, count, dim, most)), *own = floats(count * dim);
    t->kernels->attend(phase, q + begin * dim, count, sights + begin, kv, scale, cap, own, 0, scratch);
    memcpy(out + begin * dim, own, count * dim * sizeof *out);
    release(mark);
}

/* Queries of tokens that have `step` each, the first of which sees the positions before `first`, but no more than `window`, unless that
 * is 0. In the decode phase they are of one. */
static void check_sights_of(fk_type type, fk_phase phase, size_t head_dim, size_t queries, size_t first, size_t step, float size,
                            size_t window, float cap) {
    const size_t mark = area_count;
    fk_sight *sights = guarded(queries * sizeof *sights, 0);
    size_t positions = 0;
    for (size_t i = 0; i < queries; i++) {
        const size_t end = first + i / step;
        sights[i] = (fk_sight){window && end > window ? end - window : 0, end};
        positions = end > positions ? end : positions;
    }
    float *q = floats(queries * head_dim);
    fill_normal(q, queries * head_dim, size);
    const struct cache cache = random_cache(type, head_dim, positions);
    const float scale = 1 / sqrtf((float)head_dim);

    double *expected = guarded(queries * head_dim * sizeof *expected, 0), *score = guarded(positions * sizeof *score, 0);
    for (size_t i = 0; i < queries; i++) {
        double peak = -INFINITY, sum = 0;
        for (size_t p = sights[i].begin; p < sights[i].end; p++) {
            score[p] = 0;
            for (size_t d = 0; d < head_dim; d++) score[p] += (double)q[i * head_dim + d] * cache.keys[p * head_dim + d];
            score[p] *= scale;
            if (cap != 0) score[p] = cap * tanh(score[p] / cap);
            peak = fmax(peak, score[p]);
        }
        for (size_t p = sights[i].begin; p < sights[i].end; p++) sum += score[p] = exp(score[p] - peak);
        for (size_t d = 0; d < head_dim; d++) {
            double total = 0;
            for (size_t p = sights[i].begin; p < sights[i].end; p++)
                if (score[p] > 0) total += score[p] / sum * cache.values[p * head_dim + d];
            expected[i * head_dim + d] = total;
        }
    }
    for EACH_TABLE (t) {
        const size_t inner = area_count;
        float *out = floats(queries * head_dim), *cut = floats(queries * head_dim);
        attend_to(t, phase, q, 0, queries, sights, &cache.kv, scale, cap, out);
        for (size_t i = 0; i < queries * head_dim; i++) {
            /* Scores are sums of float products, so that what is added to an exponent grows with them. */
            const double allowed = in_bfloats(t, phase, queries) ? 3e-2 : 2e-5;
            if (!expect(t, near(out[i], expected[i], allowed * (size > 1 ? size : 1) * (1 + fabs(expected[i]))),
                        "attend: head_dim %zu, %zu queries of a %s token from %zu on, value %zu: %g for %g", head_dim, queries,
                        phase_name(phase), first, i, out[i], expected[i]))
                break;
        }
        /* However the tokens are cut, each has what it has together with the others. */
        for (size_t some = step; some < queries && phase == FK_PHASE_PREFILL; some += some < 16 * step ? step : 16 * step) {
            for (size_t begin = 0; begin < queries; begin += some)
                attend_to(t, phase, q, begin, begin + some < queries ? begin + some : queries, sights, &cache.kv, scale, cap,
                          cut);
            int same = 1;
            for (size_t i = 0; i < queries * head_dim; i++) same &= cut[i] == out[i];
            expect(t, same, "attend: head_dim %zu, %zu queries from %zu on, cut by %zu: differ from the same at once", head_dim,
                   queries, first, some);
        }
        release(inner);
    }
    release(mark);
}

static void check_attention_of(fk_type type, fk_phase phase, size_t head_dim, size_t queries, size_t first, size_t step,
                               float size) {
    check_sights_of(type, phase, head_dim, queries, first, step, size, 0, 0);
}

/* Windows that begin in the first tile and behind it, at its borders and not, with and without capped scores. Emulators take long for this. */
static void check_windows(void) {
    static const size_t windows[] = {0, 1, 5, 64, 65, 100};
    for (size_t w = 0; w < COUNT(windows); w++) {
        const float cap = w % 2 ? 0 : 2;
        for (size_t dim = 16; dim <= 256; dim *= 4) {
            if (dim == 256 && w > 2) continue;
            check_sights_of(FK_TYPE_F16, FK_PHASE_PREFILL, dim, 40, 50, 1, 1, windows[w], cap);
            check_sights_of(FK_TYPE_F16, FK_PHASE_PREFILL, dim, 100, 1, 1, 1, windows[w], cap);
            check_sights_of(FK_TYPE_F16, FK_PHASE_PREFILL, dim, 64, 190, 3, 1, windows[w], cap);
            check_sights_of(FK_TYPE_F16, FK_PHASE_DECODE, dim, 3, 130, 3, 1, windows[w], cap);
            check_sights_of(FK_TYPE_F16, FK_PHASE_DECODE, dim, 17, 130, 17, 1, windows[w], cap);
            if (dim % FK_BLOCK == 0) check_sights_of(FK_TYPE_Q8_0, FK_PHASE_DECODE, dim, 5, 97, 5, 1, windows[w], cap);
        }
    }
}

static void check_attention(void) {
    static const size_t dims[] = {2, 10, 16, 33, 64, 80, 128};
    for (size_t d = 0; d < COUNT(dims); d++)
        for (int phase = FK_PHASE_PREFILL; phase <= FK_PHASE_DECODE; phase++) {
            const fk_phase p = (fk_phase)phase;
            /* A token's queries: the most that go one by one, the least that share tiles, and more than a tile. */
            static const size_t heads[] = {1, 3, 4, 5, 7, 8, 9, 16, 17};
            static const size_t firsts[] = {1, 5, 63, 64, 65, 70, 150};
            for (size_t i = 0; i < COUNT(heads) * COUNT(firsts); i++) {
                const size_t n = heads[i % COUNT(heads)], first = firsts[i / COUNT(heads)];
                if (dims[d] % FK_BLOCK == 0) check_attention_of(FK_TYPE_Q8_0, p, dims[d], n, first, n, 1);
                check_attention_of(FK_TYPE_F16, p, dims[d], n, first, n, 1);
            }
        }
    for (size_t d = 0; d < COUNT(dims); d++) {
        check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, dims[d], 7, 5, 1, 1);
        check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, dims[d], 20, 120, 2, 1); /* across tiles */
        check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, dims[d], 40, 58, 3, 1);
        if (dims[d] % FK_BLOCK == 0) check_attention_of(FK_TYPE_Q8_0, FK_PHASE_PREFILL, dims[d], 40, 58, 3, 1);
    }
    check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, 16, 70, 1, 1, 1);
    check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, 64, 33, 64, 1, 1);
    check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, 600, 9, 3, 1, 1); /* more than a panel's depth */
    check_attention_of(FK_TYPE_F16, FK_PHASE_DECODE, 600, 9, 3, 9, 1);
    check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, 16, 5, 40, 1, 300);
    check_attention_of(FK_TYPE_F16, FK_PHASE_PREFILL, 16, 12, 60, 1, 300);
    check_attention_of(FK_TYPE_F16, FK_PHASE_DECODE, 16, 5, 60, 5, 300);
}

/* ---- */

static const struct {
    const char *name;
    void (*run)(void);
} groups[] = {
    {"products", check_products},     {"damaged", check_damaged},         {"largest sums", check_largest_sums},
    {"extreme scales", check_extreme_scales}, {"not finite", check_not_finite}, {"quantize", check_quantize},
    {"dequantize", check_dequantize}, {"to_half", check_to_half},         {"elements", check_elements},
    {"moments", check_moments},       {"multiply", check_multiply},       {"attention", check_attention},
    {"windows", check_windows},
};

/* Whether exactly the tables that the arguments name are there. */
static int as_expected(int count, char **names) {
    int good = 1;
    for (size_t t = 0; t < table_count; t++) {
        int named = count == 0;
        for (int i = 0; i < count; i++) named |= strcmp(names[i], tables[t].kernels->name) == 0;
        if (!named) printf("on offer but not expected: %s\n", tables[t].kernels->name);
        good &= named;
    }
    for (int i = 0; i < count; i++) {
        int found = 0;
        for (size_t t = 0; t < table_count; t++) found |= strcmp(names[i], tables[t].kernels->name) == 0;
        if (!found) printf("expected but not on offer: %s\n", names[i]);
        good &= found;
    }
    return good;
}

int main(int argc, char **argv) {
    for (int isa = 0; isa < FK_ISA_COUNT; isa++) {
        const fk_kernels *kernels = fk_kernels_for((fk_isa)isa);
        if (kernels) tables[table_count++].kernels = kernels;
    }
    int failed = !as_expected(argc - 1, argv + 1);
    if (fk_kernels_for(FK_ISA_COUNT)) {
        printf("there is a table for no instruction set\n");
        failed = 1;
    }
    long before[FK_ISA_COUNT] = {0};
    int groups_failed[FK_ISA_COUNT] = {0};
    for (size_t g = 0; g < COUNT(groups); g++) {
        groups[g].run();
        for (size_t t = 0; t < table_count; t++) {
            groups_failed[t] += tables[t].failures > before[t];
            before[t] = tables[t].failures;
            tables[t].printed = 0;
        }
    }
    for (size_t t = 0; t < table_count; t++) {
        printf("%s: ", tables[t].kernels->name);
        for (size_t g = 0; g < COUNT(groups); g++) printf("%s%s", g ? ", " : "", groups[g].name);
        printf(": %d passed, %d failed (%ld of %ld comparisons)\n", (int)COUNT(groups) - groups_failed[t],
               groups_failed[t], tables[t].failures, tables[t].checks);
        failed |= tables[t].failures > 0;
    }
    return failed;
}
