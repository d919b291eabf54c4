/*
 * What a GPU, or an instance of one, says about itself; and what can be set.
 */
#include <string.h>
#include <time.h>

#include "state.h"

#define FIGURE(gpu, name) live(state, gpu, &(gpu)->name)
/* A call that gives one figure of a whole GPU. */
#define GIVE32(function, name)                       \
    int function(struct gpu *gpu, uint32_t *out) {   \
        ENTER_GPU(gpu);                              \
        return give32(FIGURE(gpu, name), out);       \
    }

/* Who it is */

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    ENTER(device);
    return give_text(instance_of(device) ? instance_of(device)->uuid : gpu_of(device)->uuid, uuid, length);
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    ENTER(device);
    return give_text(instance_of(device) ? instance_of(device)->name : gpu_of(device)->name, name, length);
}

struct pci {
    char bus_id_legacy[16];
    uint32_t domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(struct gpu *gpu, struct pci *pci) {
    ENTER_GPU(gpu);
    memset(pci, 0, sizeof *pci);
    return give_text(gpu->bus_id, pci->bus_id, sizeof pci->bus_id);
}

GIVE32(nvmlDeviceGetMinorNumber, minor_number)
GIVE32(nvmlDeviceGetNumaNodeId, numa_node)
GIVE32(nvmlDeviceGetPersistenceMode, persistence)
GIVE32(nvmlDeviceGetPerformanceState, performance_state)
GIVE32(nvmlDeviceGetFanSpeed, fan_percent)

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    ENTER(device);
    uint64_t capability = gpu_of(device)->compute_capability;
    if (capability == ABSENT) return NOT_SUPPORTED;
    *major = (int)capability / 10;
    *minor = (int)capability % 10;
    return SUCCESS;
}

int nvmlDeviceGetComputeMode(struct gpu *gpu, uint32_t *mode) {
    ENTER_GPU(gpu);
    *mode = 0;
    return SUCCESS;
}

int nvmlDeviceGetDisplayActive(struct gpu *gpu, uint32_t *active) {
    ENTER_GPU(gpu);
    *active = 0;
    return SUCCESS;
}

/* Where it sits */

int nvmlDeviceGetTopologyCommonAncestor(struct gpu *gpu, struct gpu *other, uint32_t *level) {
    ENTER_GPU(gpu);
    if (gpu->pcie_switch == ABSENT || other->pcie_switch == ABSENT) return NOT_SUPPORTED;
    *level = gpu->board != 0 && gpu->board == other->board ? 0
             : gpu->pcie_switch == other->pcie_switch      ? 10
             : gpu->host_bridge == other->host_bridge      ? 30
                                                           : 50;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(struct gpu *gpu, unsigned link, uint32_t *is_active) {
    ENTER_GPU(gpu);
    if (link >= LINKS_MAX) return INVALID_ARGUMENT;
    *is_active = gpu->links[link].remote_bus_id[0] != 0;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(struct gpu *gpu, unsigned link, struct pci *pci) {
    ENTER_GPU(gpu);
    if (link >= LINKS_MAX || !gpu->links[link].remote_bus_id[0]) return INVALID_ARGUMENT;
    memset(pci, 0, sizeof *pci);
    return give_text(gpu->links[link].remote_bus_id, pci->bus_id, sizeof pci->bus_id);
}

static unsigned link_count(const struct gpu *gpu) {
    unsigned count = 0;
    while (count < LINKS_MAX && gpu->links[count].remote_bus_id[0]) count++;
    return count;
}

/* Memory and utilization */

struct memory {
    uint64_t total, free, used;
};

struct memory_v2 {
    uint32_t version;
    uint64_t total, reserved, free, used;
};

static int memory_of(const void *device, struct memory_v2 *memory) {
    const struct gpu *gpu = gpu_of(device);
    const struct instance *instance = instance_of(device);
    memory->total = instance ? instance->memory_total : gpu->memory_total;
    memory->reserved = instance ? instance->memory_reserved : gpu->memory_reserved;
    memory->used = instance ? instance->memory_used : gpu->memory_used;
    if (memory->used == ABSENT) return NOT_SUPPORTED;
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    ENTER(device);
    struct memory_v2 all;
    int code = memory_of(device, &all);
    if (code == SUCCESS) *memory = (struct memory){all.total, all.free, all.used + all.reserved};
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *memory) {
    ENTER(device);
    if (memory->version != (2u << 24 | sizeof *memory)) return ARGUMENT_VERSION_MISMATCH;
    return memory_of(device, memory);
}

int nvmlDeviceGetBAR1MemoryInfo(void *device, struct memory *memory) {
    ENTER(device);
    *memory = (struct memory){256u << 20, 255u << 20, 1u << 20};
    return SUCCESS;
}

struct utilization {
    uint32_t gpu, memory;
};

int nvmlDeviceGetUtilizationRates(struct gpu *gpu, struct utilization *rates) {
    ENTER_GPU(gpu);
    if (gpu->mig_mode != ABSENT && gpu->mig_mode) return NOT_SUPPORTED;
    rates->memory = gpu->memory_utilization_percent == ABSENT ? 0 : (uint32_t)gpu->memory_utilization_percent;
    return give32(FIGURE(gpu, utilization_percent), &rates->gpu);
}

static int engine(uint64_t busy_percent, unsigned *percent, unsigned *period_us) {
    *period_us = 167000;
    return give32(busy_percent, percent);
}

int nvmlDeviceGetEncoderUtilization(struct gpu *gpu, unsigned *percent, unsigned *period_us) {
    ENTER_GPU(gpu);
    return engine(gpu->encoder_percent, percent, period_us);
}

int nvmlDeviceGetDecoderUtilization(struct gpu *gpu, unsigned *percent, unsigned *period_us) {
    ENTER_GPU(gpu);
    return engine(gpu->decoder_percent, percent, period_us);
}

int nvmlDeviceGetPcieThroughput(struct gpu *gpu, int counter, unsigned *kib_per_s) {
    ENTER_GPU(gpu);
    (void)counter;
    return give32(gpu->pcie_kib_per_s, kib_per_s);
}

/* Windows has them */
int nvmlDeviceGetDriverModel_v2(struct gpu *gpu, int *current, int *pending) {
    ENTER_GPU(gpu);
    (void)current, (void)pending;
    return NOT_SUPPORTED;
}

/* Power */

int nvmlDeviceGetPowerManagementLimitConstraints(struct gpu *gpu, unsigned *min, unsigned *max) {
    ENTER_GPU(gpu);
    int code = give32(gpu->limit_min_mw, min);
    return code != SUCCESS ? code : give32(gpu->limit_max_mw, max);
}

GIVE32(nvmlDeviceGetPowerManagementDefaultLimit, limit_default_mw)
GIVE32(nvmlDeviceGetPowerManagementLimit, limit_mw)
GIVE32(nvmlDeviceGetEnforcedPowerLimit, limit_enforced_mw)

/* Without an average of its own (GA100 and older) this one is the instant. */
int nvmlDeviceGetPowerUsage(struct gpu *gpu, unsigned *mw) {
    ENTER_GPU(gpu);
    uint64_t average = FIGURE(gpu, power_average_mw);
    return give32(average == ABSENT ? FIGURE(gpu, power_instant_mw) : average, mw);
}

int nvmlDeviceGetTotalEnergyConsumption(struct gpu *gpu, uint64_t *mj) {
    ENTER_GPU(gpu);
    return give(FIGURE(gpu, energy_mj), mj);
}

static int may_set(void) { return state->privileged ? SUCCESS : NO_PERMISSION; }

static int set_limit(struct gpu *gpu, uint64_t mw) {
    if (may_set() != SUCCESS) return NO_PERMISSION;
    if (gpu->limit_mw == ABSENT || gpu->limit_max_mw == ABSENT) return NOT_SUPPORTED;
    if (mw < gpu->limit_min_mw || mw > gpu->limit_max_mw) return INVALID_ARGUMENT;
    if (gpu->deaf) return SUCCESS;
    lock_state(state);
    gpu->limit_mw = mw;
    draw_changed(state, gpu);
    pthread_mutex_unlock(&state->lock);
    return SUCCESS;
}

int nvmlDeviceSetPowerManagementLimit(struct gpu *gpu, unsigned mw) {
    ENTER_GPU(gpu);
    return set_limit(gpu, mw);
}

struct power_value {
    uint32_t version;
    uint8_t scope;
    uint32_t mw;
};

int nvmlDeviceSetPowerManagementLimit_v2(struct gpu *gpu, const struct power_value *value) {
    ENTER_GPU(gpu);
    if (value->version != (2u << 24 | sizeof *value)) return ARGUMENT_VERSION_MISMATCH;
    if (value->scope != gpu->power_scope) return NOT_SUPPORTED;
    return set_limit(gpu, value->mw);
}

/* Clocks */

int nvmlDeviceGetClockInfo(struct gpu *gpu, int clock, unsigned *mhz) {
    ENTER_GPU(gpu);
    switch (clock) {
        case 0: /* graphics: one domain with SM on all boards here */
        case 1: return give32(FIGURE(gpu, sm_clock_mhz), mhz);
        case 2: return give32(gpu->memory_clock_mhz, mhz);
        case 3: return give32(gpu->video_clock_mhz, mhz);
        default: return NOT_SUPPORTED;
    }
}

int nvmlDeviceGetMaxClockInfo(struct gpu *gpu, int clock, unsigned *mhz) {
    ENTER_GPU(gpu);
    switch (clock) {
        case 0:
        case 1: return give32(gpu->sm_clock_max_mhz, mhz);
        case 2: return give32(gpu->memory_clock_max_mhz, mhz);
        default: return NOT_SUPPORTED;
    }
}

static int lock_clock(struct gpu *gpu, uint64_t mhz) {
    if (may_set() != SUCCESS) return NO_PERMISSION;
    if (gpu->deaf) return SUCCESS;
    lock_state(state);
    gpu->clock_lock_mhz = mhz;
    draw_changed(state, gpu);
    pthread_mutex_unlock(&state->lock);
    return SUCCESS;
}

int nvmlDeviceSetGpuLockedClocks(struct gpu *gpu, unsigned min_mhz, unsigned max_mhz) {
    ENTER_GPU(gpu);
    if (gpu->sm_clock_max_mhz == ABSENT) return NOT_SUPPORTED;
    return min_mhz > max_mhz || max_mhz == 0 ? INVALID_ARGUMENT : lock_clock(gpu, max_mhz);
}

int nvmlDeviceResetGpuLockedClocks(struct gpu *gpu) {
    ENTER_GPU(gpu);
    return gpu->sm_clock_max_mhz == ABSENT ? NOT_SUPPORTED : lock_clock(gpu, 0);
}

int nvmlDeviceGetCurrentClocksEventReasons(struct gpu *gpu, uint64_t *reasons) {
    ENTER_GPU(gpu);
    return give(FIGURE(gpu, clock_reasons), reasons);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(struct gpu *gpu, uint64_t *reasons) {
    ENTER_GPU(gpu);
    return give(FIGURE(gpu, clock_reasons), reasons);
}

/* Heat */

struct temperature {
    uint32_t version, sensor;
    int32_t celsius;
};

int nvmlDeviceGetTemperatureV(struct gpu *gpu, struct temperature *temperature) {
    ENTER_GPU(gpu);
    if (temperature->version != (1u << 24 | sizeof *temperature)) return ARGUMENT_VERSION_MISMATCH;
    return give32(FIGURE(gpu, temperature_celsius), (uint32_t *)&temperature->celsius);
}

int nvmlDeviceGetTemperature(struct gpu *gpu, int sensor, unsigned *celsius) {
    ENTER_GPU(gpu);
    return sensor == 0 ? give32(FIGURE(gpu, temperature_celsius), celsius) : INVALID_ARGUMENT;
}

int nvmlDeviceGetTemperatureThreshold(struct gpu *gpu, int threshold, unsigned *celsius) {
    ENTER_GPU(gpu);
    switch (threshold) {
        case 0: return give32(gpu->shutdown_celsius, celsius);
        case 1: return give32(gpu->slowdown_celsius, celsius);
        default: return NOT_SUPPORTED;
    }
}

/* Errors of memory */

int nvmlDeviceGetEccMode(struct gpu *gpu, uint32_t *current, uint32_t *pending) {
    ENTER_GPU(gpu);
    if (gpu->ecc_uncorrected == ABSENT) return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(struct gpu *gpu, int kind, int counter, uint64_t *count) {
    ENTER_GPU(gpu);
    (void)counter;
    return give(kind == 0 ? gpu->ecc_corrected : gpu->ecc_uncorrected, count);
}

int nvmlDeviceGetRemappedRows(struct gpu *gpu, uint32_t *corrected, uint32_t *uncorrected, uint32_t *pending,
                              uint32_t *failure) {
    ENTER_GPU(gpu);
    if (gpu->remapped_corrected == ABSENT) return NOT_SUPPORTED;
    *corrected = (uint32_t)gpu->remapped_corrected;
    *uncorrected = (uint32_t)gpu->remapped_uncorrected;
    *pending = (uint32_t)gpu->remap_pending;
    *failure = (uint32_t)gpu->remap_failure;
    return SUCCESS;
}

/* Fields: many figures in one call, each with its own verdict */

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

enum { TYPE_UINT = 1, TYPE_ULONGLONG = 3, SCOPE_GPU = 0 };
#define EVERY_LINK UINT32_MAX

static uint64_t field_value(struct gpu *gpu, const struct field *field) {
    int is_ours = field->scope == gpu->power_scope;
    switch (field->id) {
        case 3: return gpu->ecc_corrected;
        case 4: return gpu->ecc_uncorrected;
        case 74: return FIGURE(gpu, power_capped_ns);
        case 82: return gpu->memory_temperature_celsius;
        case 83:
        case 191: return FIGURE(gpu, energy_mj);
        case 91: return gpu->links_claimed != ABSENT ? gpu->links_claimed : link_count(gpu) ? link_count(gpu) : ABSENT;
        case 138:
        case 139:
            if (gpu->link_kib == ABSENT || !link_count(gpu)) return ABSENT;
            if (field->scope == EVERY_LINK) return gpu->link_kib * link_count(gpu);
            return field->scope < link_count(gpu) ? gpu->link_kib : ABSENT;
        case 142: return gpu->remapped_corrected;
        case 143: return gpu->remapped_uncorrected;
        case 144: return gpu->remap_pending;
        case 145: return gpu->remap_failure;
        case 185: return is_ours ? FIGURE(gpu, power_average_mw) : ABSENT;
        case 186: return is_ours ? FIGURE(gpu, power_instant_mw) : ABSENT;
        case 190: return FIGURE(gpu, limit_enforced_mw);
        case 192: return gpu->limit_mw;
        case 230: return gpu->recovery_action;
        case 251: return gpu->smoothing_enabled;
        case 262: return field->scope == gpu->smoothing_profile ? gpu->ramp_down_mw_per_s : ABSENT;
        case 264: return gpu->smoothing_profile;
        case 267: return gpu->ramp_down_override_mw_per_s;
        default: return ABSENT;
    }
}

int nvmlDeviceGetFieldValues(struct gpu *gpu, int count, struct field *fields) {
    ENTER_GPU(gpu);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    for (struct field *field = fields; field < fields + count; field++) {
        uint64_t value = field_value(gpu, field);
        int is_wide = field->id == 74 || field->id == 83 || field->id == 138 || field->id == 139 || field->id == 191;
        field->timestamp_us = now.tv_sec * 1000000 + now.tv_nsec / 1000;
        field->type = is_wide ? TYPE_ULONGLONG : TYPE_UINT;
        field->code = value == ABSENT ? NOT_SUPPORTED : SUCCESS;
        if (value == ABSENT) continue;
        if (is_wide) field->value.ull = value;
        else field->value.ui = (uint32_t)value;
    }
    return SUCCESS;
}

/* Who is on it */

struct process_info {
    uint32_t pid;
    uint64_t memory_bytes;
    uint32_t gpu_instance, compute_instance;
};

static int list(void *device, int which, unsigned *count, struct process_info *infos) {
    struct gpu *gpu = gpu_of(device);
    const struct instance *instance = instance_of(device);
    struct process_info found[PROCESSES_MAX];
    unsigned there = 0;
    for (unsigned i = 0; i < gpu->process_count[which]; i++) {
        const struct process *process = &gpu->processes[which][i];
        if (instance && process->instance != instance->instance) continue;
        uint32_t compute = process->instance == UINT32_MAX ? UINT32_MAX : 0;
        found[there++] =
            (struct process_info){process->pid, process->memory_bytes, process->instance, compute};
    }
    if (infos == NULL && there > 0 && gpu->short_sizings > 0) {
        gpu->short_sizings--;
        *count = 0;
        return INSUFFICIENT_SIZE;
    }
    unsigned room = *count;
    *count = there;
    if (room < there) return INSUFFICIENT_SIZE;
    if (there) memcpy(infos, found, there * sizeof *infos);
    return SUCCESS;
}

#define LIST(function, which)                                                    \
    int function(void *device, unsigned *count, struct process_info *infos) {    \
        ENTER(device);                                                           \
        return list(device, which, count, infos);                                \
    }

LIST(nvmlDeviceGetComputeRunningProcesses_v3, 0)
LIST(nvmlDeviceGetComputeRunningProcesses_v2, 0)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 1)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, 1)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, 2)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, 2)

struct process_utilization {
    uint32_t pid;
    uint64_t timestamp_us;
    uint32_t sm, memory, encoder, decoder;
};

/* As the real one: NOT_FOUND when nothing is newer, a size first. */
int nvmlDeviceGetProcessUtilization(struct gpu *gpu, struct process_utilization *out, unsigned *count,
                                    uint64_t since_us) {
    ENTER_GPU(gpu);
    if (gpu->mig_mode != ABSENT && gpu->mig_mode) return NOT_SUPPORTED;
    unsigned there = 0;
    for (unsigned i = 0; i < gpu->process_count[0]; i++) {
        const struct process *process = &gpu->processes[0][i];
        if (process->seen_us <= since_us) continue;
        if (out && there < *count)
            out[there] = (struct process_utilization){
                process->pid, process->seen_us, (uint32_t)process->utilization_percent, 0, 0, 0};
        there++;
    }
    if (!there) return NOT_FOUND;
    int fits = out && there <= *count;
    *count = there;
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}
