/* Threads that share out the units of one job at a time.
 *
 * Between two jobs of a step there are microseconds, so workers spin for a while before they sleep; the caller never waits for
 * a worker that has not come. Which thread does which piece changes nothing about the results.
 */
#pragma once
#include <stdatomic.h>

/* Does units `begin` to `end` of a job. */
typedef void (*part_fn)(void *job, long begin, long end);

/* Have `units` units done by the caller and whoever is free; returns when all are done. One job at a time. Parts are long at first,
 * because consecutive units are read faster, and short at last, so that nobody waits for long. */
void run_parts(part_fn part, void *job, long units);

/* How many threads share out a job. */
long num_threads(void);

/* Memory that stays with the calling thread: at least `bytes`, 64-byte aligned, content undefined. */
#define SCRATCH_SLOTS 13
void *scratch(int slot, long bytes);
