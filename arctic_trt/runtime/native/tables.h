/* e4m3 codes by table, 64 at a time, where AVX-512 can look up bytes. */
#pragma once
#include "vec.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define HAVE_TABLES 1

struct tables {
    __m512i high0, high1, low0, low1, sign;
};

/* Upper and lower byte of the bf16 values of the codes 0 to 127; the sign is put in afterwards. */
INLINE struct tables load_tables(void) {
    static uint8_t high[128], low[128];
    static int ready;
    if (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) { /* threads that come here together write the same bytes */
        for (int code = 0; code < 128; code += W) {
            uint8_t codes[W];
            uint32_t bits[W];
            for (int i = 0; i < W; i++) codes[i] = code + i;
            STORE(bits, decode_e4m3(LOAD(vb, codes)));
            for (int i = 0; i < W; i++) high[code + i] = bits[i] >> 24, low[code + i] = bits[i] >> 16;
        }
        __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
    }
    return (struct tables){_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64), _mm512_loadu_si512(low),
                           _mm512_loadu_si512(low + 64), _mm512_set1_epi8((char)0x80)};
}

/* Upper bytes, and through `low` the lower ones, of the bf16 values of 64 codes. */
INLINE __m512i look_up(const struct tables *t, __m512i codes, __m512i *low) {
    __m512i high = _mm512_permutex2var_epi8(t->high0, codes, t->high1);
    *low = _mm512_permutex2var_epi8(t->low0, codes, t->low1);
    return _mm512_ternarylogic_epi32(high, codes, t->sign, 0xf8); /* high | (codes & sign) */
}

#else
#define HAVE_TABLES 0
#endif
