// all_reduce_one_shot: every rank reads every rank's input once. For small buckets, where latency dominates.
//
//   output[i] = cast((x_0[i] + x_1[i] + ... + x_{R-1}[i]) * scale)     in fp32, on every rank, in rank order,
//                                                                      or in a binary tree (peer_signals.cuh)
//
//   stage    copy this rank's input to one half of its staging buffer
//   barrier  with the same block of all ranks
//   sum      read all ranks' staging buffers, write the output (which may be the input)
//
// The halves of the staging buffer alternate with the launch number, so no final barrier is needed: a rank
// rewrites a half two launches later, after the barrier of the launch in between, which a peer enters only
// when its previous launch has completed.
// Grid: 1-D, the same on all ranks, grid-stride over packs of 16 bytes, at most 64 blocks; see
// peer_signals.cuh for co-residency, graph replay and time-outs.
// Bytes moved per rank: n * sizeof * (4 local + (R - 1) over the links). fp32, fp16, bf16; R <= 8.
// NumPy twin: fastdp.launch.reference.all_reduce
#include "peer_signals.cuh"

constexpr int kMaxThreads = 512;

template <class T> __device__ __forceinline__ void all_reduce_one_shot_body(const AllReduceArgs& args) {
    constexpr int count = elements_of<T>::per_pack;
    if (gave_up(args)) return;
    const u64 launch = args.signals[args.rank]->launches;
    const i64 half = (launch & 1) ? args.staging_half_bytes : 0;
    const T* staged[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) {
        staged[rank] = reinterpret_cast<const T*>(rank < args.ranks ? args.staging[rank] + half : nullptr);
    }
    const T* input = static_cast<const T*>(args.inputs[args.rank]);
    T* own = reinterpret_cast<T*>(args.staging[args.rank] + half);
    const i64 packs = ceil_div(args.n, count);
    for (i64 pack = grid_thread(); pack < packs; pack += grid_threads()) {
        store_pack<T, count>(own, pack, args.n, load_pack<T, count>(input, pack, args.n));
    }
    if (!rank_barrier(args, launch, 0)) return;
    for (i64 pack = grid_thread(); pack < packs; pack += grid_threads()) {
        store_pack<T, count>(static_cast<T*>(args.output), pack, args.n, sum_pack<T>(args, staged, pack));
    }
    finish_launch(args, launch);
}

FASTDP_KERNEL(all_reduce_one_shot_f32, AllReduceArgs, kMaxThreads, all_reduce_one_shot_body<float>(args))
FASTDP_KERNEL(all_reduce_one_shot_f16, AllReduceArgs, kMaxThreads, all_reduce_one_shot_body<half_t>(args))
FASTDP_KERNEL(all_reduce_one_shot_bf16, AllReduceArgs, kMaxThreads, all_reduce_one_shot_body<bf16_t>(args))
