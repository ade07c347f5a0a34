// Runs fastdp's kernels, compiled by g++ behind tests/kernels/host_cuda.h, and two of CuPy's own.
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>

#include "host_cuda.h"

#include "../../../kernels/peer_signals.cuh"

namespace rig {
namespace {

using host_cuda::Kernel;

// Blocks that wait for those of other ranks are threads here, and a card has thousands. Grid and block only say how the
// elements are shared out, the same on all ranks.
constexpr unsigned kBlocks = 2, kThreads = 4;

void run_thread(const Kernel& kernel, const char* args, dim3 grid, dim3 block, unsigned b, unsigned t) {
    gridDim = grid;
    blockDim = block;
    blockIdx = {b, 0, 0};
    threadIdx = {t, 0, 0};
    kernel.call(kernel.function, args);
}

void run_in_turn(const Kernel& kernel, const char* args, unsigned grid, unsigned block) {
    for (unsigned b = 0; b < grid; ++b) {
        for (unsigned t = 0; t < block; ++t) run_thread(kernel, args, {grid, 1, 1}, {block, 1, 1}, b, t);
    }
}

void run_at_once(const Kernel& kernel, const char* args, unsigned grid, unsigned block) {
    std::vector<std::unique_ptr<host_cuda::Block>> shared;
    std::vector<std::thread> threads;
    for (unsigned b = 0; b < grid; ++b) {
        shared.push_back(std::make_unique<host_cuda::Block>(block));
        for (unsigned t = 0; t < block; ++t) {
            threads.emplace_back([&kernel, args, grid, block, b, t, own = shared.back().get()] {
                host_cuda::block = own;
                run_thread(kernel, args, {grid, 1, 1}, {block, 1, 1}, b, t);
            });
        }
    }
    for (auto& thread : threads) thread.join();
}

bool starts_with(const std::string& text, const char* beginning) { return text.rfind(beginning, 0) == 0; }

// CuPy's elementwise kernels take arrays by value: address, size, shape, strides in bytes.
struct CupyArray {
    char* data;
    std::int64_t size;
    std::vector<std::int64_t> shape, strides;

    CupyArray(const void* parameter, std::size_t nbytes) {
        const auto* words = static_cast<const std::int64_t*>(parameter);
        const std::size_t axes = (nbytes - 16) / 16;
        data = reinterpret_cast<char*>(words[0]);
        size = words[1];
        shape.assign(words + 2, words + 2 + axes);
        strides.assign(words + 2 + axes, words + 2 + 2 * axes);
    }

    char* at(std::int64_t index) const {
        std::int64_t offset = 0;
        for (std::size_t axis = shape.size(); axis-- > 0;) {
            offset += index % shape[axis] * strides[axis];
            index /= shape[axis];
        }
        return data + offset;
    }
};

template <class T> std::function<void()> copy(const CupyArray& from, const CupyArray& to) {
    return [=] {
        for (std::int64_t i = 0; i < to.size; ++i) std::memcpy(to.at(i), from.at(i), sizeof(T));
    };
}

template <class T> std::function<void()> multiply(const CupyArray& x, double factor, const CupyArray& y) {
    return [=] {
        for (std::int64_t i = 0; i < y.size; ++i) {
            T value;
            std::memcpy(&value, x.at(i), sizeof value);
            value = static_cast<T>(value * static_cast<T>(factor));
            std::memcpy(y.at(i), &value, sizeof value);
        }
    };
}

// What FunctionProgram asks of CuPy itself: gradients times a share, and copies of arrays of any strides.
std::function<void()> cupy_work(const std::string& name, const std::vector<std::size_t>& sizes, void** params) {
    const auto array = [&](int i) { return CupyArray(params[i], sizes[i]); };
    const auto number = [&](int i) {
        return sizes[i] == 8 ? *static_cast<double*>(params[i]) : *static_cast<float*>(params[i]);
    };
    if (name == "cupy_copy__float32_float32") return copy<float>(array(0), array(1));
    if (name == "cupy_copy__float64_float64") return copy<double>(array(0), array(1));
    if (name == "cupy_multiply__float32_float_float32") return multiply<float>(array(0), number(1), array(2));
    if (name == "cupy_multiply__float64_float_float64") return multiply<double>(array(0), number(1), array(2));
    return {};
}

template <class T, class Total, class In, class Out>
void sum_of(void* result, const std::vector<const void*>& sources, std::size_t count, In in, Out out) {
    for (std::size_t i = 0; i < count; ++i) {
        Total total = in(static_cast<const T*>(sources[0])[i]);
        for (std::size_t rank = 1; rank < sources.size(); ++rank) total += in(static_cast<const T*>(sources[rank])[i]);
        static_cast<T*>(result)[i] = out(total);
    }
}

template <class T> void plain_sum(void* result, const std::vector<const void*>& sources, std::size_t count) {
    const auto same = [](T x) { return x; };
    sum_of<T, T>(result, sources, count, same, same);
}

float bfloat_to_float(unsigned short x) { return host_cuda::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

unsigned short float_to_bfloat(float x) {  // to nearest even
    const auto bits = host_cuda::bit_cast<std::uint32_t>(x);
    if (std::isnan(x)) return 0x7fc0;
    return static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

std::size_t item_nbytes(int dtype) {
    constexpr std::size_t nbytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return nbytes[dtype];
}

void sum(void* result, const std::vector<const void*>& sources, std::size_t count, int dtype) {
    switch (dtype) {
        case 0: return plain_sum<std::int8_t>(result, sources, count);
        case 1: return plain_sum<std::uint8_t>(result, sources, count);
        case 2: return plain_sum<std::int32_t>(result, sources, count);
        case 3: return plain_sum<std::uint32_t>(result, sources, count);
        case 4: return plain_sum<std::int64_t>(result, sources, count);
        case 5: return plain_sum<std::uint64_t>(result, sources, count);
        case 6: return sum_of<unsigned short, float>(result, sources, count, host_cuda::half_to_float, host_cuda::float_to_half);
        case 7: return plain_sum<float>(result, sources, count);
        case 8: return plain_sum<double>(result, sources, count);
        default: return sum_of<unsigned short, float>(result, sources, count, bfloat_to_float, float_to_bfloat);
    }
}

std::size_t argument_nbytes(const std::string& name) {
    const auto found = host_cuda::kernels().find(name);
    return found == host_cuda::kernels().end() ? 0 : found->second.args_nbytes;
}

std::function<void()> kernel_work(const std::string& name, const std::vector<std::size_t>& sizes, unsigned grid,
                                  unsigned block, void** params) {
    const auto found = host_cuda::kernels().find(name);
    if (found == host_cuda::kernels().end()) return cupy_work(name, sizes, params);
    const Kernel kernel = found->second;
    const auto* bytes = static_cast<const char*>(params[0]);
    const auto args = std::make_shared<std::vector<char>>(bytes, bytes + kernel.args_nbytes);
    if (starts_with(name, "all_reduce") || starts_with(name, "reduce_scatter")) {
        grid = grid < kBlocks ? grid : kBlocks;
        block = block < kThreads ? block : kThreads;
        return [=] {
            const auto* given = reinterpret_cast<const AllReduceArgs*>(args->data());
            rank_comes(reinterpret_cast<std::uintptr_t>(given->signals[0]), given->rank, given->ranks);
            run_at_once(kernel, args->data(), grid, block);
        };
    }
    return [=] { run_in_turn(kernel, args->data(), grid, block); };
}

}  // namespace rig
