// The runtime's entry points that CuPy and fastdp call: devices, memory, copies, streams and events.
#include <chrono>
#include <cstring>
#include <thread>

#include "machine.h"

using namespace rig;

extern "C" int cuDriverGetVersion(int*);

namespace {

thread_local int last_error = 0;

std::uintptr_t number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }
int cards() { return static_cast<int>(machine().cards.size()); }

// One call of the runtime: the current card's lasting failure comes before anything else, and errors are remembered.
template <class Work> cudaError_t call(Work work) {
    Lock lock(machine().mutex);
    start_cuda(lock);
    if (cards() == 0) return static_cast<cudaError_t>(last_error = cudaErrorNoDevice);
    int error = machine().cards[current_card()].broken;
    if (!error) error = work(lock);
    if (error && error != cudaErrorNotReady) last_error = error;
    return static_cast<cudaError_t>(error);
}

// Whether copies between two cards do not arrive, though the cards are said to reach each other.
bool falsely_reached(int card, int peer) {
    for (const auto& pair : machine().falsely) {
        if (pair == std::make_pair(card, peer) || pair == std::make_pair(peer, card)) return true;
    }
    return false;
}

// One end of a copy.
struct End {
    const Allocation* memory;  // null for pageable memory
    bool on_card() const { return memory && memory->kind == Kind::device; }
};

// Where an address lies, or false where the bytes leave an allocation or are freed.
bool look_up(const Lock& lock, const void* address, std::size_t nbytes, End* end) {
    end->memory = find(lock, number(address));
    if (end->memory) return number(address) + nbytes <= end->memory->base + end->memory->nbytes;
    if (!find(lock, number(address), true)) return true;
    violation("a copy uses memory that is freed");
    return false;
}

// A copy from or to pageable memory is over when the call returns; others are in the order of the stream.
int copy(Lock& lock, void* to, const void* from, std::size_t nbytes, cudaMemcpyKind kind, cudaStream_t handle) {
    const auto stream = stream_of(lock, handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (const int error = machine().cards[stream->card].broken) return error;
    if (!nbytes) return 0;
    End target, source;
    if (!look_up(lock, to, nbytes, &target) || !look_up(lock, from, nbytes, &source)) return cudaErrorInvalidValue;
    const bool out = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    const bool in = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (out != source.on_card() || in != target.on_card())) return cudaErrorInvalidValue;
    const bool pageable = !target.memory || !source.memory;
    if (pageable && stream->capture) return invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported);
    if (const int error = refuse_default_stream(lock, *stream)) return error;
    const bool garbage = target.on_card() && source.on_card() && falsely_reached(target.memory->card, source.memory->card);
    const Point done = enqueue(lock, *stream, [=] {
        return garbage ? std::memset(to, 0x5a, nbytes) : std::memcpy(to, from, nbytes), 0;
    });
    if (pageable) wait(lock, done);
    return 0;
}

int fill(Lock& lock, void* address, int value, std::size_t nbytes, cudaStream_t handle, Point* done) {
    const auto stream = stream_of(lock, handle);
    if (!stream || stream->card != current_card()) return cudaErrorInvalidResourceHandle;
    if (const int error = refuse_default_stream(lock, *stream)) return error;
    End end;
    if (!look_up(lock, address, nbytes, &end) || !end.memory) return cudaErrorInvalidValue;
    *done = enqueue(lock, *stream, [=] { return std::memset(address, value, nbytes), 0; });
    return 0;
}

int create_stream(const Lock& lock, cudaStream_t* handle, unsigned flags, int priority) {
    if (flags & ~static_cast<unsigned>(cudaStreamNonBlocking)) return cudaErrorInvalidValue;
    enter_context(lock);
    const std::uintptr_t key = machine().handle();
    machine().streams[key] = make_stream(lock, current_card(), flags, priority > 0 ? 0 : priority < -5 ? -5 : priority);
    *handle = reinterpret_cast<cudaStream_t>(key);
    return 0;
}

int create_event(const Lock& lock, cudaEvent_t* handle, unsigned flags) {
    if (flags & ~7u) return cudaErrorInvalidValue;
    enter_context(lock);
    const std::uintptr_t key = machine().handle();
    auto event = std::make_shared<Event>();
    event->card = current_card();
    event->flags = flags;
    machine().events[key] = event;
    *handle = reinterpret_cast<cudaEvent_t>(key);
    return 0;
}

int can_reach(int card, int peer) {
    for (const auto& pair : machine().apart) {
        if ((pair.first == card && pair.second == peer) || (pair.first == peer && pair.second == card)) return 0;
    }
    return card != peer;
}

}  // namespace

extern "C" {

// Errors.

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorNotReady: return "cudaErrorNotReady";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        case cudaErrorPeerAccessUnsupported: return "cudaErrorPeerAccessUnsupported";
        case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
        case cudaErrorPeerAccessNotEnabled: return "cudaErrorPeerAccessNotEnabled";
        case cudaErrorTooManyPeers: return "cudaErrorTooManyPeers";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        case cudaErrorIllegalState: return "cudaErrorIllegalState";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
        case cudaErrorStreamCaptureMerge: return "cudaErrorStreamCaptureMerge";
        case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
        case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
        case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
        case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
        case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
        case cudaErrorStreamCaptureWrongThread: return "cudaErrorStreamCaptureWrongThread";
        default: return "cudaErrorUnknown";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(error);
}

cudaError_t cudaGetLastError() {
    Lock lock(machine().mutex);
    const int error = last_error;
    last_error = cards() ? machine().cards[current_card()].broken : 0;
    return static_cast<cudaError_t>(error);
}

cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(last_error); }

// Devices.

cudaError_t cudaDriverGetVersion(int* version) { return static_cast<cudaError_t>(cuDriverGetVersion(version)); }

cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
    Lock lock(machine().mutex);
    start_cuda(lock);
    *count = cards();
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* card) {
    return call([&](Lock&) { return *card = current_card(), 0; });
}

cudaError_t cudaSetDevice(int card) {
    Lock lock(machine().mutex);
    start_cuda(lock);
    if (card < 0 || card >= cards()) return static_cast<cudaError_t>(last_error = cudaErrorInvalidDevice);
    set_card(card);
    enter_context(lock);  // since CUDA 12
    return static_cast<cudaError_t>(machine().cards[card].broken);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int card) {
    return call([&](Lock&) -> int {
        if (card < 0 || card >= cards()) return cudaErrorInvalidDevice;
        switch (attribute) {
            case cudaDevAttrComputeCapabilityMajor: *value = 9; return 0;
            case cudaDevAttrComputeCapabilityMinor: *value = 0; return 0;
            case cudaDevAttrMultiProcessorCount: *value = 132; return 0;
            case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return 0;
            case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; return 0;
            case cudaDevAttrWarpSize: *value = 32; return 0;
            default: *value = 0; return 0;
        }
    });
}

cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int card) {
    return call([&](Lock&) -> int {
        if (card < 0 || card >= cards()) return cudaErrorInvalidDevice;
        std::memset(properties, 0, sizeof *properties);
        std::strcpy(properties->name, "host memory behind a CUDA of fastdp's tests");
        properties->major = 9;
        properties->multiProcessorCount = 132;
        properties->maxThreadsPerBlock = 1024;
        properties->warpSize = 32;
        properties->totalGlobalMem = machine().card_nbytes;
        return 0;
    });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int card) {
    return call([&](Lock&) -> int {
        if (card < 0 || card >= cards()) return cudaErrorInvalidDevice;
        return std::snprintf(text, length, "0000:%02X:00.0", 0x3b + card), 0;
    });
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int card, int peer) {
    return call([&](Lock&) -> int {
        if (card < 0 || card >= cards() || peer < 0 || peer >= cards()) return cudaErrorInvalidDevice;
        return *can = can_reach(card, peer), 0;
    });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    return call([&](Lock& lock) -> int {
        if (flags) return cudaErrorInvalidValue;
        if (peer < 0 || peer >= cards() || peer == current_card()) return cudaErrorInvalidDevice;
        if (!can_reach(current_card(), peer)) return cudaErrorPeerAccessUnsupported;
        enter_context(lock);
        if (const int error = refuse_while_recording(lock)) return error;
        auto& reaches = machine().cards[current_card()].reaches;
        if (reaches[peer]) return cudaErrorPeerAccessAlreadyEnabled;
        int enabled = 0;
        for (const bool one : reaches) enabled += one;
        if (enabled == kMaxPeers) return cudaErrorTooManyPeers;
        return reaches[peer] = true, 0;
    });
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
    return call([&](Lock&) -> int {
        if (peer < 0 || peer >= cards()) return cudaErrorInvalidDevice;
        auto& reaches = machine().cards[current_card()].reaches;
        if (!reaches[peer]) return cudaErrorPeerAccessNotEnabled;
        return reaches[peer] = false, 0;
    });
}

cudaError_t cudaDeviceSynchronize() {
    return call([&](Lock& lock) -> int {
        enter_context(lock);
        if (const int error = refuse_while_recording(lock)) return error;
        check_wait(lock, "cudaDeviceSynchronize", true);
        wait_for_card(lock, current_card());
        return machine().cards[current_card()].broken;
    });
}

// Memory.

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return call([&](Lock& lock) {
        enter_context(lock);
        *total = machine().card_nbytes;
        *free = *total - machine().cards[current_card()].used;
        return 0;
    });
}

cudaError_t cudaMalloc(void** address, size_t nbytes) {
    return call([&](Lock& lock) {
        enter_context(lock);
        if (const int error = refuse_while_recording(lock)) return error;
        return allocate(lock, address, nbytes, Kind::device);
    });
}

cudaError_t cudaFree(void* address) {
    return call([&](Lock& lock) {
        enter_context(lock);
        if (const int error = refuse_while_recording(lock)) return error;
        return release(lock, address, Kind::device);
    });
}

cudaError_t cudaHostAlloc(void** address, size_t nbytes, unsigned flags) {
    return call([&](Lock& lock) -> int {
        if (flags & ~7u) return cudaErrorInvalidValue;
        enter_context(lock);
        if (const int error = refuse_while_recording(lock)) return error;
        return allocate(lock, address, nbytes, Kind::pinned);
    });
}

cudaError_t cudaFreeHost(void* address) {
    return call([&](Lock& lock) -> int {
        if (const int error = refuse_while_recording(lock)) return error;
        return release(lock, address, Kind::pinned);
    });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    return call([&](Lock& lock) {
        const Allocation* found = find(lock, number(address));
        auto* pointer = const_cast<void*>(address);
        *attributes = {};
        attributes->type = !found ? cudaMemoryTypeUnregistered
                           : found->kind == Kind::device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
        attributes->device = found ? found->card : cudaInvalidDeviceId;
        attributes->devicePointer = found ? pointer : nullptr;
        attributes->hostPointer = found && found->kind == Kind::device ? nullptr : pointer;
        return 0;
    });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return call([&](Lock& lock) { return copy(lock, to, from, nbytes, kind, stream); });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, nullptr);
        if (const int error = refuse_while_recording(lock)) return error;
        if (const int error = copy(lock, to, from, nbytes, kind, nullptr)) return error;
        wait(lock, stream->tail);
        return machine().cards[stream->card].broken;
    });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int to_card, const void* from, int from_card, size_t nbytes,
                                cudaStream_t stream) {
    return call([&](Lock& lock) -> int {
        const Allocation* target = find(lock, number(to));
        const Allocation* source = find(lock, number(from));
        if (!target || !source || target->card != to_card || source->card != from_card) return cudaErrorInvalidValue;
        return copy(lock, to, from, nbytes, cudaMemcpyDeviceToDevice, stream);
    });
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t nbytes, cudaStream_t stream) {
    return call([&](Lock& lock) {
        Point done;
        return fill(lock, address, value, nbytes, stream, &done);
    });
}

cudaError_t cudaMemset(void* address, int value, size_t nbytes) {
    return call([&](Lock& lock) {
        Point done;
        return fill(lock, address, value, nbytes, nullptr, &done);
    });
}

// Streams.

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return call([&](Lock& lock) { return create_stream(lock, stream, cudaStreamDefault, 0); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return call([&](Lock& lock) { return create_stream(lock, stream, flags, 0); });
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return call([&](Lock& lock) { return create_stream(lock, stream, flags, priority); });
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        return *priority = stream->priority, 0;
    });
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        return *flags = stream->flags, 0;
    });
}

// What is enqueued still runs.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    return call([&](Lock&) -> int {
        const auto found = machine().streams.find(number(handle));
        if (found == machine().streams.end()) return cudaErrorInvalidResourceHandle;
        found->second->closed = true;
        found->second->wake.notify_all();
        machine().streams.erase(found);
        return 0;
    });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported);
        check_wait(lock, "cudaStreamSynchronize", false);
        wait(lock, stream->tail);
        return machine().cards[stream->card].broken;
    });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (const int error = machine().cards[stream->card].broken) return error;
        if (stream->capture) return invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported);
        return !stream->tail || stream->tail->done ? 0 : cudaErrorNotReady;
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        const auto event = event_of(lock, event_handle);
        if (!stream || !event) return cudaErrorInvalidResourceHandle;
        if (flags) return cudaErrorInvalidValue;
        if (const int error = refuse_default_stream(lock, *stream)) return error;
        if (!event->last && !event->capture) return 0;  // never recorded: there is nothing to wait for
        if (stream->capture || event->capture) return wait_in_recording(lock, *stream, *event);
        if (event->last && !event->last->done) enqueue(lock, *stream, nullptr, {event->last});
        return 0;
    });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
    return call([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (const int error = refuse_default_stream(lock, *stream)) return error;
        enqueue(lock, *stream, [=] { return function(data), 0; });
        return 0;
    });
}

// For tests: how many queries have been held back; the n-th allocation that is not freed, and its card or -1, or false;
// whether a card has a context, and reaches another; whether work may begin.

int rigHeldQueries() { return Lock(machine().mutex), machine().held_queries; }

int rigAllocation(int n, std::uintptr_t* base, size_t* nbytes, int* card) {
    Lock lock(machine().mutex);
    for (const auto& entry : machine().memory) {
        const Allocation& one = entry.second;
        if (!one.live || n--) continue;
        *base = one.base;
        *nbytes = one.nbytes;
        *card = one.kind == Kind::device ? one.card : -1;
        return true;
    }
    return false;
}

int rigHasContext(int card) { return Lock(machine().mutex), machine().cards[card].context; }
int rigReaches(int card, int peer) { return Lock(machine().mutex), machine().cards[card].reaches[peer]; }

void rigHold(int held) {
    Lock lock(machine().mutex);
    machine().held = held;
    for (const Card& card : machine().cards) {
        for (const auto& one : card.all) {
            if (const auto stream = one.lock()) stream->wake.notify_all();
        }
    }
}

// Events.

cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return call([&](Lock& lock) { return create_event(lock, event, cudaEventDefault); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return call([&](Lock& lock) { return create_event(lock, event, flags); });
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    return call([&](Lock&) -> int {
        return machine().events.erase(number(handle)) ? 0 : cudaErrorInvalidResourceHandle;
    });
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
    return call([&](Lock& lock) -> int {
        const auto event = event_of(lock, handle);
        const auto stream = stream_of(lock, stream_handle);
        if (!event || !stream || event->card != stream->card) return cudaErrorInvalidResourceHandle;
        if (const int error = refuse_default_stream(lock, *stream)) return error;
        event->capture = stream->capture;
        event->ends = stream->ends;
        event->last = stream->capture ? nullptr : enqueue(lock, *stream, nullptr);
        return 0;
    });
}

// With RIG_QUERY_MS a query blocks for so long, as it may while the driver loads a kernel. With RIG_QUERY_HOLD_MS it does
// while ranks wait for others in a collective, for so long at most: somebody else is to launch those.
cudaError_t cudaEventQuery(cudaEvent_t handle) {
    return call([&](Lock& lock) -> int {
        if (machine().query_milliseconds) {
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::milliseconds(machine().query_milliseconds));
            lock.lock();
        }
        Machine& all = machine();
        if (all.hold_milliseconds && all.lonely) {
            ++all.held_queries;
            const auto most = std::chrono::milliseconds(all.hold_milliseconds);
            const bool met = all.finished.wait_for(lock, most, [&] { return !all.lonely; });
            if (!met) violation("ranks waited for others while a query of an event was held back");
        }
        const auto event = event_of(lock, handle);
        if (!event) return cudaErrorInvalidResourceHandle;
        if (const int error = machine().cards[event->card].broken) return error;
        if (event->capture) return invalidate(*event->capture, cudaErrorCapturedEvent);
        if (const int error = refuse_while_recording(lock)) return error;
        return !event->last || event->last->done ? 0 : cudaErrorNotReady;
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    return call([&](Lock& lock) -> int {
        const auto event = event_of(lock, handle);
        if (!event) return cudaErrorInvalidResourceHandle;
        if (event->capture) return invalidate(*event->capture, cudaErrorCapturedEvent);
        if (const int error = refuse_while_recording(lock)) return error;
        check_wait(lock, "cudaEventSynchronize", false);
        wait(lock, event->last);
        return machine().cards[event->card].broken;
    });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return call([&](Lock& lock) -> int {
        const auto a = event_of(lock, start), b = event_of(lock, end);
        if (!a || !b || !a->last || !b->last || ((a->flags | b->flags) & cudaEventDisableTiming)) {
            return cudaErrorInvalidResourceHandle;
        }
        if (!a->last->done || !b->last->done) return cudaErrorNotReady;
        *milliseconds = static_cast<float>(1e3 * (b->last->seconds - a->last->seconds));
        return 0;
    });
}

}  // extern "C"
