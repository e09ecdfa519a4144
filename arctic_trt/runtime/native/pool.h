/* Threads that share out the pieces of one job at a time.
 *
 * Between two jobs of a step there are microseconds, so workers spin for a while before they sleep; the caller never waits for
 * a worker that has not come. Which thread does which piece changes nothing about the results.
 */
#pragma once
#include <stdatomic.h>

typedef void (*piece_fn)(void *job, long piece);

/* Have `pieces` pieces done by the caller and whoever is free; returns when all are done. One job at a time. */
void run_pieces(piece_fn piece, void *job, long pieces);

/* How many threads share out a job. */
long num_threads(void);

/* Memory that stays with the calling thread: at least `bytes`, 64-byte aligned, content undefined. `slot` is 0 to 7. */
void *scratch(int slot, long bytes);
