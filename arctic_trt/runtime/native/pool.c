#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#define OPEN (1 << 30)
#define SPIN_NS 200000L
#define MAX_THREADS 1024

static struct {
    part_fn part;
    void *job;
    long units;
    atomic_long next;
    atomic_int gate; /* OPEN while a job takes workers, plus the number of workers that are in it */
    atomic_long jobs;
    atomic_int sleepers;
    atomic_int threads;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void take_parts(void) {
    long shares = 3 * atomic_load(&pool.threads), begin = atomic_load(&pool.next);
    while (begin < pool.units) {
        long share = (pool.units - begin) / shares, end = begin + (share > 1 ? share : 1);
        if (!atomic_compare_exchange_weak(&pool.next, &begin, end)) continue;
        pool.part(pool.job, begin, end);
        begin = atomic_load(&pool.next);
    }
}

static int enter(void) {
    int gate = atomic_load(&pool.gate);
    while (gate & OPEN)
        if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1)) return 1;
    return 0;
}

/* Returns once a job has been opened that is not the `seen`-th. */
static void await_job(long seen) {
    long began = now_ns();
    for (int turn = 1; atomic_load(&pool.jobs) == seen; turn++) {
        relax();
        if (turn % 64 || now_ns() - began < SPIN_NS) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.sleepers, 1);
        while (atomic_load(&pool.jobs) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.sleepers, 1);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void *work(void *unused) {
    for (long seen = 0;;) {
        await_job(seen);
        seen = atomic_load(&pool.jobs);
        if (enter()) {
            take_parts();
            atomic_fetch_sub(&pool.gate, 1);
        }
    }
    return unused;
}

/* Use `threads` threads, the caller's included; returns how many there are, which never become fewer. */
__attribute__((visibility("default"))) int set_threads(int threads) {
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; atomic_load(&pool.threads) < threads && threads <= MAX_THREADS;) {
        if (pthread_create(&thread, &detached, work, NULL)) break;
        atomic_fetch_add(&pool.threads, 1);
    }
    pthread_attr_destroy(&detached);
    return atomic_load(&pool.threads);
}

long num_threads(void) { return atomic_load(&pool.threads); }

void run_parts(part_fn part, void *job, long units) {
    if (units < 2 || atomic_load(&pool.threads) < 2) {
        part(job, 0, units);
        return;
    }
    pool.part = part;
    pool.job = job;
    pool.units = units;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.gate, OPEN);
    atomic_fetch_add(&pool.jobs, 1);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    take_parts();
    atomic_fetch_and(&pool.gate, ~OPEN);
    for (int turn = 1; atomic_load(&pool.gate); turn++) {
        relax();
        if (turn % 256 == 0) sched_yield(); /* a worker may have lost its core to somebody else */
    }
}

void *scratch(int slot, long bytes) {
    static _Thread_local struct {
        void *memory;
        long bytes;
    } kept[SCRATCH_SLOTS];
    if (kept[slot].bytes < bytes) {
        free(kept[slot].memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        kept[slot].memory = aligned_alloc(4096, bytes);
        if (!kept[slot].memory) abort();
        kept[slot].bytes = bytes;
    }
    return kept[slot].memory;
}
