/* Binds the threads of an OpenMP team to cores: see thread_binding.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>

#ifdef __linux__
#include <sched.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __linux__
/* Binds the calling thread; 0 or an errno. */
static int bind_here(int32_t cpu) {
    cpu_set_t *set = CPU_ALLOC(cpu + 1);
    size_t size = CPU_ALLOC_SIZE(cpu + 1);
    if (!set) return ENOMEM;
    CPU_ZERO_S(size, set);
    CPU_SET_S(cpu, size, set);
    int error = sched_setaffinity(0, size, set) ? errno : 0;
    CPU_FREE(set);
    return error;
}
#endif

/* cpus: [num_threads], one for each thread of the calling thread's team, the caller itself first. Returns 0; the errno of
 * a thread that could not be bound; or -1 and has bound none where the team has fewer threads. */
int octavo_bind_team(const int32_t *cpus, int num_threads) {
#ifdef __linux__
    int failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
#ifdef _OPENMP
        int index = omp_get_thread_num(), size = omp_get_num_threads();
#else
        int index = 0, size = 1;
#endif
        if (size < num_threads) {
#pragma omp atomic write
            failed = -1;
        } else {
            int error = bind_here(cpus[index]);
            if (error) {
#pragma omp atomic write
                failed = error;
            }
        }
    }
    return failed;
#else
    (void)cpus;
    (void)num_threads;
    return ENOSYS;
#endif
}
