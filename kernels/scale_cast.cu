// scale_cast: y[i] = cast(x[i] * (scale * *device_scale)), device_scale optional.
//
// x: uint8, fp32, fp16 or bf16; y: fp32, fp16 or bf16; fp32 arithmetic, rounded once. y may be x where both
// element sizes are equal.
// Grid: 1-D grid-stride over packs of 16 bytes of the wider type, 256 threads, two packs in flight per
// thread; the last pack and arrays that are not 16-byte aligned go by elements.
// Bytes moved: n * (sizeof(x) + sizeof(y)). NumPy twin: fastdp.launch.reference.scale_cast
#include "common.cuh"

constexpr int kThreads = 256;

struct ScaleCastArgs {
    const void* x;
    void* y;
    const float* device_scale;
    i64 n;
    float scale;
};

template <class In, class Out> __device__ __forceinline__ void scale_cast_body(const ScaleCastArgs& args) {
    constexpr int count = 16 / static_cast<int>(sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));
    constexpr int unroll = 2;
    const float scale = args.device_scale ? args.scale * *args.device_scale : args.scale;
    const In* x = static_cast<const In*>(args.x);
    Out* y = static_cast<Out*>(args.y);
    const i64 packs = ceil_div(args.n, count);
    for (i64 first = grid_thread(); first < packs; first += grid_threads() * unroll) {
        Pack<In, count> in[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const i64 pack = first + u * grid_threads();
            if (pack < packs) in[u] = load_pack<In, count>(x, pack, args.n);
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const i64 pack = first + u * grid_threads();
            if (pack >= packs) break;
            Pack<Out, count> out;
#pragma unroll
            for (int e = 0; e < count; ++e) out.at[e] = from_float<Out>(to_float(in[u].at[e]) * scale);
            store_pack<Out, count>(y, pack, args.n, out);
        }
    }
}

#define SCALE_CAST(from, In, to, Out) \
    FASTDP_KERNEL(scale_cast_##from##_##to, ScaleCastArgs, kThreads, scale_cast_body<In, Out>(args))
#define SCALE_CAST_FROM(from, In) \
    SCALE_CAST(from, In, f32, float) \
    SCALE_CAST(from, In, f16, half_t) \
    SCALE_CAST(from, In, bf16, bf16_t)

SCALE_CAST_FROM(u8, u8)
SCALE_CAST_FROM(f32, float)
SCALE_CAST_FROM(f16, half_t)
SCALE_CAST_FROM(bf16, bf16_t)
