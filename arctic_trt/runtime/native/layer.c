/* A layer in two calls, between which ranks add up their parts: Python would take as long for the single operations of a decode step
 * as the memory takes for a tenth of its weights. */
#include <string.h>

#include "ops.h"
#include "pool.h"

static inline long least(long a, long b) { return a < b ? a : b; }

/* As in layer.py. N rows and K columns are those of one expert. */
struct projection {
    const void *data;
    long kind, N, K;
    const float *scale, *alpha;
};

struct layer {
    const float *input_norm, *post_norm, *residual_norm;
    struct projection qkv, dense, router, expert_fc, expert_proj, residual_fc, residual_proj;
    const float *kv_scale;
    long D, heads, kv_heads, H, top, first_expert, experts;
    float eps;
};

static void apply(const struct projection *p, const float *x, long M, float *y) {
    project(x, M, p->data, p->kind, p->N, p->K, p->scale, p->alpha, y);
}

/* The part y [T, D] of attention's output projection that comes from this rank's heads; x [T, D] is the layer's input. */
EXPORT void attention_part(const struct layer *l, const float *x, long T, const float *cos, const float *sin, const int64_t *slot,
                           const int32_t *start, const int32_t *count, const int32_t *block, long C, long M, void *pages,
                           long pages_kind, long P, float *y) {
    long heads = l->heads, kv_heads = l->kv_heads, H = l->H, ld = (heads + 2 * kv_heads) * H;
    float *normed = scratch(8, least(T, BLOCK_TOKENS) * l->D * 4), *qkv = scratch(9, T * ld * 4), *out = scratch(10, T * heads * H * 4);
    for (long t = 0; t < T; t += BLOCK_TOKENS) {
        long tokens = least(BLOCK_TOKENS, T - t);
        rms_norm(x + t * l->D, l->input_norm, normed, tokens, l->D, l->eps);
        apply(&l->qkv, normed, tokens, qkv + t * ld);
    }
    rotary(qkv, cos, sin, T, heads + kv_heads, ld, H);
    float *k = qkv + heads * H, *v = k + kv_heads * H;
    store_kv(k, v, pages, slot, T, kv_heads, P, H, ld, pages_kind, l->kv_scale);
    attend(qkv, pages, pages_kind, heads, kv_heads, P, H, start, count, block, C, M, ld, l->kv_scale, out);
    apply(&l->dense, out, T, y);
}

static void some_mlp(const struct layer *l, const float *x, const float *sum, long T, float *y) {
    const struct projection *fc = &l->expert_fc, *proj = &l->expert_proj, *up = &l->residual_fc, *down = &l->residual_proj;
    float *normed = scratch(8, T * l->D * 4), *residual = scratch(9, T * l->D * 4);
    int64_t *chosen = scratch(11, T * l->top * 8);
    float *share = scratch(12, T * l->top * 4);
    rms_norm(x, l->post_norm, normed, T, l->D, l->eps);
    route(normed, T, l->router.data, l->router.kind, l->router.N, l->D, l->top, chosen, share);
    memset(y, 0, T * l->D * 4);
    experts(normed, T, l->D, proj->K, chosen, share, l->top, l->first_expert, l->experts, fc->data, fc->kind, fc->scale, fc->alpha,
            proj->data, proj->kind, proj->scale, proj->alpha, y);
    rms_norm(sum, l->residual_norm, normed, T, l->D, l->eps);
    gated_mlp(normed, T, l->D, down->K, up->data, up->kind, up->scale, up->alpha, down->data, down->kind, down->scale, down->alpha,
              residual);
    add(residual, y, T, l->D);
}

/* This rank's part y [T, D] of experts and residual MLP; x is the layer's input, sum the same with attention added. */
EXPORT void mlp_part(const struct layer *l, const float *x, const float *sum, long T, float *y) {
    for (long t = 0; t < T; t += BLOCK_TOKENS)
        some_mlp(l, x + t * l->D, sum + t * l->D, least(BLOCK_TOKENS, T - t), y + t * l->D);
}
