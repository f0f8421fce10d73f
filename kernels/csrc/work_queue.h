/* Tasks shared out among the threads of a team: each takes its own in order, then what others have left.
 *
 * So weights are read in the order of memory, a thread knows what it will read next, and one that is held up by somebody
 * else's work keeps nobody waiting for more than one task.
 */
#ifndef OCTAVO_WORK_QUEUE_H
#define OCTAVO_WORK_QUEUE_H

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vector.h"

typedef struct {
    int64_t next, end;
    char apart[48]; /* a cache line for each */
} work_queue;

INLINE int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

INLINE void fill_queue(work_queue *queues, int num_queues, int index, int64_t num_tasks) {
    queues[index].next = num_tasks * index / num_queues;
    queues[index].end = num_tasks * (index + 1) / num_queues;
}

/* The next task for thread `own`, or -1 when all are taken. */
INLINE int64_t take_task(work_queue *queues, int num_queues, int own) {
    for (int i = 0; i < num_queues; i++) {
        work_queue *queue = queues + (own + i) % num_queues;
        if (__atomic_load_n(&queue->next, __ATOMIC_RELAXED) >= queue->end) continue;
        int64_t task = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (task < queue->end) return task;
    }
    return -1;
}

/* Parts of at most max_size of `size` things, at least `least` for each thread, and alike for all threads. */
INLINE int64_t num_parts(int64_t size, int64_t max_size, int64_t least, int num_threads) {
    int64_t parts = max64((size + max_size - 3) / (max_size - 2), least * num_threads);
    return (parts + num_threads - 1) / num_threads * num_threads;
}

#endif
