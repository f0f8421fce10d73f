/* What the processor's multipliers can do at most: see `--products` of bench_cpu.py. */
#include "vector.h"

/* Makes 12 * rounds products of VL numbers and as many sums, none of which waits for another of its round. Returns a sum of
 * them all, so that none is left out. */
float octavo_multiply_adds(int64_t rounds) {
    vf a = splat(0.999f), b = splat(1e-3f);
    vf c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a, c10 = a, c11 = a;
    while (rounds--) {
#define MULTIPLY_ADD(c) KEEP(c); c = fma_f(c, a, b)
        MULTIPLY_ADD(c0);
        MULTIPLY_ADD(c1);
        MULTIPLY_ADD(c2);
        MULTIPLY_ADD(c3);
        MULTIPLY_ADD(c4);
        MULTIPLY_ADD(c5);
        MULTIPLY_ADD(c6);
        MULTIPLY_ADD(c7);
        MULTIPLY_ADD(c8);
        MULTIPLY_ADD(c9);
        MULTIPLY_ADD(c10);
        MULTIPLY_ADD(c11);
    }
    return sum_lanes(((c0 + c1) + (c2 + c3)) + ((c4 + c5) + (c6 + c7)) + ((c8 + c9) + (c10 + c11)));
}

int octavo_vector_lanes(void) { return VL; }
