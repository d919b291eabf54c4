/*
 * A libnvidia-ml.so.1 that reads its GPUs from a file which others map too: the library itself, and the way in.
 *
 * Written from what the real pynvml asks for; nothing of NVIDIA's header is in here. Every call goes through
 * enter(), which plays the rules: a return code, a delay, a hang for as long as the rule says so. Rules also
 * count calls, and how many are inside at this moment.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

struct state *state;
static uint32_t mapped_version, opened_generation;
static int init_count;

__attribute__((constructor)) static void map_state(void) {
    const char *path = getenv("WATTSHIFT_FAKE_NVML_STATE");
    if (!path) return; /* loaded for fake_create() and the like */
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0 || (uint64_t)status.st_size != sizeof *state) {
        fprintf(stderr, "fake nvml: WATTSHIFT_FAKE_NVML_STATE names no state of %zu bytes\n", sizeof *state);
        abort();
    }
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (state == MAP_FAILED || state->size != sizeof *state) abort();
    mapped_version = state->kernel_version;
    close(fd);
}

void lock_state(struct state *all) {
    if (pthread_mutex_lock(&all->lock) == EOWNERDEAD) pthread_mutex_consistent(&all->lock);
}

struct gpu *gpu_of(const void *handle) {
    return &state->gpus[((const char *)handle - (const char *)state->gpus) / (long)sizeof(struct gpu)];
}

struct instance *instance_of(const void *handle) {
    struct gpu *gpu = gpu_of(handle);
    return handle == gpu ? NULL : (struct instance *)handle;
}

static int play(const char *function, int gpu) {
    int code = SUCCESS;
    for (int i = 0; i < RULES_MAX && code == SUCCESS; i++) {
        struct rule *rule = &state->rules[i];
        if (strcmp(rule->function, function) != 0) continue;
        if (rule->gpu != ANY_GPU && rule->gpu != gpu) continue;
        __atomic_add_fetch(&rule->calls, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&rule->inside, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&rule->hang, __ATOMIC_SEQ_CST)) nanosleep(&(struct timespec){0, 1000000}, NULL);
        struct timespec delay = {rule->delay_us / 1000000, rule->delay_us % 1000000 * 1000L};
        if (rule->delay_us) nanosleep(&delay, NULL);
        code = rule->code;
        __atomic_sub_fetch(&rule->inside, 1, __ATOMIC_SEQ_CST);
    }
    return code;
}

/* A rule for "*" bends every call. */
static int play_all(const char *function, int gpu) {
    int code = play("*", gpu);
    return code != SUCCESS ? code : play(function, gpu);
}

int enter(const char *function, const void *handle) {
    const struct gpu *gpu = handle ? gpu_of(handle) : NULL;
    int code = play_all(function, gpu ? (int)(gpu - state->gpus) : ANY_GPU);
    if (code != SUCCESS) return code;
    if (init_count == 0) return UNINITIALIZED;
    if (!state->driver_loaded) return DRIVER_NOT_LOADED;
    if (opened_generation != state->driver_generation) return UNINITIALIZED;
    if (gpu && gpu->lost) return GPU_IS_LOST;
    if (handle && instance_of(handle) && !instance_of(handle)->uuid[0]) return NOT_FOUND;
    return SUCCESS;
}

int enter_gpu(const char *function, const void *handle) {
    int code = enter(function, handle);
    return code != SUCCESS ? code : instance_of(handle) ? NOT_SUPPORTED : SUCCESS;
}

int give(uint64_t value, uint64_t *out) {
    if (value == ABSENT) return NOT_SUPPORTED;
    *out = value;
    return SUCCESS;
}

int give32(uint64_t value, uint32_t *out) {
    uint64_t wide = 0;
    int code = give(value, &wide);
    if (code == SUCCESS) *out = (uint32_t)wide;
    return code;
}

int give_text(const char *text, char *out, unsigned length) {
    if (strlen(text) >= length) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

/* The library */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!state) return DRIVER_NOT_LOADED;
    int code = play(__func__, ANY_GPU);
    if (code != SUCCESS) return code;
    if (!state->driver_loaded) return DRIVER_NOT_LOADED;
    if (mapped_version != state->kernel_version) return LIB_RM_VERSION_MISMATCH;
    opened_generation = state->driver_generation;
    init_count++;
    state->opened_by = (uint32_t)getpid();
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); } /* what nvidia-smi and others call */

int nvmlShutdown(void) {
    int code = play(__func__, ANY_GPU);
    if (code != SUCCESS) return code;
    if (init_count == 0) return UNINITIALIZED;
    init_count--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "a failure of the fake";
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    ENTER(NULL);
    return give_text(state->driver_version, version, length);
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    ENTER(NULL);
    *version = (int)state->cuda_version;
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    ENTER(NULL);
    *version = (int)state->cuda_version;
    return SUCCESS;
}

/* Handles */

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(NULL);
    *count = state->gpu_count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct gpu **gpu) {
    if (index >= state->gpu_count) return INVALID_ARGUMENT;
    ENTER(&state->gpus[index]);
    *gpu = &state->gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, struct gpu **out) {
    for (struct gpu *gpu = state->gpus; gpu < state->gpus + state->gpu_count; gpu++) {
        if (strcasecmp(gpu->bus_id, bus_id) != 0) continue;
        ENTER(gpu);
        *out = gpu;
        return SUCCESS;
    }
    ENTER(NULL);
    return NOT_FOUND;
}

/* As the real one: it looks at all GPUs while it searches, and fails if any of them is lost. */
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    ENTER(NULL);
    for (struct gpu *gpu = state->gpus; gpu < state->gpus + state->gpu_count; gpu++) {
        if (gpu->lost) return GPU_IS_LOST;
        if (strcmp(gpu->uuid, uuid) == 0) {
            *out = gpu;
            return SUCCESS;
        }
        for (int i = 0; i < INSTANCES_MAX; i++) {
            if (!gpu->instances[i].uuid[0] || strcmp(gpu->instances[i].uuid, uuid) != 0) continue;
            *out = &gpu->instances[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(void *device, unsigned *index) {
    ENTER(device);
    const struct gpu *gpu = gpu_of(device);
    *index = (unsigned)(instance_of(device) ? instance_of(device) - gpu->instances : gpu - state->gpus);
    return SUCCESS;
}

/* MIG */

int nvmlDeviceGetMigMode(struct gpu *gpu, unsigned *current, unsigned *pending) {
    ENTER_GPU(gpu);
    *pending = (unsigned)gpu->mig_mode;
    return give32(gpu->mig_mode, current);
}

int nvmlDeviceIsMigDeviceHandle(void *device, unsigned *is_instance) {
    ENTER(device);
    *is_instance = instance_of(device) != NULL;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(struct gpu *gpu, unsigned *count) {
    ENTER_GPU(gpu);
    if (gpu->mig_mode == ABSENT || !gpu->mig_mode) return *count = 0, SUCCESS;
    return give32(gpu->mig_instances_max, count);
}

int nvmlDeviceGetMigDeviceHandleByIndex(struct gpu *gpu, unsigned index, struct instance **out) {
    ENTER_GPU(gpu);
    if (gpu->mig_mode == ABSENT) return NOT_SUPPORTED;
    if (index >= INSTANCES_MAX) return INVALID_ARGUMENT;
    if (!gpu->mig_mode || !gpu->instances[index].uuid[0]) return NOT_FOUND;
    *out = &gpu->instances[index];
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *device, struct gpu **gpu) {
    ENTER(device);
    if (!instance_of(device)) return INVALID_ARGUMENT;
    *gpu = gpu_of(device);
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(void *device, unsigned *id) {
    ENTER(device);
    if (!instance_of(device)) return NOT_SUPPORTED;
    *id = instance_of(device)->instance;
    return SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(void *device, unsigned *id) {
    ENTER(device);
    if (!instance_of(device)) return NOT_SUPPORTED;
    *id = instance_of(device)->compute_instance;
    return SUCCESS;
}

struct attributes {
    uint32_t multiprocessors, copy_engines, decoders, encoders, jpegs, ofas;
    uint32_t gpu_slices, compute_slices;
    uint64_t memory_mib;
};

int nvmlDeviceGetAttributes_v2(void *device, struct attributes *attributes) {
    ENTER(device);
    const struct instance *instance = instance_of(device);
    if (!instance) return NOT_SUPPORTED;
    *attributes = (struct attributes){
        .multiprocessors = instance->multiprocessors,
        .copy_engines = 1,
        .gpu_slices = instance->slices,
        .compute_slices = instance->slices,
        .memory_mib = instance->memory_total >> 20,
    };
    return SUCCESS;
}

/* Events */

struct event_set {
    uint64_t mask[GPUS_MAX], next[GPUS_MAX]; /* by GPU: what it wants, and the first event that it has not had */
};

struct event_data {
    void *device;
    uint64_t type, data;
    uint32_t instance, compute_instance;
};

int nvmlEventSetCreate(struct event_set **set) {
    ENTER(NULL);
    *set = calloc(1, sizeof **set);
    return SUCCESS;
}

int nvmlEventSetFree(struct event_set *set) {
    ENTER(NULL);
    free(set);
    return SUCCESS;
}

int nvmlDeviceGetSupportedEventTypes(struct gpu *gpu, uint64_t *types) {
    ENTER_GPU(gpu);
    return give(gpu->event_types, types);
}

int nvmlDeviceRegisterEvents(struct gpu *gpu, uint64_t types, struct event_set *set) {
    ENTER_GPU(gpu);
    if (gpu->event_types == ABSENT || types & ~gpu->event_types) return NOT_SUPPORTED;
    long place = gpu - state->gpus;
    if (!set->mask[place]) set->next[place] = __atomic_load_n(&state->event_count, __ATOMIC_SEQ_CST);
    set->mask[place] |= types;
    return SUCCESS;
}

static int take_event(struct event_set *set, struct event_data *out) {
    lock_state(state);
    uint64_t count = state->event_count, first = count > EVENTS_MAX ? count - EVENTS_MAX : 0;
    int found = 0;
    for (uint64_t number = first; number < count && !found; number++) {
        const struct event *event = &state->events[number % EVENTS_MAX];
        if (!(set->mask[event->gpu] & event->type) || number < set->next[event->gpu]) continue;
        set->next[event->gpu] = number + 1;
        *out = (struct event_data){&state->gpus[event->gpu], event->type, event->data, event->instance,
                                   event->compute_instance};
        found = 1;
    }
    pthread_mutex_unlock(&state->lock);
    return found;
}

/* As the real one it sleeps in the kernel: whoever waits costs nothing. */
int nvmlEventSetWait_v2(struct event_set *set, struct event_data *data, unsigned timeout_ms) {
    ENTER(NULL);
    int64_t until_ns = monotonic_ns() + timeout_ms * 1000000LL;
    for (;;) {
        uint64_t seen = __atomic_load_n(&state->event_count, __ATOMIC_SEQ_CST);
        if (!state->driver_loaded || opened_generation != state->driver_generation) return UNINITIALIZED;
        if (take_event(set, data)) return SUCCESS;
        int64_t left_ns = until_ns - monotonic_ns();
        if (left_ns <= 0) return TIMEOUT;
        await_event(state, seen, left_ns);
    }
}
