/* What Python calls: norms, routing, rotation and the projections, each shared out over the threads of the pool.
 *
 * T tokens, D hidden, F ffn, E experts, N rows and K columns of weights. Activations are float32 rows without gaps.
 */
#include <math.h>
#include <stdlib.h>

#include "matmul.h"
#include "ops.h"
#include "pool.h"
#include "vec.h"

#define UNIT_ROWS 32     /* rows of weights that a thread takes at a time, at least */

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long units_of(long rows) { return (rows + UNIT_ROWS - 1) / UNIT_ROWS; }

static inline float value_of(const float *scale) { return scale ? *scale : 1; }

/* ---- small things, a row at a time ---- */

/* Rows that are short and few are less work than waking anybody. */
static void run_rows(part_fn part, void *job, long rows, long columns) {
    if (rows * columns < 1 << 15)
        part(job, 0, rows);
    else
        run_parts(part, job, rows);
}

#define PART_OF_ROWS(name)                                                 \
    static void name##_part(void *job, long begin, long end) {             \
        for (long row = begin; row < end; row++) name##_row(job, row);     \
    }

struct norm_job {
    const float *x, *weight;
    float *y;
    long T, D;
    float eps;
};

static void norm_row(const struct norm_job *j, long t) {
    const float *x = j->x + t * j->D;
    float *y = j->y + t * j->D, squares = 0;
    long whole = j->D / W * W;
    vf sum = SPLAT(0);
    for (long d = 0; d < whole; d += W) sum += LOAD(vf, x + d) * LOAD(vf, x + d);
    for (long d = whole; d < j->D; d++) squares += x[d] * x[d];
    float factor = 1.f / sqrtf((join(sum) + squares) / j->D + j->eps);
    for (long d = 0; d < whole; d += W) STORE(y + d, LOAD(vf, x + d) * factor * LOAD(vf, j->weight + d));
    for (long d = whole; d < j->D; d++) y[d] = x[d] * factor * j->weight[d];
}

PART_OF_ROWS(norm)

EXPORT void rms_norm(const float *x, const float *weight, float *y, long T, long D, float eps) {
    struct norm_job job = {x, weight, y, T, D, eps};
    run_rows(norm_part, &job, T, D);
}

struct rotary_job {
    float *x;
    const float *cos, *sin;
    long heads, stride, H;
};

static void rotary_row(const struct rotary_job *j, long t) {
    const float *cos = j->cos + t * j->H, *sin = j->sin + t * j->H;
    long half = j->H / 2;
    for (long head = 0; head < j->heads; head++) {
        float *RESTRICT left = j->x + t * j->stride + head * j->H, *RESTRICT right = left + half;
        for (long h = 0; h < half; h++) {
            float a = left[h], b = right[h];
            left[h] = a * cos[h] - b * sin[h];
            right[h] = b * cos[half + h] + a * sin[half + h];
        }
    }
}

PART_OF_ROWS(rotary)

EXPORT void rotary(float *x, const float *cos, const float *sin, long T, long heads, long stride, long H) {
    struct rotary_job job = {x, cos, sin, heads, stride, H};
    run_rows(rotary_part, &job, T, heads * H);
}

struct route_job {
    const float *logits;
    int64_t *chosen;
    float *share;
    long E, top;
};

static void route_row(const struct route_job *j, long t) {
    const float *logits = j->logits + t * j->E;
    int64_t *chosen = j->chosen + t * j->top;
    float *share = j->share + t * j->top, largest = logits[0], all = 0, taken = 0;
    for (long e = 1; e < j->E; e++) largest = logits[e] > largest ? logits[e] : largest;
    for (long e = 0; e < j->E; e++) all += expf(logits[e] - largest);
    for (long k = 0; k < j->top; k++) {
        long best = -1;
        for (long e = 0; e < j->E; e++) {
            int free = 1;
            for (long i = 0; i < k; i++) free &= chosen[i] != e;
            if (free && (best < 0 || logits[e] > logits[best])) best = e;
        }
        chosen[k] = best;
        share[k] = expf(logits[best] - largest) / all;
        taken += share[k];
    }
    for (long k = 0; k < j->top && j->top > 1; k++) share[k] /= taken;
}

PART_OF_ROWS(route)

/* ---- projections ---- */

struct project_job {
    const struct weights *w;
    const void *x;
    long M;
    struct sink to;
};

static void project_part(void *job, long begin, long end) {
    const struct project_job *j = job;
    multiply(j->x, j->M, j->w, begin * UNIT_ROWS, least(end * UNIT_ROWS, j->w->N), j->to);
}

static void multiply_all(const struct weights *w, const void *x, long M, float *y) {
    struct project_job job = {w, x, M, {y, w->N, NULL, NULL}};
    run_parts(project_part, &job, units_of(w->N));
}

struct prepare_job {
    long kind, K;
    const float *x;
    const int32_t *from;
    float scale;
    void *out;
};

static void prepare_row(const struct prepare_job *j, long m) {
    const float *row = j->x + (j->from ? j->from[m] : m) * j->K;
    prepare(j->kind, row, j->K, j->scale, (uint8_t *)j->out + m * prepared_bytes(j->kind, j->K));
}

PART_OF_ROWS(prepare)

/* Rows of x in the form in which they are multiplied; `from` (NULL: all in order) picks them. */
static const void *prepare_rows(long kind, const float *x, const int32_t *from, long M, long K, float scale) {
    void *out = scratch(1, M * prepared_bytes(kind, K));
    struct prepare_job job = {kind, K, x, from, scale, out};
    run_rows(prepare_part, &job, M, K);
    return out;
}

EXPORT void project(const float *x, long M, const void *data, long kind, long N, long K, const float *scale,
                    const float *alpha, float *y) {
    struct weights w = {data, kind, N, K, value_of(alpha)};
    for (long m = 0; m < M; m += BLOCK_TOKENS) {
        long rows = least(BLOCK_TOKENS, M - m);
        multiply_all(&w, prepare_rows(kind, x + m * K, NULL, rows, K, value_of(scale)), rows, y + m * N);
    }
}

EXPORT void route(const float *x, long T, const void *data, long kind, long E, long D, long top, int64_t *chosen, float *share) {
    float *logits = scratch(2, T * E * 4);
    project(x, T, data, kind, E, D, NULL, NULL, logits);
    struct route_job job = {logits, chosen, share, E, top};
    run_rows(route_part, &job, T, 64 * E);
}

struct gate_job {
    const float *h; /* [M, 2F] */
    long F, kind, second;
    float scale;
    void *out;
};

/* silu(one half) * other half of a row, prepared for the next product; the second half goes through SiLU if `second`. */
static void gate_row(const struct gate_job *j, long m) {
    float *inner = scratch(3, (j->F + W) * 4);
    const float *first = j->h + m * 2 * j->F, *last = first + j->F;
    const float *through = j->second ? last : first, *plain = j->second ? first : last;
    long f = 0;
    for (; f + W <= j->F; f += W) STORE(inner + f, silu(LOAD(vf, through + f)) * LOAD(vf, plain + f));
    if (f < j->F) {
        float a[W] = {0}, b[W] = {0};
        memcpy(a, through + f, (j->F - f) * 4);
        memcpy(b, plain + f, (j->F - f) * 4);
        STORE(inner + f, silu(LOAD(vf, a)) * LOAD(vf, b));
    }
    prepare(j->kind, inner, j->F, j->scale, (uint8_t *)j->out + m * prepared_bytes(j->kind, j->F));
}

PART_OF_ROWS(gate)

EXPORT void gated_mlp(const float *x, long M, long D, long F, const void *fc, long fc_kind, const float *fc_scale,
                      const float *fc_alpha, const void *proj, long proj_kind, const float *proj_scale, const float *proj_alpha, float *y) {
    struct weights up = {fc, fc_kind, 2 * F, D, value_of(fc_alpha)}, down = {proj, proj_kind, D, F, value_of(proj_alpha)};
    for (long m = 0; m < M; m += BLOCK_TOKENS) {
        long rows = least(BLOCK_TOKENS, M - m);
        float *h = scratch(4, rows * 2 * F * 4);
        multiply_all(&up, prepare_rows(fc_kind, x + m * D, NULL, rows, D, value_of(fc_scale)), rows, h);
        void *inner = scratch(5, rows * prepared_bytes(proj_kind, F));
        struct gate_job gate = {h, F, proj_kind, 0, value_of(proj_scale), inner};
        run_rows(gate_part, &gate, rows, 4 * F);
        multiply_all(&down, inner, rows, y + m * D);
    }
}

/* ---- experts ---- */

struct experts_job {
    const struct weights *fc, *proj; /* one for each expert that is held */
    const int32_t *begin;            /* [E + 1]: where each expert's tokens begin in the lists below */
    const int32_t *token;
    const float *share;
    const int32_t *busy; /* experts that have tokens */
    long num_busy;
    const void *x; /* prepared rows of all tokens, in the order of the lists */
    long x_bytes, inner_bytes;
    float *h, *y;
    void *inner;
};

/* Units are numbered through all busy experts. */
static void expert_fc_part(void *job, long begin, long end) {
    const struct experts_job *j = job;
    long each = units_of(j->fc->N);
    for (long unit = begin, next; unit < end; unit = next) {
        long e = j->busy[unit / each], first = j->begin[e], n0 = unit % each * UNIT_ROWS;
        next = least((unit / each + 1) * each, end);
        const struct weights *w = j->fc + e;
        struct sink to = {j->h + first * w->N, w->N, NULL, NULL};
        const uint8_t *x = (const uint8_t *)j->x + first * j->x_bytes;
        multiply(x, j->begin[e + 1] - first, w, n0, least(n0 + (next - unit) * UNIT_ROWS, w->N), to);
    }
}

/* A unit is some columns of y for all experts, so that every token adds up its experts in ascending order. */
static void expert_proj_part(void *job, long begin, long end) {
    const struct experts_job *j = job;
    for (long i = 0; i < j->num_busy; i++) {
        long e = j->busy[i], first = j->begin[e];
        const struct weights *w = j->proj + e;
        struct sink to = {j->y, w->N, j->token + first, j->share + first};
        const uint8_t *inner = (const uint8_t *)j->inner + first * j->inner_bytes;
        multiply(inner, j->begin[e + 1] - first, w, begin * UNIT_ROWS, least(end * UNIT_ROWS, w->N), to);
    }
}

/* Lists the tokens of each expert held, ascending; fills begin, token, share and busy, and returns how many are busy. */
static long group(const int64_t *chosen, const float *given, long T, long top, long first, long E, int32_t *begin, int32_t *token,
                  float *share, int32_t *busy) {
    long num_busy = 0;
    memset(begin, 0, (E + 2) * 4);
    for (long i = 0; i < T * top; i++)
        if (chosen[i] >= first && chosen[i] < first + E) begin[chosen[i] - first + 2]++;
    for (long e = 0; e < E; e++) {
        if (begin[e + 2]) busy[num_busy++] = e;
        begin[e + 2] += begin[e + 1];
    }
    for (long i = 0; i < T * top; i++) {
        if (chosen[i] < first || chosen[i] >= first + E) continue;
        int32_t at = begin[chosen[i] - first + 1]++; /* ends where the next expert's list begins */
        token[at] = i / top;
        share[at] = given[i];
    }
    return num_busy;
}

static void some_experts(const float *x, long T, long D, long F, const int64_t *chosen, const float *given, long top, long first, long E,
                         const struct weights *fc, float fc_scale, const struct weights *proj, float proj_scale, float *y) {
    int32_t *begin = scratch(6, (2 * E + 2 + 2 * T * top) * 4), *busy = begin + E + 2, *token = busy + E;
    float *share = (float *)(token + T * top);
    long num_busy = group(chosen, given, T, top, first, E, begin, token, share, busy), pairs = begin[E];
    long x_bytes = prepared_bytes(fc->kind, D), inner_bytes = prepared_bytes(proj->kind, F);
    const void *rows = prepare_rows(fc->kind, x, token, pairs, D, fc_scale);
    struct experts_job job = {fc, proj, begin, token, share, busy, num_busy, rows, x_bytes, inner_bytes, scratch(4, pairs * 2 * F * 4), y,
                              scratch(5, pairs * inner_bytes)};
    run_parts(expert_fc_part, &job, num_busy * units_of(2 * F));
    struct gate_job gate = {job.h, F, proj->kind, 1, proj_scale, job.inner};
    run_rows(gate_part, &gate, pairs, 4 * F);
    run_parts(expert_proj_part, &job, units_of(D));
}

EXPORT void experts(const float *x, long T, long D, long F, const int64_t *chosen, const float *share, long top, long first, long E,
                    const void *fc, long fc_kind, const float *fc_scale, const float *fc_alpha, const void *proj,
                    long proj_kind, const float *proj_scale, const float *proj_alpha, float *y) {
    struct weights *up = malloc(2 * E * sizeof *up), *down = up + E;
    if (!up) abort();
    long fc_bytes = 2 * F * D * (fc_kind == E4M3 ? 1 : 2), proj_bytes = D * F * (proj_kind == E4M3 ? 1 : 2);
    for (long e = 0; e < E; e++) {
        up[e] = (struct weights){(const uint8_t *)fc + e * fc_bytes, fc_kind, 2 * F, D, fc_alpha ? fc_alpha[e] : 1};
        down[e] = (struct weights){(const uint8_t *)proj + e * proj_bytes, proj_kind, D, F, proj_alpha ? proj_alpha[e] : 1};
    }
    for (long t = 0; t < T; t += BLOCK_TOKENS)
        some_experts(x + t * D, least(BLOCK_TOKENS, T - t), D, F, chosen + t * top, share + t * top, top, first, E, up, value_of(fc_scale),
                     down, value_of(proj_scale), y + t * D);
    free(up);
}

struct add_job {
    const float *x;
    float *y;
    long D;
};

static void add_row(const struct add_job *j, long t) {
    const float *RESTRICT x = j->x + t * j->D;
    float *RESTRICT y = j->y + t * j->D;
    for (long d = 0; d < j->D; d++) y[d] += x[d];
}

PART_OF_ROWS(add)

EXPORT void add(const float *x, float *y, long T, long D) {
    struct add_job job = {x, y, D};
    run_rows(add_part, &job, T, D);
}

/* ---- measuring ---- */

#define READ_UNIT (1L << 20) /* bytes */

struct read_job {
    const uint8_t *data;
    long bytes;
    long *sums;
};

static void read_part(void *job, long begin, long end) {
    const struct read_job *j = job;
    vi a = {0}, b = {0}, c = {0}, d = {0};
    for (long i = begin * READ_UNIT; i + 16 * W <= least(end * READ_UNIT, j->bytes); i += 16 * W) {
        a ^= LOAD(vi, j->data + i), b ^= LOAD(vi, j->data + i + 4 * W);
        c ^= LOAD(vi, j->data + i + 8 * W), d ^= LOAD(vi, j->data + i + 12 * W);
    }
    a ^= b ^ c ^ d;
    for (int i = 0; i < W; i++) j->sums[begin] += a[i];
}

/* Read `bytes` of memory with all threads; what is returned depends on every byte. */
EXPORT long read_memory(const void *data, long bytes) {
    long units = (bytes + READ_UNIT - 1) / READ_UNIT, sum = 0, *sums = calloc(units, sizeof *sums);
    if (!sums) abort();
    struct read_job job = {data, bytes, sums};
    run_parts(read_part, &job, units);
    for (long i = 0; i < units; i++) sum += sums[i];
    free(sums);
    return sum;
}
