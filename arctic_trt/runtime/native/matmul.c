#include "matmul.h"

#include "pool.h"
#include "tables.h"

#if HAVE_TABLES && defined(__AVX512BF16__)
#define FAST_E4M3 1
#else
#define FAST_E4M3 0
#endif

#define PANEL_ROWS 32           /* of weights that are unpacked at a time, to stay in a core's second-level cache */
#define LINE 64 /* bytes of a cache line */
#define MOST_ROWS 8 /* of any tile; arrays of that size, since the compiler keeps only arrays of known size in registers */
#define DIRECT_ROWS 4           /* rows of x whose products wait for the memory */
#define MOST_DIRECT 16          /* rows of x for which weights are unpacked as they come; for more, unpacking once costs less */

static inline long up(long n, long to) { return (n + to - 1) / to * to; }

static inline long element_bytes(long kind) { return kind == E4M3 ? 1 : kind == BF16 ? 2 : 4; }

INLINE void put(struct sink to, long m, long n, long count, const float *sums, float alpha) {
    float *y = to.y + (to.row ? to.row[m] : m) * to.ld + n;
    for (long i = 0; i < count; i++) {
        float value = sums[i] * alpha;
        y[i] = to.share ? y[i] + value * to.share[m] : value;
    }
}

/* ---- float32 lanes: any processor, any kind ---- */

INLINE vf lanes(long kind, const void *row, long k) {
    if (kind == E4M3) return decode_e4m3(LOAD(vb, (const uint8_t *)row + k));
    if (kind == BF16) return widen_bf16(LOAD(vh, (const uint16_t *)row + k));
    return LOAD(vf, (const float *)row + k);
}

/* The last K % W elements of a row, zeros behind them. */
static vf last_lanes(long kind, const void *row, long k, long K) {
    uint8_t rest[4 * W] = {0};
    long size = element_bytes(kind);
    memcpy(rest, (const uint8_t *)row + k * size, (K - k) * size);
    return lanes(kind, rest, 0);
}

/* TILE_COLS rows of weights with `rows` rows of x, all in float32; ldw in elements, x rows are padded to W. */
/* TILE_COLS rows of weights, of which `real` exist, with `rows` rows of x, all in float32; ldw in elements, x rows are padded to W.
 * Where weights come from memory, the cache lines of the next rows are asked for in the order in which they lie: streams side by
 * side are too much for it. */
INLINE void tile_f32(long kind, int rows, const float *x, long ldx, const void *w, long ldw, int real, long K, const uint8_t *ahead,
                     float sums[][TILE_COLS]) {
    vf sum[MOST_ROWS][TILE_COLS];
    const uint8_t *row[TILE_COLS];
    long size = element_bytes(kind), whole = K / W * W;
    UNROLL for (int c = 0; c < TILE_COLS; c++) row[c] = (const uint8_t *)w + (c < real ? c : 0) * ldw * size;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < TILE_COLS; c++) sum[r][c] = SPLAT(0);
    for (long k = 0; k < whole; k += W) {
        vf weight[TILE_COLS];
        UNROLL for (int c = 0; c < TILE_COLS; c++) {
            if (rows <= DIRECT_ROWS && c * W * size % LINE == 0) __builtin_prefetch(ahead + (k * TILE_COLS + c * W) * size);
            weight[c] = lanes(kind, row[c], k);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vf a = LOAD(vf, x + r * ldx + k);
            UNROLL for (int c = 0; c < TILE_COLS; c++) sum[r][c] += a * weight[c];
        }
    }
    if (whole < K)
        UNROLL for (int c = 0; c < TILE_COLS; c++) {
            vf weight = last_lanes(kind, row[c], whole, K);
            UNROLL for (int r = 0; r < rows; r++) sum[r][c] += LOAD(vf, x + r * ldx + whole) * weight;
        }
    UNROLL for (int r = 0; r < rows; r++) join_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3], sums[r]);
}

#define TILE_F32(kind, rows) tile_f32(kind, rows, x, ldx, w, ldw, real, K, ahead, sums)
#define TILES_F32(kind)                       \
    switch (rows) {                           \
        case 1: TILE_F32(kind, 1); break;     \
        case 2: TILE_F32(kind, 2); break;     \
        case 3: TILE_F32(kind, 3); break;     \
        case 4: TILE_F32(kind, 4); break;     \
        case 5: TILE_F32(kind, 5); break;     \
        default: TILE_F32(kind, 6);           \
    }

static void any_tile_f32(long kind, int rows, const float *x, long ldx, const void *w, long ldw, int real, long K, const uint8_t *ahead,
                         float sums[][TILE_COLS]) {
    if (kind == E4M3) {
        TILES_F32(E4M3)
    } else if (kind == BF16) {
        TILES_F32(BF16)
    } else {
        TILES_F32(F32)
    }
}

static const void *panel_f32(long kind, const void *w, long rows, long K) {
    long ld = up(K, W), size = element_bytes(kind);
    float *panel = scratch(0, rows * ld * 4);
    for (long r = 0; r < rows; r++) {
        const uint8_t *row = (const uint8_t *)w + r * K * size;
        for (long k = 0; k < K / W * W; k += W) STORE(panel + r * ld + k, lanes(kind, row, k));
        if (K % W) STORE(panel + r * ld + K / W * W, last_lanes(kind, row, K / W * W, K));
    }
    return panel;
}

static void multiply_f32(const float *x, long M, const struct weights *w, long n0, long n1, struct sink to) {
    long ldx = up(w->K, W), most_direct = w->kind == E4M3 ? 4 : w->kind == BF16 ? MOST_DIRECT : M;
    int direct = M <= most_direct, tile = M <= DIRECT_ROWS ? DIRECT_ROWS : TILE_ROWS;
    long kind = direct ? w->kind : F32, ldw = direct ? w->K : ldx, K = direct ? w->K : ldx, row_bytes = ldw * element_bytes(kind);
    long panel_rows = M <= tile ? n1 - n0 : PANEL_ROWS;
    for (long p0 = n0; p0 < n1; p0 += panel_rows) {
        long p1 = p0 + panel_rows < n1 ? p0 + panel_rows : n1;
        const uint8_t *panel = (const uint8_t *)w->data + p0 * w->K * element_bytes(w->kind);
        if (!direct) panel = panel_f32(w->kind, panel, p1 - p0, w->K);
        for (long m = 0; m < M; m += tile)
            for (long n = p0; n < p1; n += TILE_COLS) {
                int rows = M - m < tile ? M - m : tile, real = p1 - n < TILE_COLS ? p1 - n : TILE_COLS;
                const uint8_t *row = panel + (n - p0) * row_bytes, *ahead = n + TILE_COLS < p1 ? row + TILE_COLS * row_bytes : row;
                float sums[MOST_ROWS][TILE_COLS];
                any_tile_f32(kind, rows, x + m * ldx, ldx, row, ldw, real, K, ahead, sums);
                for (int r = 0; r < rows; r++) put(to, m + r, n, real, sums[r], w->alpha);
            }
    }
}

/* ---- e4m3 with AVX-512: 64 codes become 64 bf16 values by table, and vdpbf16ps multiplies them ---- */

#if FAST_E4M3

#define CHUNK 64 /* codes that are unpacked together; x is laid out in the order in which they come out */

/* Elements from one prepared or unpacked row to the next. A cache line more than needed: rows a power of two apart would all
 * compete for the same places of the first-level cache. */
static inline long row_bf16(long K) { return up(K, CHUNK) + 32; }

INLINE void unpack(const struct tables *t, __m512i codes, __m512i *first, __m512i *second) {
    __m512i low, high = look_up(t, codes, &low);
    *first = _mm512_unpacklo_epi8(low, high);
    *second = _mm512_unpackhi_epi8(low, high);
}

INLINE __m512i last_codes(const uint8_t *from, long count) {
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << count) - 1, from);
}

/* A chunk of `cols` rows of codes times `rows` rows of x, added to their sums. */
INLINE void add_chunk(const struct tables *t, int rows, int cols, const uint16_t *x, long ldx, const __m512i *codes, __m512 sum[][TILE_COLS]) {
    __m512i first[TILE_COLS], second[TILE_COLS];
    UNROLL for (int c = 0; c < cols; c++) unpack(t, codes[c], first + c, second + c);
    UNROLL for (int r = 0; r < rows; r++) {
        __m512bh a = (__m512bh)_mm512_loadu_si512(x + r * ldx), b = (__m512bh)_mm512_loadu_si512(x + r * ldx + CHUNK / 2);
        UNROLL for (int c = 0; c < cols; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], a, (__m512bh)first[c]);
        UNROLL for (int c = 0; c < cols; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], b, (__m512bh)second[c]);
    }
}

/* `rows` rows of x with `cols` rows of codes, of which `real` exist, unpacked on the way. */
INLINE void tile_codes(const struct tables *t, int rows, int cols, const uint16_t *x, long ldx, const uint8_t *w, int real, long K,
                       const uint8_t *ahead, float sums[][TILE_COLS]) {
    __m512 sum[MOST_ROWS][TILE_COLS];
    __m512i codes[TILE_COLS];
    const uint8_t *row[TILE_COLS];
    UNROLL for (int c = 0; c < cols; c++) row[c] = w + (c < real ? c : 0) * K;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < TILE_COLS; c++) sum[r][c] = _mm512_setzero_ps();
    long k = 0;
    for (; k + CHUNK <= K; k += CHUNK) {
        UNROLL for (int c = 0; c < cols; c++) {
            __builtin_prefetch(ahead + k * cols + c * LINE);
            codes[c] = _mm512_loadu_si512(row[c] + k);
        }
        add_chunk(t, rows, cols, x + k, ldx, codes, sum);
    }
    if (k < K) {
        UNROLL for (int c = 0; c < cols; c++) codes[c] = last_codes(row[c] + k, K - k);
        add_chunk(t, rows, cols, x + k, ldx, codes, sum);
    }
    UNROLL for (int r = 0; r < rows; r++) join_four((vf)sum[r][0], (vf)sum[r][1], (vf)sum[r][2], (vf)sum[r][3], sums[r]);
}

/* The same products in the same order, of rows that have been unpacked; K is a multiple of CHUNK. Meanwhile a cache line is asked
 * for with every step, which brings the codes of the next panel. */
INLINE void tile_bf16(int rows, const uint16_t *x, long ldx, const uint16_t *w, long ldw, long K, const uint8_t *ahead,
                      float sums[][TILE_COLS]) {
    __m512 sum[MOST_ROWS][TILE_COLS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < TILE_COLS; c++) sum[r][c] = _mm512_setzero_ps();
    for (long k = 0; k < K; k += CHUNK / 2) {
        __m512bh weight[TILE_COLS];
        __builtin_prefetch(ahead + k * (LINE / (CHUNK / 2)), 0, 2);
        UNROLL for (int c = 0; c < TILE_COLS; c++) weight[c] = (__m512bh)_mm512_load_si512(w + c * ldw + k);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512bh a = (__m512bh)_mm512_loadu_si512(x + r * ldx + k);
            UNROLL for (int c = 0; c < TILE_COLS; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], a, weight[c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) join_four((vf)sum[r][0], (vf)sum[r][1], (vf)sum[r][2], (vf)sum[r][3], sums[r]);
}

#define TILE_CODES(rows, cols) tile_codes(t, rows, cols, x, ldx, w, real, K, ahead, sums)

/* Tiles of few rows are four columns wide, others two, so that the sums stay in registers. */
static void any_tile_codes(const struct tables *t, int rows, int cols, const uint16_t *x, long ldx, const uint8_t *w, int real, long K,
                           const uint8_t *ahead, float sums[][TILE_COLS]) {
    switch (rows + (cols == 4 ? 0 : 4)) {
        case 1: TILE_CODES(1, 4); break;
        case 2: TILE_CODES(2, 4); break;
        case 3: TILE_CODES(3, 4); break;
        case 4: TILE_CODES(4, 4); break;
        case 8: TILE_CODES(4, 2); break;
        case 9: TILE_CODES(5, 2); break;
        case 10: TILE_CODES(6, 2); break;
        case 11: TILE_CODES(7, 2); break;
        default: TILE_CODES(8, 2);
    }
}

static void any_tile_bf16(int rows, const uint16_t *x, long ldx, const uint16_t *w, long ldw, long K, const uint8_t *ahead,
                          float sums[][TILE_COLS]) {
    switch (rows) {
        case 1: tile_bf16(1, x, ldx, w, ldw, K, ahead, sums); break;
        case 2: tile_bf16(2, x, ldx, w, ldw, K, ahead, sums); break;
        case 3: tile_bf16(3, x, ldx, w, ldw, K, ahead, sums); break;
        case 4: tile_bf16(4, x, ldx, w, ldw, K, ahead, sums); break;
        case 5: tile_bf16(5, x, ldx, w, ldw, K, ahead, sums); break;
        default: tile_bf16(6, x, ldx, w, ldw, K, ahead, sums);
    }
}

static const uint16_t *panel_bf16(const struct tables *t, const uint8_t *w, long rows, long K) {
    long ld = row_bf16(K), padded = up(rows, TILE_COLS);
    uint16_t *panel = scratch(0, padded * ld * 2);
    for (long r = 0; r < padded; r++)
        for (long k = 0; k < K; k += CHUNK) {
            __m512i first, second;
            const uint8_t *codes = w + (r < rows ? r : 0) * K + k;
            unpack(t, K - k < CHUNK ? last_codes(codes, K - k) : _mm512_loadu_si512(codes), &first, &second);
            _mm512_store_si512(panel + r * ld + k, first);
            _mm512_store_si512(panel + r * ld + k + CHUNK / 2, second);
        }
    return panel;
}

/* Up to MOST_DIRECT rows, in one or two tiles: 9 rows are 5 and 4. */
static void multiply_e4m3_directly(const uint16_t *x, long M, const struct weights *w, long n0, long n1, struct sink to) {
    struct tables t = load_tables();
    long ldx = row_bf16(w->K), cols = M <= 4 ? 4 : 2, tile = M <= MOST_ROWS ? M : (M + 1) / 2;
    for (long m = 0; m < M; m += tile) {
        int rows = M - m < tile ? M - m : tile;
        for (long n = n0; n < n1; n += cols) {
            const uint8_t *row = (const uint8_t *)w->data + n * w->K;
            const uint8_t *ahead = n + cols < n1 ? row + cols * w->K : row;
            int real = n1 - n < cols ? n1 - n : cols;
            float sums[MOST_ROWS][TILE_COLS];
            any_tile_codes(&t, rows, cols, x + m * ldx, ldx, row, real, w->K, ahead, sums);
            for (int r = 0; r < rows; r++) put(to, m + r, n, real, sums[r], w->alpha);
        }
    }
}

static void multiply_e4m3(const uint16_t *x, long M, const struct weights *w, long n0, long n1, struct sink to) {
    if (M <= MOST_DIRECT) {
        multiply_e4m3_directly(x, M, w, n0, n1, to);
        return;
    }
    struct tables t = load_tables();
    long ld = row_bf16(w->K), K = up(w->K, CHUNK), asked_a_tile = K * (LINE / (CHUNK / 2));
    for (long p0 = n0; p0 < n1; p0 += PANEL_ROWS) {
        long p1 = p0 + PANEL_ROWS < n1 ? p0 + PANEL_ROWS : n1, to_ask = p1 < n1 ? PANEL_ROWS * w->K : 0;
        const uint8_t *codes = (const uint8_t *)w->data + p0 * w->K, *ahead = codes + (p1 - p0) * w->K;
        const uint16_t *panel = panel_bf16(&t, codes, p1 - p0, w->K);
        for (long m = 0; m < M; m += TILE_ROWS)
            for (long n = p0; n < p1; n += TILE_COLS, to_ask -= asked_a_tile, ahead += asked_a_tile) {
                int rows = M - m < TILE_ROWS ? M - m : TILE_ROWS, real = p1 - n < TILE_COLS ? p1 - n : TILE_COLS;
                float sums[MOST_ROWS][TILE_COLS];
                any_tile_bf16(rows, x + m * ld, ld, panel + (n - p0) * ld, ld, K, to_ask > 0 ? ahead : (const uint8_t *)panel, sums);
                for (int r = 0; r < rows; r++) put(to, m + r, n, real, sums[r], w->alpha);
            }
    }
}

static void prepare_e4m3(const float *x, long K, float scale, uint16_t *out) {
    for (long k = 0; k < K; k += CHUNK) {
        float values[CHUNK] = {0};
        uint16_t codes[CHUNK];
        memcpy(values, x + k, (K - k < CHUNK ? K - k : CHUNK) * 4);
        for (int i = 0; i < CHUNK; i += W)
            STORE(codes + i, narrow16((vu)round_e4m3(LOAD(vf, values + i) / scale) >> 16));
        for (int group = 0; group < 8; group++) /* the order in which `unpack` brings the weights */
            memcpy(out + k + group % 2 * 32 + group / 2 * 8, codes + group * 8, 16);
    }
}

#endif

/* ---- either ---- */

long prepared_bytes(long kind, long K) {
    (void)kind;
#if FAST_E4M3
    if (kind == E4M3) return row_bf16(K) * 2;
#endif
    return up(K, W) * 4;
}

void prepare(long kind, const float *x, long K, float scale, void *prepared) {
#if FAST_E4M3
    if (kind == E4M3) {
        prepare_e4m3(x, K, scale, prepared);
        return;
    }
#endif
    float *out = prepared;
    memcpy(out, x, K * 4);
    memset(out + K, 0, (up(K, W) - K) * 4);
    if (kind == E4M3)
        for (long k = 0; k < K; k += W) STORE(out + k, round_e4m3(LOAD(vf, out + k) / scale));
}

void multiply(const void *prepared, long M, const struct weights *w, long n0, long n1, struct sink to) {
#if FAST_E4M3
    if (w->kind == E4M3) {
        multiply_e4m3(prepared, M, w, n0, n1, to);
        return;
    }
#endif
    multiply_f32(prepared, M, w, n0, n1, to);
}
