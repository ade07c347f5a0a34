// check_finite: *found = 1 if any x[i] is an infinity or a NaN; otherwise *found is left as it was.
//
// The flag is sticky, so that one flag serves all buckets of a step: the caller zeroes it (a memset node in
// a CUDA graph). fused_sgd and fused_adam take it as `skip`.
// x: fp32, fp16 or bf16. An element is finite unless all bits of its exponent are set.
// Grid: 1-D grid-stride over packs of 16 bytes, 256 threads, 4 packs in flight per thread; the last pack and
// an array that is not 16-byte aligned go by elements.
// Bytes moved: n * sizeof(x). NumPy twin: fastdp.launch.reference.check_finite
#include "common.cuh"

constexpr int kThreads = 256;

struct CheckFiniteArgs {
    const void* x;
    u32* found;
    i64 n;
};

__device__ __forceinline__ bool not_finite(float x) { return (float_bits(x) & 0x7f800000u) == 0x7f800000u; }
__device__ __forceinline__ bool not_finite(half_t x) { return (x.bits & 0x7c00u) == 0x7c00u; }
__device__ __forceinline__ bool not_finite(bf16_t x) { return (x.bits & 0x7f80u) == 0x7f80u; }

template <class T> __device__ __forceinline__ void check_finite_body(const CheckFiniteArgs& args) {
    constexpr int count = elements_of<T>::per_pack;
    constexpr int unroll = 4;
    const T* x = static_cast<const T*>(args.x);
    const i64 packs = ceil_div(args.n, count);
    bool found = false;
    for (i64 first = grid_thread(); first < packs; first += grid_threads() * unroll) {
        Pack<T, count> in[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const i64 pack = first + u * grid_threads();
            if (pack < packs) in[u] = load_pack<T, count>(x, pack, args.n);
            else in[u].bits = {};
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
#pragma unroll
            for (int e = 0; e < count; ++e) found |= not_finite(in[u].at[e]);
        }
    }
    if (found) store_relaxed_system(args.found, 1);
}

FASTDP_KERNEL(check_finite_f32, CheckFiniteArgs, kThreads, check_finite_body<float>(args))
FASTDP_KERNEL(check_finite_f16, CheckFiniteArgs, kThreads, check_finite_body<half_t>(args))
FASTDP_KERNEL(check_finite_bf16, CheckFiniteArgs, kThreads, check_finite_body<bf16_t>(args))
