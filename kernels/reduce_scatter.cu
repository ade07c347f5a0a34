// reduce_scatter: each rank sums its part of all ranks' inputs, which it reads through peer memory.
//
//   output[i] = cast((x_0[i] + x_1[i] + ... + x_{R-1}[i]) * scale)     in fp32, in rank order or in a tree,
//                                                                      for i in the rank's part of [0, n) only
//
//   barrier  all inputs are ready
//   sum      read this rank's part of all ranks' inputs, write the output (which may be the input)
//   barrier  no rank reads an input any more
//
// Part q is elements [q * S, q * S + S) with S = n / R rounded down to whole 64 bytes; the last part extends to
// n. All parts but the last have the same length, as in NCCL's reduce-scatter. No rank writes data that another
// reads, so nothing is staged. A thread's reads lie between the two barriers of its block, and a rank's kernel
// ends when all its blocks have passed them, so later work may overwrite the input.
// Grid: 1-D, the same on all ranks, grid-stride over the packs of a part, at most 64 blocks; see
// peer_signals.cuh for co-residency, graph replay and time-outs. Inputs must be visible to all peers.
// Bytes moved per rank: n * sizeof * ((R - 1) / R over the links + 2 / R local). fp32, fp16, bf16; R <= 8.
// NumPy twin: fastdp.launch.reference.reduce_scatter
#include "peer_signals.cuh"

constexpr int kMaxThreads = 512;
constexpr i64 kPartAlignment = 64;  // bytes

template <class T> __device__ __forceinline__ void reduce_scatter_body(const AllReduceArgs& args) {
    constexpr int count = elements_of<T>::per_pack;
    constexpr i64 align = kPartAlignment / static_cast<i64>(sizeof(T));
    if (gave_up(args)) return;
    const u64 launch = args.signals[args.rank]->launches;
    const T* inputs[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) inputs[rank] = static_cast<const T*>(args.inputs[rank]);
    const i64 part = args.n / args.ranks / align * align;
    const i64 first = part * args.rank;
    const i64 last = args.rank + 1 == args.ranks ? args.n : first + part;
    if (!rank_barrier(args, launch, 0)) return;
    for (i64 pack = first / count + grid_thread(); pack * count < last; pack += grid_threads()) {
        store_pack<T, count>(static_cast<T*>(args.output), pack, last, sum_pack<T>(args, inputs, pack));
    }
    if (!rank_barrier(args, launch, 1)) return;
    finish_launch(args, launch);
}

FASTDP_KERNEL(reduce_scatter_f32, AllReduceArgs, kMaxThreads, reduce_scatter_body<float>(args))
FASTDP_KERNEL(reduce_scatter_f16, AllReduceArgs, kMaxThreads, reduce_scatter_body<half_t>(args))
FASTDP_KERNEL(reduce_scatter_bf16, AllReduceArgs, kMaxThreads, reduce_scatter_body<bf16_t>(args))
