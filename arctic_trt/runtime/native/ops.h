/* The operations of a step. T tokens, D hidden, F ffn, E experts, N rows and K columns of weights. Activations are float32 rows
 * without gaps; scales come as pointers into the engine file, NULL where weights have none. */
#pragma once
#include <stdint.h>

#define BLOCK_TOKENS 512 /* whose activations are held at a time, so that they stay in the cache and take little memory */
#define EXPORT __attribute__((visibility("default")))

void rms_norm(const float *x, const float *weight, float *y, long T, long D, float eps);

/* Rotate the first `heads` heads of each row of x [T, stride] in place; cos and sin are [T, H]. */
void rotary(float *x, const float *cos, const float *sin, long T, long heads, long stride, long H);

/* y [M, N] = alpha * (x [M, K] rounded by scale) times the rows of the weights [N, K]. */
void project(const float *x, long M, const void *data, long kind, long N, long K, const float *scale, const float *alpha, float *y);

/* chosen and share [T, top]: the likeliest experts by the softmax over w [E, D] times x, their shares adding up to 1. */
void route(const float *x, long T, const void *data, long kind, long E, long D, long top, int64_t *chosen, float *share);

/* One gated MLP: y [M, D] = proj(silu(a) * b), a the first F rows of fc and b its others. */
void gated_mlp(const float *x, long M, long D, long F, const void *fc, long fc_kind, const float *fc_scale, const float *fc_alpha,
               const void *proj, long proj_kind, const float *proj_scale, const float *proj_alpha, float *y);

/* y [T, D] += the weighted outputs of the chosen experts among the E from `first` on. fc is [E, 2F, D], its last F rows go
 * through SiLU; proj is [E, D, F]; the alphas are [E]. */
void experts(const float *x, long T, long D, long F, const int64_t *chosen, const float *share, long top, long first, long E,
             const void *fc, long fc_kind, const float *fc_scale, const float *fc_alpha, const void *proj, long proj_kind,
             const float *proj_scale, const float *proj_alpha, float *y);

/* y [T, D] += x [T, D]. */
void add(const float *x, float *y, long T, long D);

/* Attention over pages [pages, 2, K, P, H] of the cache for C chunks, T tokens: out [T, N * H] for queries q [T, ldq], of which the
 * first N * H are used; start and count are [C], block is [C, M]. */
void attend(const float *q, const void *pages, long kind, long N, long K, long P, long H, const int32_t *start, const int32_t *count,
            const int32_t *block, long C, long M, long ldq, const float *scale, float *out);

/* Keys and values, K heads of each of T rows that are `ld` apart, into positions slot[t] = page * P + offset. */
void store_kv(const float *k, const float *v, void *pages, const int64_t *slot, long T, long K, long P, long H, long ld, long kind,
              const float *scale);
