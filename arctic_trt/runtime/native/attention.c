/* Causal attention over a paged cache, and storing into it.
 *
 * C chunks of T tokens, N query heads, K KV heads, P positions a page, H head dim. A page holds keys and values of all KV heads:
 * pages are [pages, 2, K, P, H]. Every query takes the pages of its sequence in their order with a running maximum, so its result
 * depends on nothing but the positions it sees, however its prompt was cut into chunks.
 */
#include <math.h>

#include "matmul.h"
#include "ops.h"
#include "pool.h"
#include "tables.h"

#define TILE 128 /* queries, heads of a group included, that share the unpacking of a page */
#define ROWS 4  /* queries, positions and vectors of the head that are multiplied at a time: 4 x 4 sums fit the registers */

static inline long up(long n, long to) { return (n + to - 1) / to * to; }
static inline long least(long a, long b) { return a < b ? a : b; }

/* `count` elements of a page as float32, with zeros up to a whole vector. */
INLINE void unpack_some(long kind, const void *pages, long at, long count, float *out) {
    long whole = count / W * W;
    for (long i = 0; i < whole; i += W) {
        if (kind == E4M3) STORE(out + i, decode_e4m3(LOAD(vb, (const uint8_t *)pages + at + i)));
        if (kind == BF16) STORE(out + i, widen_bf16(LOAD(vh, (const uint16_t *)pages + at + i)));
        if (kind == F32) STORE(out + i, LOAD(vf, (const float *)pages + at + i));
    }
    if (whole == count) return;
    uint8_t codes[4 * W] = {0};
    long size = kind == E4M3 ? 1 : kind == BF16 ? 2 : 4;
    memcpy(codes, (const uint8_t *)pages + (at + whole) * size, (count - whole) * size);
    STORE(out + whole, kind == E4M3 ? decode_e4m3(LOAD(vb, codes)) : kind == BF16 ? widen_bf16(LOAD(vh, codes)) : LOAD(vf, codes));
}

#if HAVE_TABLES

/* The beginning of a row of e4m3 codes, as far as whole vectors go; returns how many those were. The two bytes that the tables give
 * are the upper half of a float. */
static long unpack_codes(const uint8_t *codes, long count, float *out) {
    struct tables t = load_tables();
    __m512i place[4];
    for (int part = 0; part < 4; part++) {
        uint8_t bytes[64];
        for (int i = 0; i < 16; i++) bytes[4 * i + 2] = part * 16 + i, bytes[4 * i + 3] = part * 16 + i + 64, bytes[4 * i] = bytes[4 * i + 1] = 0;
        place[part] = _mm512_loadu_si512(bytes);
    }
    long done = 0;
    for (; done + 64 <= count; done += 64) {
        __m512i low, high = look_up(&t, _mm512_loadu_si512(codes + done), &low);
        UNROLL for (int part = 0; part < 4; part++)
            _mm512_storeu_si512(out + done + part * 16, _mm512_maskz_permutex2var_epi8(0xcccccccccccccccc, low, place[part], high));
    }
    return done;
}

#else

static long unpack_codes(const uint8_t *codes, long count, float *out) {
    (void)codes, (void)count, (void)out;
    return 0;
}

#endif

static void unpack(long kind, const void *pages, long at, long count, float *out) {
    if (kind == E4M3) {
        long done = unpack_codes((const uint8_t *)pages + at, count, out);
        unpack_some(E4M3, pages, at + done, count - done, out + done);
    } else if (kind == BF16)
        unpack_some(BF16, pages, at, count, out);
    else
        unpack_some(F32, pages, at, count, out);
}

struct attend_job {
    const float *q;
    const void *pages;
    long kind, N, K, P, H, M, ldq;
    const int32_t *start, *count, *block;
    float key_scale, value_scale; /* of what the cache holds; the key's with 1 / sqrt(H) in it */
    float *out;
    const int32_t (*pieces)[3]; /* chunk, its first token among all, first token of the piece within the chunk */
    long tokens;                /* of a piece */
};

/* What a piece works with: rows of queries and of sums, a page of keys or values, and the running softmax. */
struct attend_room {
    float *q, *sum, *page, *score, *most, *total;
    long ldh, ldp;
};

static struct attend_room make_room(const struct attend_job *j, long rows) {
    long ldh = up(j->H, W), ldp = up(j->P, W);
    float *at = scratch(3, (2 * rows * ldh + j->P * ldh + rows * ldp + 2 * rows) * 4);
    struct attend_room room = {at, at + rows * ldh, at + 2 * rows * ldh, 0, 0, 0, ldh, ldp};
    room.score = room.page + j->P * ldh;
    room.most = room.score + rows * ldp;
    room.total = room.most + rows;
    return room;
}

/* Scores of ROWS queries (the last one repeated where fewer are left) for the first `seen` positions of the page. */
static void score_rows(const struct attend_room *room, long r0, long rows, long seen) {
    const float *q[ROWS];
    for (int r = 0; r < ROWS; r++) q[r] = room->q + (r0 + least(r, rows - 1)) * room->ldh;
    for (long p = 0; p < seen; p += ROWS) {
        const float *k[ROWS];
        for (int i = 0; i < ROWS; i++) k[i] = room->page + least(p + i, seen - 1) * room->ldh;
        vf sum[ROWS][ROWS];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int i = 0; i < ROWS; i++) sum[r][i] = SPLAT(0);
        for (long h = 0; h < room->ldh; h += W) {
            vf key[ROWS];
            UNROLL for (int i = 0; i < ROWS; i++) key[i] = LOAD(vf, k[i] + h);
            UNROLL for (int r = 0; r < ROWS; r++) {
                vf query = LOAD(vf, q[r] + h);
                UNROLL for (int i = 0; i < ROWS; i++) sum[r][i] += query * key[i];
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            float four[ROWS];
            join_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3], four);
            if (r < rows) memcpy(room->score + (r0 + r) * room->ldp + p, four, least(ROWS, room->ldp - p) * 4);
        }
    }
}

/* Turn scores into weights against the running maximum, and rescale what was summed before; positions from `seen` on weigh 0. */
static void weigh_row(const struct attend_room *room, long r, long seen) {
    float *score = room->score + r * room->ldp, *sum = room->sum + r * room->ldh, most = room->most[r], part[W];
    for (long p = seen; p < room->ldp; p++) score[p] = -INFINITY;
    vf largest = LOAD(vf, score), total = SPLAT(0);
    for (long p = W; p < room->ldp; p += W) largest = larger(largest, LOAD(vf, score + p));
    STORE(part, largest);
    for (int i = 0; i < W; i++) most = part[i] > most ? part[i] : most;
    float factor = expf(room->most[r] - most);
    for (long p = 0; p < room->ldp; p += W) {
        vf below = LOAD(vf, score + p) - most;
        vf weight = pick((vi)(below < SPLAT(-87.f)), SPLAT(0), exponential(below));
        weight = pick((vi)(below == below), weight, below); /* what is not a number stays so */
        STORE(score + p, weight);
        total += weight;
    }
    room->total[r] = room->total[r] * factor + join(total);
    room->most[r] = most;
    for (long h = 0; h < room->ldh; h += W) STORE(sum + h, LOAD(vf, sum + h) * factor);
}

/* Add the first `seen` values of the page, weighted, to the sums of ROWS queries; a query that sees fewer has weights of 0. */
INLINE void add_some_values(const struct attend_room *room, long r0, int rows, long h, int wide, long seen) {
    vf sum[ROWS][ROWS];
    const float *value = room->page + h, *weight = room->score + r0 * room->ldp;
    float *out = room->sum + r0 * room->ldh + h;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++) sum[r][i] = LOAD(vf, out + r * room->ldh + i * W);
    for (long p = 0; p < seen; p++, value += room->ldh) {
        UNROLL for (int r = 0; r < rows; r++) {
            vf share = SPLAT(weight[r * room->ldp + p]);
            UNROLL for (int i = 0; i < wide; i++) sum[r][i] += share * LOAD(vf, value + i * W);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++) STORE(out + r * room->ldh + i * W, sum[r][i]);
}

static void add_values(const struct attend_room *room, long r0, long rows, long seen) {
    for (long h = 0; h < room->ldh;) {
        int wide = room->ldh - h >= ROWS * W ? ROWS : 1;
        if (rows >= ROWS && wide == ROWS)
            add_some_values(room, r0, ROWS, h, ROWS, seen);
        else if (wide == ROWS)
            for (long r = 0; r < least(rows, ROWS); r++) add_some_values(room, r0 + r, 1, h, ROWS, seen);
        else
            for (long r = 0; r < least(rows, ROWS); r++) add_some_values(room, r0 + r, 1, h, 1, seen);
        h += wide * W;
    }
}

/* All rows of a piece against one page; the first token sees `first_seen` of its positions, each later one a position more. */
static void attend_page(const struct attend_job *j, const struct attend_room *room, long page, long head, long first_seen, long tokens) {
    long group = j->N / j->K, rows = tokens * group, last_seen = least(first_seen + tokens - 1, j->P);
    long blind = first_seen > 0 ? 0 : (1 - first_seen) * group; /* rows of tokens before this page */
    for (int values = 0; values < 2; values++) {
        long at = ((page * 2 + values) * j->K + head) * j->P * j->H;
        if (room->ldh == j->H)
            unpack(j->kind, j->pages, at, last_seen * j->H, room->page);
        else
            for (long p = 0; p < last_seen; p++) unpack(j->kind, j->pages, at + p * j->H, j->H, room->page + p * room->ldh);
        for (long r0 = blind; r0 < rows; r0 += ROWS) {
            if (values) {
                add_values(room, r0, rows - r0, last_seen);
                continue;
            }
            score_rows(room, r0, rows - r0, last_seen);
            for (long r = r0; r < least(r0 + ROWS, rows); r++) weigh_row(room, r, least(first_seen + r / group, j->P));
        }
    }
}

/* Pages lie anywhere, so no processor guesses which one is next. */
static void ask_for_page(const struct attend_job *j, long page, long head) {
    long bytes = j->P * j->H * (j->kind == E4M3 ? 1 : j->kind == BF16 ? 2 : 4);
    for (int values = 0; values < 2; values++) {
        const uint8_t *at = (const uint8_t *)j->pages + ((page * 2 + values) * j->K + head) * bytes;
        for (long i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
    }
}

static void attend_piece(const struct attend_job *j, long index) {
    const int32_t *piece = j->pieces[index / j->K];
    long head = index % j->K, group = j->N / j->K, chunk = piece[0], first = piece[2], start = j->start[chunk] + first;
    long tokens = least(j->tokens, j->count[chunk] - first), rows = tokens * group, row0 = piece[1] + first;
    struct attend_room room = make_room(j, rows);
    for (long r = 0; r < rows; r++) {
        const float *q = j->q + (row0 + r / group) * j->ldq + (head * group + r % group) * j->H;
        for (long h = 0; h < room.ldh; h++) room.q[r * room.ldh + h] = h < j->H ? q[h] * j->key_scale : 0;
        room.most[r] = -INFINITY;
        room.total[r] = 0;
    }
    memset(room.sum, 0, rows * room.ldh * 4);
    const int32_t *page = j->block + chunk * j->M;
    for (long p = 0; p < start + tokens; p += j->P, page++) {
        if (p + j->P < start + tokens) ask_for_page(j, page[1], head);
        attend_page(j, &room, *page, head, start + 1 - p, tokens);
    }
    for (long r = 0; r < rows; r++) {
        float *out = j->out + ((row0 + r / group) * j->N + head * group + r % group) * j->H;
        for (long h = 0; h < j->H; h++) out[h] = room.sum[r * room.ldh + h] / room.total[r] * j->value_scale;
    }
}

static void attend_part(void *job, long begin, long end) {
    for (long index = begin; index < end; index++) attend_piece(job, index);
}

EXPORT void attend(const float *q, const void *pages, long kind, long N, long K, long P, long H, const int32_t *start,
                   const int32_t *count, const int32_t *block, long C, long M, long ldq, const float *scale, float *out) {
    float factor = scale ? *scale : 1;
    long tokens = TILE / (N / K) > 0 ? TILE / (N / K) : 1, num = 0, token = 0;
    for (long c = 0; c < C; c++) num += (count[c] + tokens - 1) / tokens;
    int32_t(*pieces)[3] = scratch(2, num * sizeof *pieces);
    num = 0;
    for (long c = 0; c < C; token += count[c], c++)
        for (long first = 0; first < count[c]; first += tokens) {
            pieces[num][0] = c, pieces[num][1] = token, pieces[num][2] = first;
            num++;
        }
    struct attend_job job = {q, pages, kind, N, K, P, H, M, ldq, start, count, block, factor / sqrtf(H), factor, out,
                             (const int32_t(*)[3])pieces, tokens};
    run_parts(attend_part, &job, num * K);
}

struct store_job {
    const float *k, *v;
    void *pages;
    const int64_t *slot;
    long K, P, H, ld, kind;
    float scale;
};

static void store_token(const struct store_job *j, long t) {
    long page = j->slot[t] / j->P, position = j->slot[t] % j->P;
    for (int values = 0; values < 2; values++)
        for (long head = 0; head < j->K; head++) {
            const float *x = (values ? j->v : j->k) + t * j->ld + head * j->H;
            long at = (((page * 2 + values) * j->K + head) * j->P + position) * j->H;
            for (long h = 0; h < j->H; h += W) {
                float some[W] = {0};
                long count = least(W, j->H - h);
                memcpy(some, x + h, count * 4);
                if (j->kind == F32) {
                    memcpy((float *)j->pages + at + h, some, count * 4);
                } else if (j->kind == BF16) {
                    vu bits = LOAD(vu, some);
                    vh rounded = narrow16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                    memcpy((uint16_t *)j->pages + at + h, &rounded, count * 2);
                } else {
                    vb codes = encode_e4m3(round_e4m3(LOAD(vf, some) / j->scale));
                    memcpy((uint8_t *)j->pages + at + h, &codes, count);
                }
            }
        }
}

static void store_part(void *job, long begin, long end) {
    for (long t = begin; t < end; t++) store_token(job, t);
}

EXPORT void store_kv(const float *k, const float *v, void *pages, const int64_t *slot, long T, long K, long P, long H, long ld,
                     long kind, const float *scale) {
    struct store_job job = {k, v, pages, slot, K, P, H, ld, kind, scale ? *scale : 1};
    run_parts(store_part, &job, T);
}
