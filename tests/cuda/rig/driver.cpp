// The driver's entry points that CuPy and fastdp call: contexts, modules, launches.
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "machine.h"

using namespace rig;

namespace {

constexpr unsigned kCudaMachine = 190;  // ELF's number of CUDA code
constexpr unsigned kParameterInfo = 0x1704;

std::uintptr_t number(const void* handle) { return reinterpret_cast<std::uintptr_t>(handle); }
void* context_of(int card) { return reinterpret_cast<void*>(0x6000'0000 + 0x100ull * (card + 1)); }

std::uint32_t word(const char* at) {
    std::uint32_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// The sections of an image's ELF file, by name.
std::map<std::string, std::string> sections(const std::string& image) {
    Elf64_Ehdr head;
    std::memcpy(&head, image.data(), sizeof head);
    std::vector<Elf64_Shdr> table(head.e_shnum);
    std::memcpy(table.data(), image.data() + head.e_shoff, sizeof(Elf64_Shdr) * table.size());
    const char* names = image.data() + table[head.e_shstrndx].sh_offset;
    std::map<std::string, std::string> found;
    for (const Elf64_Shdr& one : table) {
        if (one.sh_type != SHT_NOBITS) found[names + one.sh_name] = image.substr(one.sh_offset, one.sh_size);
    }
    return found;
}

// The bytes of each parameter of a kernel. Empty where there is no such kernel.
std::vector<std::size_t> parameter_sizes(const std::string& image, const std::string& name, bool* known) {
    const auto table = sections(image);
    *known = table.count(".text." + name) != 0;
    std::vector<std::size_t> sizes;
    const auto found = table.find(".nv.info." + name);
    if (found == table.end()) return sizes;
    // Records of two bytes for format and attribute, and two for a size or a value.
    const std::string& info = found->second;
    for (std::size_t at = 0; at + 4 <= info.size();) {
        const std::uint32_t head = word(info.data() + at);
        const std::size_t more = (head & 0xff) == 4 ? head >> 16 : 0;
        const std::uint32_t kind = ((head & 0xff00) | (head & 0xff));
        if (kind == kParameterInfo) {
            const std::size_t ordinal = word(info.data() + at + 8) & 0xffff;
            if (sizes.size() <= ordinal) sizes.resize(ordinal + 1);
            sizes[ordinal] = word(info.data() + at + 12) >> 18;
        }
        at += 4 + more;
    }
    return sizes;
}

// The bytes of each parameter of a kernel in PTX, as CuPy's own kernels come: `.param .align 8 .b8 name_param_0[32]`,
// or a plain type such as `.param .f32 name_param_1`. Empty where there is no such kernel.
std::vector<std::size_t> parameter_sizes_in_ptx(const std::string& text, const std::string& name, bool* known) {
    std::vector<std::size_t> sizes;
    const std::size_t begin = text.find(".entry " + name + "(");
    *known = begin != std::string::npos;
    if (!*known) return sizes;
    const std::string list = text.substr(begin, text.find(')', begin) - begin);
    for (std::size_t at = list.find(".param"); at != std::string::npos; at = list.find(".param", at + 1)) {
        const std::string one = list.substr(at, list.find(".param", at + 1) - at);
        const std::size_t bracket = one.find('[');
        if (bracket != std::string::npos) {
            sizes.push_back(std::stoul(one.substr(bracket + 1)));
        } else {
            sizes.push_back(std::stoul(one.substr(one.find_first_of("0123456789"))) / 8);
        }
    }
    return sizes;
}

// The current context's card, or an error.
int here(int* card) {
    if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    *card = current_card();
    return machine().cards[*card].broken;
}

// Kernels get addresses inside structs: each word that is an address of device memory is looked at.
int check_addresses(const Lock& lock, int card, const std::string& name, const void* args, std::size_t nbytes) {
    for (std::size_t at = 0; at + 8 <= nbytes; at += 8) {
        std::uintptr_t address;
        std::memcpy(&address, static_cast<const char*>(args) + at, sizeof address);
        const Allocation* found = find(lock, address, true);
        if (!found) continue;
        const bool reached = found->kind == Kind::pinned || found->card == card ||
                             machine().cards[card].reaches[found->card];
        if (found->live && reached) continue;
        violation(name + " on card " + std::to_string(card) + " was given memory " +
                  (found->live ? "of card " + std::to_string(found->card) + ", which it does not reach" : "that is freed"));
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    return 0;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) {
    Lock lock(machine().mutex);
    start_cuda(lock);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    Lock lock(machine().mutex);
    *count = static_cast<int>(machine().cards.size());
    return machine().started ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuDeviceGetPCIBusId(char* text, int length, CUdevice card) {
    return static_cast<CUresult>(cudaDeviceGetPCIBusId(text, length, card));
}

CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
    *mode = machine().eager ? CU_MODULE_EAGER_LOADING : CU_MODULE_LAZY_LOADING;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    const char* text = std::getenv("RIG_DRIVER");
    *version = text ? std::atoi(text) : CUDA_VERSION;
    return CUDA_SUCCESS;
}

// The compiler asks for tables of the driver that no document describes, and does without them.
CUresult cuGetExportTable(const void** table, const CUuuid*) { return *table = nullptr, CUDA_ERROR_NOT_FOUND; }

CUresult cuGetErrorName(CUresult error, const char** text) {
    switch (error) {
        case CUDA_ERROR_INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case CUDA_ERROR_INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case CUDA_ERROR_INVALID_IMAGE: *text = "CUDA_ERROR_INVALID_IMAGE"; break;
        case CUDA_ERROR_NO_BINARY_FOR_GPU: *text = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
        case CUDA_ERROR_INVALID_HANDLE: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
        case CUDA_ERROR_NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
        case CUDA_ERROR_ILLEGAL_ADDRESS: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case CUDA_ERROR_NOT_SUPPORTED: *text = "CUDA_ERROR_NOT_SUPPORTED"; break;
        default: *text = "CUDA_ERROR_UNKNOWN"; return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = has_context() ? static_cast<CUcontext>(context_of(current_card())) : nullptr;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    Lock lock(machine().mutex);
    int card;
    if (const int error = here(&card)) return static_cast<CUresult>(error);
    if (const int error = refuse_while_recording(lock)) return static_cast<CUresult>(error);
    const std::uintptr_t handle = machine().handle();
    *module = reinterpret_cast<CUmodule>(handle);
    const auto* text = static_cast<const char*>(image);
    if (std::strncmp(text, "//", 2) == 0 || std::strncmp(text, ".version", 8) == 0) {
        machine().modules[handle] = {card, text};
        return CUDA_SUCCESS;
    }
    Elf64_Ehdr head;
    std::memcpy(&head, image, sizeof head);
    if (std::memcmp(head.e_ident, ELFMAG, SELFMAG) != 0 || head.e_machine != kCudaMachine) return CUDA_ERROR_INVALID_IMAGE;
    if ((head.e_flags & 0xff) != 90) return CUDA_ERROR_NO_BINARY_FOR_GPU;  // the cards' compute capability
    const std::size_t nbytes = head.e_shoff + static_cast<std::size_t>(head.e_shnum) * head.e_shentsize;
    machine().modules[handle] = {card, std::string(text, nbytes)};
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    Lock lock(machine().mutex);
    return machine().modules.erase(number(module)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    Lock lock(machine().mutex);
    int card;
    if (const int error = here(&card)) return static_cast<CUresult>(error);
    const auto found = machine().modules.find(number(module));
    if (found == machine().modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    bool known = false;
    const std::string& image = found->second.image;
    const auto read = image.compare(0, SELFMAG, ELFMAG) ? parameter_sizes_in_ptx : parameter_sizes;
    Function made{found->second.card, name, read(image, name, &known)};
    if (!known) return CUDA_ERROR_NOT_FOUND;
    const std::uintptr_t handle = machine().handle();
    machine().functions[handle] = made;
    *function = reinterpret_cast<CUfunction>(handle);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream handle, void** params,
                        void** extra) {
    Lock lock(machine().mutex);
    int card;
    if (const int error = here(&card)) return static_cast<CUresult>(error);
    const auto found = machine().functions.find(number(function));
    const auto stream = stream_of(lock, reinterpret_cast<cudaStream_t>(handle));
    if (found == machine().functions.end() || !stream) return CUDA_ERROR_INVALID_HANDLE;
    if (found->second.card != card || stream->card != card) return CUDA_ERROR_INVALID_HANDLE;
    if (!grid || !grid_y || !grid_z || !block || block * block_y * block_z > 1024 || extra || !params) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (const int error = refuse_default_stream(lock, *stream)) return static_cast<CUresult>(error);
    const std::string& name = found->second.name;
    const auto& sizes = found->second.sizes;
    const std::size_t nbytes = argument_nbytes(name);
    if (nbytes && (sizes.size() != 1 || sizes[0] != nbytes)) {
        violation(name + ": its image takes other parameters than the kernel built by g++");
        return CUDA_ERROR_INVALID_VALUE;
    }
    const bool plain = grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1 && !shared;
    auto work = plain ? kernel_work(name, sizes, grid, block, params) : nullptr;
    if (!work) {
        violation("no kernel " + name + " with " + std::to_string(sizes.size()) + " parameters is known here");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        // Structs of CuPy's begin with their address; what comes behind it is not always initialized.
        const int error = check_addresses(lock, card, name, params[i], nbytes ? sizes[i] : std::min<std::size_t>(8, sizes[i]));
        if (error) {  // found by the card when the kernel runs
            enqueue(lock, *stream, [error] { return error; });
            return CUDA_SUCCESS;
        }
    }
    enqueue(lock, *stream, [work] { return work(), 0; });
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
    const auto status = static_cast<CUresult>(cudaEventQuery(reinterpret_cast<cudaEvent_t>(event)));
    return has_context() ? status : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuGetProcAddress_v2(const char* name, void** address, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
    *address = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // extern "C"
