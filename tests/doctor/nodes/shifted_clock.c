/* Shifts CLOCK_REALTIME by CLOCK_SHIFT_S seconds; preloaded into the programs of one node, whose clock is wrong then.
 * A time namespace would shift monotonic clocks only, and the lab's nodes share the machine's clock. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
    const char *text = getenv("CLOCK_SHIFT_S");
    return text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int status = syscall(SYS_clock_gettime, clock, time);
    if (status == 0 && clock == CLOCK_REALTIME)
        time->tv_sec += shift();
    return status;
}
