/*
 * How a GPU draws: load, clocks and limit give the draw, draw over time gives energy and what a sensor saw.
 *
 * The draw is kept as steps, so that any process can tell at any moment what was drawn until then. The fake's
 * time may be set by hand (`clock_ns`): then all of it is exact.
 */
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

#define NS_PER_S 1000000000LL
#define IDLE_CLOCK_MHZ 345
#define AMBIENT_CELSIUS 30
#define MW_PER_CELSIUS 15000
#define REASON_IDLE 0x1
#define REASON_POWER_CAP 0x4

int64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

int64_t time_ns(const struct state *all) { return all->clock_ns ? all->clock_ns : monotonic_ns(); }

uint64_t enforced_mw(const struct gpu *gpu) {
    if (gpu->limit_enforced_mw != LIVE) return gpu->limit_enforced_mw;
    return gpu->limit_mw < gpu->limit_outside_mw ? gpu->limit_mw : gpu->limit_outside_mw;
}

/* Draw above idle goes with the square of the clock: the voltage follows it. */
static uint64_t natural_mw(const struct gpu *gpu) {
    uint64_t dynamic = gpu->natural_mw > gpu->idle_mw ? gpu->natural_mw - gpu->idle_mw : 0;
    dynamic = dynamic * gpu->load_milli / 1000;
    uint64_t top = gpu->sm_clock_max_mhz, lock = gpu->clock_lock_mhz;
    if (lock && top != ABSENT && lock < top) dynamic = dynamic * lock / top * lock / top;
    return gpu->idle_mw + dynamic;
}

static struct step step_now(const struct gpu *gpu, int64_t at_ns) {
    uint64_t natural = natural_mw(gpu), limit = enforced_mw(gpu);
    /* A limit below what the board draws idle can't bind. */
    if (limit < gpu->idle_mw) limit = gpu->idle_mw;
    uint32_t is_capped = limit < natural;
    return (struct step){at_ns, is_capped ? limit : natural, is_capped, 0};
}

/* After every change of what the draw follows from; the lock is held. */
void draw_changed(struct state *all, struct gpu *gpu) {
    int64_t now_ns = time_ns(all);
    if (gpu->step_count == STEPS_MAX) {
        int64_t length_ns = gpu->steps[1].at_ns - gpu->steps[0].at_ns;
        gpu->counted_nj += gpu->steps[0].draw_mw * (uint64_t)length_ns / 1000;
        if (gpu->steps[0].is_capped) gpu->counted_capped_ns += (uint64_t)length_ns;
        for (int i = 1; i < STEPS_MAX; i++) gpu->steps[i - 1] = gpu->steps[i];
        gpu->step_count--;
    }
    gpu->steps[gpu->step_count++] = step_now(gpu, now_ns);
}

/* Draw times time from one moment to another; before the first step it drew what it drew then. */
static uint64_t drawn_nj(const struct gpu *gpu, int64_t from_ns, int64_t to_ns) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < gpu->step_count; i++) {
        int64_t begin = i == 0 ? INT64_MIN : gpu->steps[i].at_ns;
        int64_t end = i + 1 == gpu->step_count ? INT64_MAX : gpu->steps[i + 1].at_ns;
        if (begin < from_ns) begin = from_ns;
        if (end > to_ns) end = to_ns;
        if (end > begin) sum += gpu->steps[i].draw_mw * (uint64_t)(end - begin) / 1000;
    }
    return sum;
}

/* A sensor gives a new value once a period: the mean of the window that ended there. */
static uint64_t sensed_mw(const struct gpu *gpu, int64_t now_ns, uint64_t window_us) {
    int64_t period_ns = (int64_t)gpu->sensor_period_us * 1000, window_ns = (int64_t)window_us * 1000;
    int64_t end_ns = period_ns ? now_ns / period_ns * period_ns : now_ns;
    if (window_ns == 0) return gpu->steps[gpu->step_count - 1].draw_mw;
    return drawn_nj(gpu, end_ns - window_ns, end_ns) * 1000 / (uint64_t)window_ns;
}

static uint64_t capped_ns(const struct gpu *gpu, int64_t now_ns) {
    uint64_t sum = gpu->counted_capped_ns;
    for (uint32_t i = 0; i < gpu->step_count; i++) {
        int64_t end = i + 1 == gpu->step_count ? now_ns : gpu->steps[i + 1].at_ns;
        if (gpu->steps[i].is_capped && end > gpu->steps[i].at_ns) sum += (uint64_t)(end - gpu->steps[i].at_ns);
    }
    return sum;
}

static uint64_t clock_mhz(const struct gpu *gpu) {
    if (gpu->load_milli == 0) return IDLE_CLOCK_MHZ;
    uint64_t top = gpu->sm_clock_max_mhz, lock = gpu->clock_lock_mhz;
    uint64_t clock = lock && lock < top ? lock : top;
    const struct step *last = &gpu->steps[gpu->step_count - 1];
    uint64_t natural = natural_mw(gpu) - gpu->idle_mw;
    /* The limit takes from the clock until the draw fits. */
    while (last->is_capped && clock > IDLE_CLOCK_MHZ &&
           natural * clock / top * clock / top > last->draw_mw - gpu->idle_mw)
        clock -= 15;
    return clock;
}

/* The figure, or what it is now where it is LIVE. */
uint64_t live(struct state *all, struct gpu *gpu, const uint64_t *figure) {
    if (*figure != LIVE) return *figure;
    lock_state(all);
    int64_t now_ns = time_ns(all);
    if (gpu->step_count == 0) draw_changed(all, gpu);
    const struct step *last = &gpu->steps[gpu->step_count - 1];
    uint64_t value = ABSENT;
    if (figure == &gpu->power_instant_mw) value = sensed_mw(gpu, now_ns, gpu->sensor_window_us);
    if (figure == &gpu->power_average_mw) value = sensed_mw(gpu, now_ns, gpu->average_window_us);
    if (figure == &gpu->energy_mj)
        value = (gpu->counted_nj + drawn_nj(gpu, gpu->steps[0].at_ns, now_ns)) / 1000000;
    if (figure == &gpu->limit_enforced_mw) value = enforced_mw(gpu);
    if (figure == &gpu->utilization_percent) value = gpu->load_milli / 10;
    if (figure == &gpu->temperature_celsius) value = AMBIENT_CELSIUS + last->draw_mw / MW_PER_CELSIUS;
    if (figure == &gpu->sm_clock_mhz) value = clock_mhz(gpu);
    if (figure == &gpu->power_capped_ns) value = capped_ns(gpu, now_ns);
    if (figure == &gpu->clock_reasons)
        value = (gpu->load_milli ? 0 : REASON_IDLE) | (last->is_capped ? REASON_POWER_CAP : 0);
    pthread_mutex_unlock(&all->lock);
    return value;
}

/* What fake.py calls, with its own mapping of the state -------------------------------------- */

void fake_create(struct state *all) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&all->lock, &attributes);
}

/* Take what the draw follows from as it is now; the time before was drawn as it was. */
void fake_draw_changed(struct state *all, unsigned gpu) {
    lock_state(all);
    draw_changed(all, &all->gpus[gpu]);
    pthread_mutex_unlock(&all->lock);
}

/* What a driver forgets when it is unloaded: counters, limits, locks. */
void fake_forget(struct state *all) {
    lock_state(all);
    for (struct gpu *gpu = all->gpus; gpu < all->gpus + GPUS_MAX; gpu++) {
        gpu->step_count = 0;
        gpu->counted_nj = gpu->counted_capped_ns = 0;
        gpu->clock_lock_mhz = 0;
        if (gpu->limit_mw != ABSENT) gpu->limit_mw = gpu->limit_default_mw;
    }
    pthread_mutex_unlock(&all->lock);
}

/* Events are awaited on the lower half of their number, by whatever process. */
static uint32_t *event_futex(struct state *all) {
    return (uint32_t *)&all->event_count + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}

void await_event(struct state *all, uint64_t seen, int64_t within_ns) {
    struct timespec within = {within_ns / NS_PER_S, within_ns % NS_PER_S};
    syscall(SYS_futex, event_futex(all), FUTEX_WAIT, (uint32_t)seen, &within, NULL, 0);
}

void fake_event(struct state *all, unsigned gpu, uint64_t type, uint64_t data, unsigned instance) {
    lock_state(all);
    all->events[all->event_count % EVENTS_MAX] = (struct event){type, data, gpu, instance, instance, 0};
    __atomic_add_fetch(&all->event_count, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&all->lock);
    syscall(SYS_futex, event_futex(all), FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}
