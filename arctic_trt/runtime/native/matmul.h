/* Products of activations with weights that lie row by row as the engine file has them. */
#pragma once
#include <stdint.h>

enum kind { E4M3, BF16, F32 }; /* of the weights */

/* Rows of weights [N, K], K consecutive elements each; `alpha` scales the products. */
struct weights {
    const void *data;
    long kind, N, K;
    float alpha;
};

/* Where products go: row m of them to row `row[m]` of y, times share[m]; added to what is there if share is given.
 * Both may be NULL: row m then goes to row m. */
struct sink {
    float *y;
    long ld;
    const int32_t *row;
    const float *share;
};

/* Bytes that a prepared row of K elements takes. */
long prepared_bytes(long kind, long K);

/* Bring a row of K elements into the form in which it is multiplied: rounded to e4m3 after division by `scale` where the weights
 * are e4m3. Runs in the calling thread, as the next does. */
void prepare(long kind, const float *x, long K, float scale, void *prepared);

/* Rows n0 to n1 of the weights with M prepared rows. */
void multiply(const void *prepared, long M, const struct weights *w, long n0, long n1, struct sink to);
