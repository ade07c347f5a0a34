// fused_adam: one step of Keras's Adam or AdamW over a flat buffer.
//
//   t = *iterations + 1;  alpha = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)
//   g = g * clip_scale                      (lr, clip_scale and iterations are read from device memory)
//   w = w - (w * weight_decay) * lr         where weight_decay is not 0: decoupled, before the step
//   m = m + (g - m) * (1 - beta_1)
//   v = v + (g^2 - v) * (1 - beta_2)
//   amsgrad: v_hat = max(v_hat, v), used in place of v below
//   w = w - (m * alpha) / (sqrt(v) + epsilon)
//   (source: keras/src/optimizers/{adam,adamw,base_optimizer}.py, Keras 3.15)
//
// The caller increments *iterations after the step. A nonzero *skip leaves everything as it is. Arithmetic in
// fp32, the powers in fp64 by repeated squaring; w, m, v and v_hat have one dtype and are rounded once at the
// store; g may be fp16 or bf16 beside fp32 weights.
// Grid: 1-D grid-stride over packs of 16 bytes of the wider type, 256 threads; the last pack and arrays that
// are not 16-byte aligned go by elements.
// Bytes moved: n * (2 w + 2 m + 2 v + g), plus 2 v_hat with amsgrad; 28 (36) bytes per fp32 element.
// NumPy twin: fastdp.launch.reference.fused_adam
#include "common.cuh"

constexpr int kThreads = 256;

struct FusedAdamArgs {
    void* weights;
    void* momentums;
    void* velocities;
    void* velocity_hats;  // null: no amsgrad
    const void* gradients;
    const float* learning_rate;
    const i64* iterations;
    const float* clip_scale;  // null: 1
    const u32* skip;          // null: never
    i64 n;
    float beta_1, beta_2;
    float one_minus_beta_1, one_minus_beta_2;  // rounded from fp64, as Keras does
    float epsilon;
    float weight_decay;
};

// base^exponent, rounded from fp64.
__device__ __forceinline__ float power(float base, i64 exponent) {
    double result = 1.0;
    double square = base;
    for (i64 left = exponent; left > 0; left /= 2) {
        if (left % 2) result *= square;
        square *= square;
    }
    return static_cast<float>(result);
}

__device__ __forceinline__ float maximum(float a, float b) { return b > a || b != b ? b : a; }  // keeps NaN

template <class W, class G> __device__ __forceinline__ void fused_adam_body(const FusedAdamArgs& args) {
    constexpr int count = elements_of<W>::per_pack;
    if (args.skip && *args.skip) return;
    const i64 t = *args.iterations + 1;
    const float lr = *args.learning_rate;
    const float alpha = lr * sqrtf(1.0f - power(args.beta_2, t)) / (1.0f - power(args.beta_1, t));
    const float clip = args.clip_scale ? *args.clip_scale : 1.0f;
    W* weights = static_cast<W*>(args.weights);
    W* momentums = static_cast<W*>(args.momentums);
    W* velocities = static_cast<W*>(args.velocities);
    W* velocity_hats = static_cast<W*>(args.velocity_hats);
    const G* gradients = static_cast<const G*>(args.gradients);
    const i64 packs = ceil_div(args.n, count);
    for (i64 pack = grid_thread(); pack < packs; pack += grid_threads()) {
        Pack<W, count> w = load_pack<W, count>(weights, pack, args.n);
        Pack<W, count> m = load_pack<W, count>(momentums, pack, args.n);
        Pack<W, count> v = load_pack<W, count>(velocities, pack, args.n);
        const Pack<G, count> g = load_pack<G, count>(gradients, pack, args.n);
        Pack<W, count> v_hat;
        if (velocity_hats) v_hat = load_pack<W, count>(velocity_hats, pack, args.n);
#pragma unroll
        for (int e = 0; e < count; ++e) {
            const float gradient = to_float(g.at[e]) * clip;
            float value = to_float(w.at[e]);
            if (args.weight_decay != 0.0f) value -= value * args.weight_decay * lr;
            float first = to_float(m.at[e]);
            float second = to_float(v.at[e]);
            first += (gradient - first) * args.one_minus_beta_1;
            second += (gradient * gradient - second) * args.one_minus_beta_2;
            m.at[e] = from_float<W>(first);
            v.at[e] = from_float<W>(second);
            if (velocity_hats) {
                second = maximum(to_float(v_hat.at[e]), second);
                v_hat.at[e] = from_float<W>(second);
            }
            w.at[e] = from_float<W>(value - first * alpha / (sqrtf(second) + args.epsilon));
        }
        store_pack<W, count>(weights, pack, args.n, w);
        store_pack<W, count>(momentums, pack, args.n, m);
        store_pack<W, count>(velocities, pack, args.n, v);
        if (velocity_hats) store_pack<W, count>(velocity_hats, pack, args.n, v_hat);
    }
}

FASTDP_KERNEL(fused_adam_f32_f32, FusedAdamArgs, kThreads, fused_adam_body<float, float>(args))
FASTDP_KERNEL(fused_adam_f32_f16, FusedAdamArgs, kThreads, fused_adam_body<float, half_t>(args))
FASTDP_KERNEL(fused_adam_f32_bf16, FusedAdamArgs, kThreads, fused_adam_body<float, bf16_t>(args))
FASTDP_KERNEL(fused_adam_f16_f16, FusedAdamArgs, kThreads, fused_adam_body<half_t, half_t>(args))
FASTDP_KERNEL(fused_adam_bf16_bf16, FusedAdamArgs, kThreads, fused_adam_body<bf16_t, bf16_t>(args))
