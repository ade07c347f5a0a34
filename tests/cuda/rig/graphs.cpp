// Recordings of streams, and graphs: kept as nodes in an order in which they may run.
#include <cuda.h>

#include <algorithm>
#include <set>

#include "machine.h"

using namespace rig;

namespace rig {

int invalidate(Capture& capture, int error) { return capture.valid = false, error; }

int refuse_while_recording(const Lock&) {
    auto& captures = machine().captures;
    for (const auto& one : captures) {
        const auto capture = one.lock();
        if (!capture || capture->mode == cudaStreamCaptureModeRelaxed) continue;
        if (capture->mode == cudaStreamCaptureModeGlobal || capture->thread == std::this_thread::get_id()) {
            return invalidate(*capture, cudaErrorStreamCaptureUnsupported);
        }
    }
    return 0;
}

int refuse_default_stream(const Lock&, const Stream& stream) {
    const Card& card = machine().cards[stream.card];
    if (&stream != card.legacy.get()) return 0;
    int error = 0;
    for (const auto& one : card.all) {
        const auto other = one.lock();
        if (other && other->capture && !(other->flags & cudaStreamNonBlocking)) {
            error = invalidate(*other->capture, cudaErrorStreamCaptureImplicit);
        }
    }
    return error;
}

int wait_in_recording(const Lock&, Stream& stream, const Event& event) {
    if (event.capture && event.capture->over) return cudaErrorCapturedEvent;
    if (!event.capture) return invalidate(*stream.capture, cudaErrorStreamCaptureIsolation);
    if (stream.capture && stream.capture != event.capture) {
        invalidate(*event.capture, 0);
        return invalidate(*stream.capture, cudaErrorStreamCaptureMerge);
    }
    if (!stream.capture) stream.ends.clear();
    stream.capture = event.capture;
    for (const int node : event.ends) {
        if (std::find(stream.ends.begin(), stream.ends.end(), node) == stream.ends.end()) stream.ends.push_back(node);
    }
    return 0;
}

}  // namespace rig

namespace {

template <class Result, class Work> Result locked(Work work) {
    Lock lock(machine().mutex);
    return static_cast<Result>(static_cast<int>(work(lock)));
}

std::uintptr_t number(const void* handle) { return reinterpret_cast<std::uintptr_t>(handle); }

// Whether everything that was recorded comes before these nodes.
bool all_joined(const Graph& graph, const std::vector<int>& ends) {
    std::set<int> seen(ends.begin(), ends.end());
    for (int node = static_cast<int>(graph.nodes.size()) - 1; node >= 0; --node) {
        if (!seen.count(node)) return false;
        seen.insert(graph.nodes[node].after.begin(), graph.nodes[node].after.end());
    }
    return true;
}

// The nodes one after the other, as they were added: no node comes before one that it waits for.
std::function<int()> run(const Graph& graph) {
    const auto nodes = std::make_shared<std::vector<Node>>(graph.nodes);
    return [nodes] {
        for (const Node& node : *nodes) {
            if (const int error = node.work()) return error;
        }
        return 0;
    };
}

}  // namespace

extern "C" {

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    return locked<cudaError_t>([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        *status = !stream->capture          ? cudaStreamCaptureStatusNone
                  : stream->capture->valid ? cudaStreamCaptureStatusActive
                                           : cudaStreamCaptureStatusInvalidated;
        return 0;
    });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    return locked<cudaError_t>([&](Lock& lock) -> int {
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (handle == nullptr || handle == cudaStreamLegacy) return cudaErrorStreamCaptureUnsupported;
        if (stream->capture) return cudaErrorIllegalState;
        stream->capture = std::make_shared<Capture>();
        stream->capture->graph.card = stream->card;
        stream->capture->origin = stream.get();
        stream->capture->mode = mode;
        stream->capture->thread = std::this_thread::get_id();
        stream->ends.clear();
        machine().captures.push_back(stream->capture);
        return 0;
    });
}

// However it ends, no stream records any more.
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    return locked<cudaError_t>([&](Lock& lock) -> int {
        *graph = nullptr;
        const auto stream = stream_of(lock, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        const auto capture = stream->capture;
        if (!capture) return cudaErrorIllegalState;
        if (capture->origin != stream.get()) return invalidate(*capture, cudaErrorStreamCaptureUnmatched);
        if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
            return invalidate(*capture, cudaErrorStreamCaptureWrongThread);
        }
        const bool joined = all_joined(capture->graph, stream->ends);
        for (const auto& entry : machine().streams) {
            if (entry.second->capture == capture) entry.second->capture = nullptr;
        }
        capture->over = true;
        auto& captures = machine().captures;
        captures.erase(std::remove_if(captures.begin(), captures.end(),
                                      [&](const auto& one) { return one.expired() || one.lock() == capture; }),
                       captures.end());
        if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
        if (!joined) return cudaErrorStreamCaptureUnjoined;
        const std::uintptr_t key = machine().handle();
        machine().graphs[key] = capture->graph;
        *graph = reinterpret_cast<cudaGraph_t>(key);
        return 0;
    });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* launchable, cudaGraph_t graph, unsigned long long) {
    return locked<cudaError_t>([&](Lock& lock) -> int {
        const auto found = machine().graphs.find(number(graph));
        if (found == machine().graphs.end()) return cudaErrorInvalidValue;
        if (const int error = refuse_while_recording(lock)) return error;
        const std::uintptr_t key = machine().handle();
        machine().launchable[key].graph = found->second;
        *launchable = reinterpret_cast<cudaGraphExec_t>(key);
        return 0;
    });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t launchable, cudaStream_t handle) {
    return locked<cudaError_t>([&](Lock& lock) -> int {
        const auto found = machine().launchable.find(number(launchable));
        const auto stream = stream_of(lock, handle);
        const bool fits = found != machine().launchable.end() && stream && found->second.graph.card == stream->card;
        return fits ? 0 : cudaErrorInvalidValue;
    });
}

// Into a stream that records, the launch becomes a node.
cudaError_t cudaGraphLaunch(cudaGraphExec_t launchable, cudaStream_t handle) {
    return locked<cudaError_t>([&](Lock& lock) -> int {
        const auto found = machine().launchable.find(number(launchable));
        const auto stream = stream_of(lock, handle);
        if (found == machine().launchable.end() || !stream) return cudaErrorInvalidValue;
        Launchable& launched = found->second;
        if (launched.graph.card != stream->card) return cudaErrorInvalidValue;
        if (const int error = machine().cards[stream->card].broken) return error;
        if (const int error = refuse_default_stream(lock, *stream)) return error;
        std::vector<Point> after;
        if (launched.last && !launched.last->done && !stream->capture) after.push_back(launched.last);
        const Point end = enqueue(lock, *stream, run(launched.graph), after);
        if (end) launched.last = end;
        return 0;
    });
}

// What has been launched still runs.
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t launchable) {
    return locked<cudaError_t>([&](Lock&) -> int {
        return machine().launchable.erase(number(launchable)) ? 0 : cudaErrorInvalidValue;
    });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return locked<cudaError_t>([&](Lock&) -> int {
        return machine().graphs.erase(number(graph)) ? 0 : cudaErrorInvalidValue;
    });
}

CUresult cuGraphCreate(CUgraph* graph, unsigned flags) {
    return locked<CUresult>([&](Lock&) -> int {
        if (flags) return CUDA_ERROR_INVALID_VALUE;
        if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
        const std::uintptr_t key = machine().handle();
        machine().graphs[key].card = current_card();
        *graph = reinterpret_cast<CUgraph>(key);
        return 0;
    });
}

CUresult cuGraphDestroy(CUgraph graph) {
    return cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph)) == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// The child is copied: its nodes come behind the nodes that the new one depends on.
CUresult cuGraphAddChildGraphNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* before, size_t count, CUgraph child) {
    return locked<CUresult>([&](Lock&) -> int {
        auto& graphs = machine().graphs;
        if (!graphs.count(number(graph)) || !graphs.count(number(child))) return CUDA_ERROR_INVALID_VALUE;
        Graph& target = graphs.at(number(graph));
        const Graph& source = graphs.at(number(child));
        Node made{run(source), {}};
        for (size_t i = 0; i < count; ++i) {
            const auto found = machine().nodes.find(number(before[i]));
            if (found == machine().nodes.end() || found->second.first != number(graph)) return CUDA_ERROR_INVALID_VALUE;
            made.after.push_back(found->second.second);
        }
        target.nodes.push_back(made);
        const std::uintptr_t key = machine().handle();
        machine().nodes[key] = {number(graph), static_cast<int>(target.nodes.size()) - 1};
        *node = reinterpret_cast<CUgraphNode>(key);
        return 0;
    });
}

}  // extern "C"
