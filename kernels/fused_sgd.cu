// fused_sgd: one step of Keras's SGD over a flat buffer.
//
//   g = g * clip_scale                      (clip_scale and lr are read from device memory)
//   w = w - (w * weight_decay) * lr         where weight_decay is not 0: decoupled, before the step
//   momentum == 0:  w = w - g * lr
//   otherwise:      m = m * momentum - g * lr;   w = w + m
//   nesterov:       m as above;                  w = w + (m * momentum - g * lr)
//   (source: keras/src/optimizers/{sgd,base_optimizer}.py, Keras 3.15)
//
// A nonzero *skip leaves everything as it is (loss scaling: see check_finite). Arithmetic in fp32; w and m
// have one dtype and are rounded once at the store; g may be fp16 or bf16 beside fp32 weights.
// Grid: 1-D grid-stride over packs of 16 bytes of the wider type, 256 threads; the last pack and arrays that
// are not 16-byte aligned go by elements.
// Bytes moved: n * (2 w + g) without, n * (2 w + 2 m + g) with momentum; 20 bytes per fp32 element.
// NumPy twin: fastdp.launch.reference.fused_sgd
#include "common.cuh"

constexpr int kThreads = 256;

struct FusedSgdArgs {
    void* weights;
    void* momentums;  // null: no momentum
    const void* gradients;
    const float* learning_rate;
    const float* clip_scale;  // null: 1
    const u32* skip;          // null: never
    i64 n;
    float momentum;
    float weight_decay;
    int nesterov;
};

template <class W, class G> __device__ __forceinline__ void fused_sgd_body(const FusedSgdArgs& args) {
    constexpr int count = elements_of<W>::per_pack;
    if (args.skip && *args.skip) return;
    const float lr = *args.learning_rate;
    const float clip = args.clip_scale ? *args.clip_scale : 1.0f;
    W* weights = static_cast<W*>(args.weights);
    W* momentums = static_cast<W*>(args.momentums);
    const G* gradients = static_cast<const G*>(args.gradients);
    const i64 packs = ceil_div(args.n, count);
    for (i64 pack = grid_thread(); pack < packs; pack += grid_threads()) {
        Pack<W, count> w = load_pack<W, count>(weights, pack, args.n);
        const Pack<G, count> g = load_pack<G, count>(gradients, pack, args.n);
        Pack<W, count> m;
        if (momentums) m = load_pack<W, count>(momentums, pack, args.n);
#pragma unroll
        for (int e = 0; e < count; ++e) {
            float value = to_float(w.at[e]);
            if (args.weight_decay != 0.0f) value -= value * args.weight_decay * lr;
            const float step = to_float(g.at[e]) * clip * lr;
            if (momentums) {
                const float velocity = to_float(m.at[e]) * args.momentum - step;
                value += args.nesterov ? velocity * args.momentum - step : velocity;
                m.at[e] = from_float<W>(velocity);
            } else {
                value -= step;
            }
            w.at[e] = from_float<W>(value);
        }
        store_pack<W, count>(weights, pack, args.n, w);
        if (momentums) store_pack<W, count>(momentums, pack, args.n, m);
    }
}

FASTDP_KERNEL(fused_sgd_f32_f32, FusedSgdArgs, kThreads, fused_sgd_body<float, float>(args))
FASTDP_KERNEL(fused_sgd_f32_f16, FusedSgdArgs, kThreads, fused_sgd_body<float, half_t>(args))
FASTDP_KERNEL(fused_sgd_f32_bf16, FusedSgdArgs, kThreads, fused_sgd_body<float, bf16_t>(args))
FASTDP_KERNEL(fused_sgd_f16_f16, FusedSgdArgs, kThreads, fused_sgd_body<half_t, half_t>(args))
FASTDP_KERNEL(fused_sgd_bf16_bf16, FusedSgdArgs, kThreads, fused_sgd_body<bf16_t, bf16_t>(args))
