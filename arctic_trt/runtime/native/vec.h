/* Vectors of floats in the compiler's own notation, e4m3 numerics, and the order in which sums are made.
 *
 * Every dot product of this library adds up W interleaved partial sums, first elements first, and then joins them in one fixed
 * tree. So a result does not depend on how many rows are multiplied at once, and a sequence computes the same bits in company.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#define TILE_ROWS 6 /* rows of x a tile: 6 x 4 sums, 4 weights and an x fit 32 registers */
#else
#define W 8
#define TILE_ROWS 3
#endif
#define TILE_COLS 4
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define UNROLL _Pragma("GCC unroll 8")

typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));

#define LOAD(type, from) ((type) * (const type *)(from))
#define STORE(to, value) (*(__typeof__(value) *)(to) = (value))
#define SPLAT(value) ((float)(value) - (vf){0}) /* less nothing, which compilers leave out, unlike a sum with nothing */

/* Between numbers of 8, 16 and 32 bits. Compilers know the notation, but many take the elements one by one for it. */
#if defined(__AVX512F__)
INLINE vu widen8(vb x) { return (vu)_mm512_cvtepu8_epi32((__m128i)x); }
INLINE vu widen16(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE vb narrow8(vu x) { return (vb)_mm512_cvtepi32_epi8((__m512i)x); }
INLINE vh narrow16(vu x) { return (vh)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
INLINE vu widen8(vb x) { return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&x)); }
INLINE vu widen16(vh x) { return (vu)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE vb narrow8(vu x) { return __builtin_convertvector(x, vb); }
INLINE vh narrow16(vu x) { return __builtin_convertvector(x, vh); }
#else
INLINE vu widen8(vb x) { return __builtin_convertvector(x, vu); }
INLINE vu widen16(vh x) { return __builtin_convertvector(x, vu); }
INLINE vb narrow8(vu x) { return __builtin_convertvector(x, vb); }
INLINE vh narrow16(vu x) { return __builtin_convertvector(x, vh); }
#endif

INLINE vf pick(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE vf larger(vf a, vf b) { return pick(a > b, a, b); }

/* Joins W sums by halves: (i, i + W/2), then (i, i + W/4), and so on. */
INLINE float join(vf v) {
    float part[W];
    STORE(part, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* Four vectors, each joined by one tree of its own shape. */
INLINE void join_four(vf a, vf b, vf c, vf d, float *sums) {
#if defined(__AVX512DQ__)
    __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
    __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
    __m512 lane = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(xy), _mm512_castps_pd(zw))),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(xy), _mm512_castps_pd(zw))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lane), _mm512_extractf32x8_ps(lane, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    sums[0] = join(a), sums[1] = join(b), sums[2] = join(c), sums[3] = join(d);
#endif
}

/* e to the power of x for x <= 88.3; at most about 1 unit in the last place off (Cephes' polynomial). */
INLINE vf exponential(vf x) {
    x = pick(x > SPLAT(-87.3f), x, SPLAT(-87.3f));
    vf n = (x * 1.44269504f + 12582912.f) - 12582912.f; /* rounds to the nearest integer */
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = SPLAT(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
}

/* x * sigmoid(x); what is not a number stays so. */
INLINE vf silu(vf x) { return x / (1.f + exponential(pick(x < SPLAT(-88.f), SPLAT(88.f), -x))); }

/* Nearest e4m3 value, ties to even, saturating at 448; what is not a number stays so. */
INLINE vf round_e4m3(vf x) {
    vf size = magnitude(x);
    vu bits = (vu)pick(size > SPLAT(448.f), SPLAT(448.f), size);
    vf normal = (vf)((bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000);
    vf small = (size + 24576.f) - 24576.f; /* below 2^-6 values are 2^-9 apart, as floats from 2^14 on are */
    vf rounded = pick(size < SPLAT(0x1p-6f), small, normal);
    rounded = (vf)((vu)rounded | ((vu)x & 0x80000000));
    return pick(x == x, rounded, x);
}

/* Codes of e4m3 values as round_e4m3 makes them. */
INLINE vb encode_e4m3(vf value) {
    vf size = magnitude(value);
    vi normal = (vi)((vu)size >> 20) - (120 << 3);
    vi small = __builtin_convertvector(size * 512.f, vi);
    vi code = ((vi)pick(size < SPLAT(0x1p-6f), (vf)small, (vf)normal) & (value == value)) | (0x7f & (value != value));
    return narrow8((vu)code | ((vu)value >> 31 << 7));
}

/* Values of e4m3 codes: the bits moved to where a float has them, then scaled to e4m3's range of exponents. */
INLINE vf decode_e4m3(vb codes) {
    vu c = widen8(codes);
    vf value = (vf)((c & 0x7f) << 20 | (c & 0x80) << 24) * 0x1p120f;
    vi broken = (vi)(c & 0x7f) == 0x7f;
    return (vf)((vi)value | (broken & 0x7fc00000));
}

INLINE vf widen_bf16(vh bits) { return (vf)(widen16(bits) << 16); }
