// l2_norm: the Euclidean norm of one or more flat buffers and the clip scale of Keras's global_clipnorm.
//
//   l2_norm_partial: partials[b] = sum of x[i]^2 over block b's elements           (once per buffer)
//   l2_norm_finish:  norm  = sqrt(sum of partials)                                  (once)
//                    scale = clip_norm * min(1 / norm, 1 / clip_norm) + (norm - norm), or 1 without clip_norm
//                    (source: keras/src/optimizers/base_optimizer.py, clip_by_global_norm, Keras 3.15);
//                    a norm of infinity or NaN gives a scale of NaN
//
// Deterministic: the number of blocks depends on n alone, never on the GPU, and every sum has a fixed order:
// a thread adds its packs in fp32, element by element, the block adds its threads in fp64 by a tree of
// halves, and one block adds all partials in fp64. No atomics.
// Grid: partial: 1-D, at most 1,024 blocks, 256 threads, grid-stride over packs of 16 bytes, 4 packs in
// flight per thread; finish: one block of 256 threads. x: fp32, fp16 or bf16.
// Bytes moved: n * sizeof(x), plus 16 per block. NumPy twin: fastdp.launch.reference.l2_norm
#include "common.cuh"

constexpr int kThreads = 256;

struct L2NormPartialArgs {
    const void* x;
    double* partials;
    i64 n;
};

struct L2NormFinishArgs {
    const double* partials;
    float* norm;
    float* scale;
    i64 count;
    float clip_norm;          // 0: no clipping
    float inverse_clip_norm;  // rounded from fp64, as Keras does
};

// The sum over the block's 256 threads, valid in thread 0.
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double sums[kThreads];
    sums[threadIdx.x] = value;
    for (u32 half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[threadIdx.x];
}

template <class T> __device__ __forceinline__ void l2_norm_partial_body(const L2NormPartialArgs& args) {
    constexpr int count = elements_of<T>::per_pack;
    constexpr int unroll = 4;
    const T* x = static_cast<const T*>(args.x);
    const i64 packs = ceil_div(args.n, count);
    float sum = 0.0f;
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
            for (int e = 0; e < count; ++e) {
                const float value = to_float(in[u].at[e]);
                sum += value * value;
            }
        }
    }
    const double total = block_sum(sum);
    if (threadIdx.x == 0) args.partials[blockIdx.x] = total;
}

__device__ __forceinline__ void l2_norm_finish_body(const L2NormFinishArgs& args) {
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < args.count; i += kThreads) sum += args.partials[i];
    const double total = block_sum(sum);
    if (threadIdx.x != 0) return;
    const float norm = static_cast<float>(sqrt(total));
    float scale = 1.0f;
    if (args.clip_norm > 0.0f) {
        const float inverse = 1.0f / norm;
        const float shrink = inverse < args.inverse_clip_norm ? inverse : args.inverse_clip_norm;
        scale = args.clip_norm * shrink + (norm - norm);
    }
    *args.norm = norm;
    *args.scale = scale;
}

FASTDP_KERNEL(l2_norm_partial_f32, L2NormPartialArgs, kThreads, l2_norm_partial_body<float>(args))
FASTDP_KERNEL(l2_norm_partial_f16, L2NormPartialArgs, kThreads, l2_norm_partial_body<half_t>(args))
FASTDP_KERNEL(l2_norm_partial_bf16, L2NormPartialArgs, kThreads, l2_norm_partial_body<bf16_t>(args))
FASTDP_KERNEL(l2_norm_finish, L2NormFinishArgs, kThreads, l2_norm_finish_body(args))
