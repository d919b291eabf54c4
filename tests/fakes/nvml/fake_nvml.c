/*
 * A libnvidia-ml.so.1 that reads its GPUs from a file which the test maps too (fake.py mirrors the structs).
 *
 * Written from what the real pynvml asks for; nothing of NVIDIA's header is in here. Every call goes through
 * enter(), which plays the rules: a return code, a delay, a hang for as long as the rule says so. Rules also
 * count calls, and how many are inside at this moment.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define GPUS_MAX 16
#define PROCESSES_MAX 64
#define RULES_MAX 64
#define LISTS 3 /* compute, graphics, MPS */
#define ANY_GPU (-1)
#define ABSENT UINT64_MAX /* a figure that this GPU does not report */

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
    ARGUMENT_VERSION_MISMATCH = 25,
};

struct process {
    uint32_t pid;
    uint32_t pad;
    uint64_t memory_bytes;
};

struct gpu {
    char uuid[96];
    char name[96];
    char bus_id[32];
    uint64_t memory_total, memory_reserved, memory_used;
    uint64_t utilization_percent;
    uint64_t power_instant_mw, power_average_mw;
    uint64_t limit_mw, limit_enforced_mw, limit_min_mw, limit_max_mw, limit_default_mw;
    uint64_t energy_mj, temperature_celsius, sm_clock_mhz, minor_number, numa_node;
    int32_t lost;
    int32_t short_sizings; /* so many times the call that sizes a list says 0 */
    uint32_t process_count[LISTS];
    uint32_t pad;
    struct process processes[LISTS][PROCESSES_MAX];
};

struct rule {
    char function[64]; /* "" = unused */
    int32_t gpu;
    int32_t code; /* 0 = go on */
    int32_t hang;
    uint32_t delay_us;
    uint32_t calls, inside;
};

struct state {
    uint64_t size; /* of this struct: both sides must agree */
    int32_t driver_loaded;
    uint32_t driver_generation; /* handles of an older one are dead */
    uint32_t kernel_version;    /* a library that was mapped under another one can't be used */
    uint32_t gpu_count;
    uint32_t opened_by; /* PID of the last process that initialised the library */
    uint32_t pad;
    char driver_version[80];
    struct rule rules[RULES_MAX];
    struct gpu gpus[GPUS_MAX];
};

static struct state *state;
static uint32_t mapped_version, opened_generation;
static int init_count;

__attribute__((constructor)) static void map_state(void) {
    const char *path = getenv("WATTSHIFT_FAKE_NVML_STATE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
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
        nanosleep(&delay, NULL);
        code = rule->code;
        __atomic_sub_fetch(&rule->inside, 1, __ATOMIC_SEQ_CST);
    }
    return code;
}

static int enter(const char *function, const struct gpu *gpu) {
    int code = play(function, gpu ? (int)(gpu - state->gpus) : ANY_GPU);
    if (code != SUCCESS) return code;
    if (init_count == 0) return UNINITIALIZED;
    if (!state->driver_loaded) return DRIVER_NOT_LOADED;
    if (opened_generation != state->driver_generation) return UNINITIALIZED;
    if (gpu && gpu->lost) return GPU_IS_LOST;
    return SUCCESS;
}

#define ENTER(gpu)                        \
    do {                                  \
        int code = enter(__func__, gpu);  \
        if (code != SUCCESS) return code; \
    } while (0)

static int give(uint64_t value, uint64_t *out) {
    if (value == ABSENT) return NOT_SUPPORTED;
    *out = value;
    return SUCCESS;
}

static int give32(uint64_t value, uint32_t *out) {
    uint64_t wide = 0;
    int code = give(value, &wide);
    if (code == SUCCESS) *out = (uint32_t)wide;
    return code;
}

static int give_text(const char *text, char *out, unsigned length) {
    if (strlen(text) >= length) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

/* The library */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
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

/* Who a GPU is */

int nvmlDeviceGetUUID(struct gpu *gpu, char *uuid, unsigned length) {
    ENTER(gpu);
    return give_text(gpu->uuid, uuid, length);
}

int nvmlDeviceGetName(struct gpu *gpu, char *name, unsigned length) {
    ENTER(gpu);
    return give_text(gpu->name, name, length);
}

struct pci {
    char bus_id_legacy[16];
    uint32_t domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(struct gpu *gpu, struct pci *pci) {
    ENTER(gpu);
    memset(pci, 0, sizeof *pci);
    return give_text(gpu->bus_id, pci->bus_id, sizeof pci->bus_id);
}

int nvmlDeviceGetMinorNumber(struct gpu *gpu, unsigned *minor) {
    ENTER(gpu);
    return give32(gpu->minor_number, minor);
}

int nvmlDeviceGetNumaNodeId(struct gpu *gpu, unsigned *node) {
    ENTER(gpu);
    return give32(gpu->numa_node, node);
}

int nvmlDeviceGetPowerManagementLimitConstraints(struct gpu *gpu, unsigned *min, unsigned *max) {
    ENTER(gpu);
    int code = give32(gpu->limit_min_mw, min);
    return code != SUCCESS ? code : give32(gpu->limit_max_mw, max);
}

int nvmlDeviceGetPowerManagementDefaultLimit(struct gpu *gpu, unsigned *mw) {
    ENTER(gpu);
    return give32(gpu->limit_default_mw, mw);
}

/* What it reports */

struct memory {
    uint64_t total, free, used;
};

int nvmlDeviceGetMemoryInfo(struct gpu *gpu, struct memory *memory) {
    ENTER(gpu);
    if (gpu->memory_used == ABSENT) return NOT_SUPPORTED;
    memory->total = gpu->memory_total;
    memory->used = gpu->memory_used + gpu->memory_reserved;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

struct memory_v2 {
    uint32_t version;
    uint64_t total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo_v2(struct gpu *gpu, struct memory_v2 *memory) {
    ENTER(gpu);
    if (memory->version != (2u << 24 | sizeof *memory)) return ARGUMENT_VERSION_MISMATCH;
    if (gpu->memory_used == ABSENT) return NOT_SUPPORTED;
    memory->total = gpu->memory_total;
    memory->reserved = gpu->memory_reserved;
    memory->used = gpu->memory_used;
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

struct utilization {
    uint32_t gpu, memory;
};

int nvmlDeviceGetUtilizationRates(struct gpu *gpu, struct utilization *rates) {
    ENTER(gpu);
    rates->memory = 0;
    return give32(gpu->utilization_percent, &rates->gpu);
}

struct field {
    uint32_t id, scope;
    int64_t timestamp_us, latency_us;
    uint32_t type;
    int32_t code;
    union {
        double d;
        uint32_t ui;
        uint64_t ull;
    } value;
};

enum { FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186, TYPE_UNSIGNED = 1 };

int nvmlDeviceGetFieldValues(struct gpu *gpu, int count, struct field *fields) {
    ENTER(gpu);
    for (struct field *field = fields; field < fields + count; field++) {
        uint64_t value = field->id == FIELD_POWER_INSTANT   ? gpu->power_instant_mw
                         : field->id == FIELD_POWER_AVERAGE ? gpu->power_average_mw
                                                            : ABSENT;
        field->type = TYPE_UNSIGNED;
        field->code = give32(value, &field->value.ui);
    }
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(struct gpu *gpu, unsigned *mw) {
    ENTER(gpu);
    return give32(gpu->power_average_mw, mw);
}

int nvmlDeviceGetPowerManagementLimit(struct gpu *gpu, unsigned *mw) {
    ENTER(gpu);
    return give32(gpu->limit_mw, mw);
}

int nvmlDeviceGetEnforcedPowerLimit(struct gpu *gpu, unsigned *mw) {
    ENTER(gpu);
    return give32(gpu->limit_enforced_mw, mw);
}

int nvmlDeviceGetTotalEnergyConsumption(struct gpu *gpu, uint64_t *mj) {
    ENTER(gpu);
    return give(gpu->energy_mj, mj);
}

struct temperature {
    uint32_t version, sensor;
    int32_t celsius;
};

int nvmlDeviceGetTemperatureV(struct gpu *gpu, struct temperature *temperature) {
    ENTER(gpu);
    if (temperature->version != (1u << 24 | sizeof *temperature)) return ARGUMENT_VERSION_MISMATCH;
    return give32(gpu->temperature_celsius, (uint32_t *)&temperature->celsius);
}

int nvmlDeviceGetTemperature(struct gpu *gpu, int sensor, unsigned *celsius) {
    (void)sensor;
    ENTER(gpu);
    return give32(gpu->temperature_celsius, celsius);
}

int nvmlDeviceGetClockInfo(struct gpu *gpu, int clock, unsigned *mhz) {
    ENTER(gpu);
    return clock == 1 ? give32(gpu->sm_clock_mhz, mhz) : NOT_SUPPORTED;
}

/* Who is on it */

struct process_info {
    uint32_t pid;
    uint64_t memory_bytes;
    uint32_t gpu_instance, compute_instance;
};

static int list(struct gpu *gpu, int which, unsigned *count, struct process_info *infos) {
    unsigned there = gpu->process_count[which];
    if (infos == NULL && there > 0 && gpu->short_sizings > 0) {
        gpu->short_sizings--;
        *count = 0;
        return INSUFFICIENT_SIZE;
    }
    if (*count < there) {
        *count = there;
        return INSUFFICIENT_SIZE;
    }
    for (unsigned i = 0; i < there; i++) {
        const struct process *process = &gpu->processes[which][i];
        infos[i] = (struct process_info){process->pid, process->memory_bytes, UINT32_MAX, UINT32_MAX};
    }
    *count = there;
    return SUCCESS;
}

#define LIST(function, which)                                                            \
    int function(struct gpu *gpu, unsigned *count, struct process_info *infos) {         \
        ENTER(gpu);                                                                      \
        return list(gpu, which, count, infos);                                           \
    }

LIST(nvmlDeviceGetComputeRunningProcesses_v3, 0)
LIST(nvmlDeviceGetComputeRunningProcesses_v2, 0)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 1)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, 1)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, 2)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, 2)
