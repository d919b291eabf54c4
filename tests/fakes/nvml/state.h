/*
 * What the fake driver knows, in one file that every process maps: the library under test, the test, nvitop.
 *
 * fake.py mirrors the structs and reads the names of the figures from here; `size` says whether both agree.
 */
#ifndef FAKE_NVML_STATE_H
#define FAKE_NVML_STATE_H

#include <pthread.h>
#include <stdint.h>

#define GPUS_MAX 16
#define PROCESSES_MAX 64
#define RULES_MAX 64
#define EVENTS_MAX 64
#define INSTANCES_MAX 8
#define LINKS_MAX 18
#define STEPS_MAX 64
#define LISTS 3 /* compute, graphics, MPS */
#define ANY_GPU (-1)
#define ABSENT UINT64_MAX     /* a figure that this GPU does not report */
#define LIVE (UINT64_MAX - 1) /* one that follows from load, limit, clocks and time (draw.c) */

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
    ARGUMENT_VERSION_MISMATCH = 25,
};

/* What a GPU reports: a number, ABSENT or, where draw.c has it, LIVE. */
#define FIGURES(X)                                                                                  \
    X(memory_total) X(memory_reserved) X(memory_used)                                               \
    X(utilization_percent) X(memory_utilization_percent) X(encoder_percent) X(decoder_percent)      \
    X(power_instant_mw) X(power_average_mw)                                                         \
    X(limit_mw) X(limit_enforced_mw) X(limit_min_mw) X(limit_max_mw) X(limit_default_mw)            \
    X(energy_mj) X(temperature_celsius) X(memory_temperature_celsius)                               \
    X(slowdown_celsius) X(shutdown_celsius)                                                         \
    X(sm_clock_mhz) X(memory_clock_mhz) X(sm_clock_max_mhz) X(memory_clock_max_mhz)                 \
    X(clock_reasons) X(power_capped_ns) X(performance_state) X(fan_percent) X(persistence)          \
    X(ecc_corrected) X(ecc_uncorrected)                                                             \
    X(remapped_corrected) X(remapped_uncorrected) X(remap_pending) X(remap_failure)                 \
    X(recovery_action) X(event_types) X(minor_number) X(numa_node) X(compute_capability)            \
    X(mig_mode) X(mig_instances_max) X(video_clock_mhz) X(pcie_kib_per_s) X(link_kib)         \
    X(smoothing_enabled) X(smoothing_profile) X(ramp_down_mw_per_s) X(ramp_down_override_mw_per_s) \
    X(links_claimed)

/* What draw.c goes by. */
#define INPUTS(X)                                                                                   \
    X(load_milli) X(idle_mw) X(natural_mw) X(limit_outside_mw) X(clock_lock_mhz)                    \
    X(sensor_period_us) X(sensor_window_us) X(average_window_us) X(power_scope)                     \
    X(pcie_switch) X(host_bridge) X(board)

struct process {
    uint32_t pid;
    uint32_t instance; /* GPU instance that it is on; UINT32_MAX without MIG */
    uint64_t memory_bytes;
    uint64_t utilization_percent, seen_us;
};

/* A MIG device: one GPU instance with one compute instance that fills it. */
struct instance {
    char uuid[96]; /* "" = an empty slot */
    char name[96];
    uint32_t instance, compute_instance, slices, multiprocessors;
    uint64_t memory_total, memory_reserved, memory_used;
};

struct link {
    char remote_bus_id[32]; /* "" = not active */
    int32_t remote_type;    /* 0 GPU, 1 IBM NPU, 2 switch */
    uint32_t pad;
};

struct step {
    int64_t at_ns;
    uint64_t draw_mw;
    uint32_t is_capped, pad;
};

#define AS_U64(name) uint64_t name;
struct gpu {
    char uuid[96];
    char name[256]; /* longer than a caller's buffer may be */
    char bus_id[32];
    FIGURES(AS_U64)
    INPUTS(AS_U64)
    int32_t lost;
    int32_t deaf;          /* setters succeed and do nothing */
    int32_t short_sizings; /* so many times the call that sizes a list says 0 */
    uint32_t process_count[LISTS];
    struct process processes[LISTS][PROCESSES_MAX];
    struct instance instances[INSTANCES_MAX];
    struct link links[LINKS_MAX];
    /* draw.c's own: the draw since each step, the oldest first, and what was drawn before that one */
    uint64_t counted_nj, counted_capped_ns;
    uint32_t step_count, pad;
    struct step steps[STEPS_MAX];
};

struct rule {
    char function[64]; /* "" = unused */
    int32_t gpu;
    int32_t code; /* 0 = go on */
    int32_t hang;
    uint32_t delay_us;
    uint32_t calls, inside;
};

struct event {
    uint64_t type, data;
    uint32_t gpu, instance, compute_instance, pad;
};

struct state {
    uint64_t size; /* of this struct: both sides must agree */
    int32_t driver_loaded;
    uint32_t driver_generation; /* handles of an older one are dead */
    uint32_t kernel_version;    /* a library that was mapped under another one can't be used */
    uint32_t gpu_count;
    uint32_t opened_by;  /* PID of the last process that initialised the library */
    uint32_t privileged; /* 0: setters answer NO_PERMISSION */
    int64_t clock_ns;    /* the fake's time; 0 = the machine's own */
    uint32_t cuda_version, pad;
    char driver_version[80];
    uint64_t event_count; /* ever */
    struct event events[EVENTS_MAX];
    struct rule rules[RULES_MAX];
    pthread_mutex_t lock; /* of all steps and events; robust, for whoever holds it may be killed */
    struct gpu gpus[GPUS_MAX];
};

extern struct state *state;

/* library.c: every call's way in. A handle is a GPU's or an instance's address. */
int enter(const char *function, const void *handle);
int enter_gpu(const char *function, const void *handle);
struct gpu *gpu_of(const void *handle);
struct instance *instance_of(const void *handle);
int give(uint64_t value, uint64_t *out);
int give32(uint64_t value, uint32_t *out);
int give_text(const char *text, char *out, unsigned length);
void lock_state(struct state *all);

#define ENTER(handle)                       \
    do {                                    \
        int code = enter(__func__, handle); \
        if (code != SUCCESS) return code;   \
    } while (0)
/* For what an instance does not have. */
#define ENTER_GPU(handle)                       \
    do {                                        \
        int code = enter_gpu(__func__, handle); \
        if (code != SUCCESS) return code;       \
    } while (0)

/* draw.c */
int64_t monotonic_ns(void);
int64_t time_ns(const struct state *all);
void await_event(struct state *all, uint64_t seen, int64_t within_ns);
void draw_changed(struct state *all, struct gpu *gpu);
uint64_t enforced_mw(const struct gpu *gpu);
uint64_t live(struct state *all, struct gpu *gpu, const uint64_t *figure);

#endif
