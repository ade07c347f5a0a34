// A CPU that stands in for a CUDA device: what kernels/*.cu need of the CUDA language, for g++.
//
// A launch runs in one of two modes (see runner.cpp):
//   loop        one OS thread runs all blocks and threads in turn; a barrier is an error
//   concurrent  all threads of all blocks are OS threads, as the signals between ranks need
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#define FASTDP_HOST_CUDA 1
#define __device__
#define __global__
#define __forceinline__ inline

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 { unsigned x, y, z; };

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace host_cuda {

struct Block {  // what the threads of one block share
    pthread_barrier_t barrier;
    std::atomic<int> any{0};
    explicit Block(unsigned threads) { pthread_barrier_init(&barrier, nullptr, threads); }
    ~Block() { pthread_barrier_destroy(&barrier); }
};

inline thread_local Block* block = nullptr;

inline void barrier() {
    if (!block) {
        std::fprintf(stderr, "__syncthreads in a kernel that was launched in loop mode\n");
        std::abort();
    }
    pthread_barrier_wait(&block->barrier);
}

template <class To, class From> To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline float half_to_float(unsigned short bits) {
    const int exponent = (bits >> 10) & 31;
    const int mantissa = bits & 1023;
    float magnitude;
    if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
    else if (exponent == 0) magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    else magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

inline unsigned short float_to_half(float x) {  // to nearest even; std::nearbyint rounds in the default mode
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(magnitude, &exponent);                      // magnitude = f * 2^exponent, 0.5 <= f < 1
    if (magnitude == 0.0f || exponent < -13) exponent = -13;  // subnormal: unit 2^-24
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
    return sign | static_cast<unsigned short>(units + (exponent + 13) * 1024);
}

// A kernel by name: the size of its argument struct and a call through its bytes.
struct Kernel {
    std::size_t args_nbytes;
    void (*function)();
    void (*call)(void (*function)(), const void* args);
};

inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}

struct Registration {
    template <class Args> Registration(const char* name, void (*kernel)(const Args)) {
        kernels()[name] = {sizeof(Args), reinterpret_cast<void (*)()>(kernel),
                           [](void (*function)(), const void* args) {
                               Args copy;
                               std::memcpy(&copy, args, sizeof copy);
                               reinterpret_cast<void (*)(const Args)>(function)(copy);
                           }};
    }
};

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::barrier(); }

inline int __syncthreads_or(int predicate) {
    if (predicate) host_cuda::block->any = 1;
    host_cuda::barrier();
    const int any = host_cuda::block->any;
    host_cuda::barrier();
    if (threadIdx.x == 0) host_cuda::block->any = 0;
    host_cuda::barrier();
    return any;
}

inline void __nanosleep(unsigned) { sched_yield(); }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = (static_cast<unsigned long long>(high) << 32) | low;
    return static_cast<unsigned>(both >> (shift & 31));
}
