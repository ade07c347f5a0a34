// NVML as fastdp.runtime.topology asks it: as many cards as RIG_GPUS says, all linked to each other.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kNotSupported = 3, kInvalidArgument = 2;

unsigned count() {
    const char* text = std::getenv("RIG_GPUS");
    return text ? static_cast<unsigned>(std::atoi(text)) : 1;
}

struct Memory {
    unsigned long long total, free, used;
};

}  // namespace

extern "C" {

int nvmlInit_v2() { return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "an error of the tests' NVML"; }
int nvmlDeviceGetCount_v2(unsigned* cards) { return *cards = count(), 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, std::uintptr_t* handle) {
    *handle = index + 1;
    return index < count() ? 0 : kInvalidArgument;
}

int nvmlDeviceGetUUID(std::uintptr_t handle, char* text, unsigned length) {
    return std::snprintf(text, length, "GPU-%08lx-0000-0000-0000-000000000000", handle), 0;
}

int nvmlDeviceGetName(std::uintptr_t, char* text, unsigned length) {
    return std::snprintf(text, length, "host memory behind a CUDA of fastdp's tests"), 0;
}

int nvmlDeviceGetMaxPcieLinkGeneration(std::uintptr_t, unsigned* value) { return *value = 5, 0; }
int nvmlDeviceGetMaxPcieLinkWidth(std::uintptr_t, unsigned* value) { return *value = 16, 0; }
int nvmlDeviceGetMemoryInfo(std::uintptr_t, Memory* memory) { return *memory = {2ull << 30, 2ull << 30, 0}, 0; }

int nvmlDeviceGetCudaComputeCapability(std::uintptr_t, int* major, int* minor) {
    *major = 9;
    *minor = 0;
    return 0;
}

int nvmlDeviceGetNvLinkState(std::uintptr_t, unsigned link, unsigned* state) {
    *state = 1;
    return link < 18 ? 0 : kNotSupported;
}

int nvmlDeviceGetP2PStatus(std::uintptr_t, std::uintptr_t, int, int* status) { return *status = 0, 0; }
int nvmlDeviceGetTopologyCommonAncestor(std::uintptr_t, std::uintptr_t, int* level) { return *level = 50, 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { return *version = 12090, 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned length) { return std::snprintf(text, length, "575.0"), 0; }

}  // extern "C"
