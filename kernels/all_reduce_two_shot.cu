// all_reduce_two_shot: reduce-scatter, then all-gather, through peer memory. For larger buckets.
//
//   output[i] = cast((x_0[i] + x_1[i] + ... + x_{R-1}[i]) * scale)     in fp32, on every rank, in rank order,
//                                                                      or in a binary tree (peer_signals.cuh)
//
//   barrier         all inputs are ready
//   reduce-scatter  rank r sums slice r of all ranks' inputs into one half of its staging buffer
//   barrier         all slices are summed, and no rank reads an input any more
//   all-gather      read slice q from rank q's staging buffer, write the output (which may be the input)
//
// Slice q is packs [q * S, q * S + S) with S = ceil(packs / R); the last slices may be short or empty. A
// thread reads only data written by the threads with its index in the other ranks, so two barriers between
// blocks of the same index suffice. The staging halves alternate as in all_reduce_one_shot.
// Grid: 1-D, the same on all ranks, grid-stride over the packs of a slice, at most 64 blocks; see
// peer_signals.cuh for co-residency, graph replay and time-outs. Inputs must be visible to all peers.
// Bytes moved per rank: n * sizeof * ((2 R - 2) / R over the links + (2 + R) / R local). fp32, fp16, bf16;
// R <= 8. NumPy twin: fastdp.launch.reference.all_reduce
#include "peer_signals.cuh"

constexpr int kMaxThreads = 512;

template <class T> __device__ __forceinline__ void all_reduce_two_shot_body(const AllReduceArgs& args) {
    constexpr int count = elements_of<T>::per_pack;
    if (gave_up(args)) return;
    const u64 launch = args.signals[args.rank]->launches;
    const i64 half = (launch & 1) ? args.staging_half_bytes : 0;
    const T* inputs[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) inputs[rank] = static_cast<const T*>(args.inputs[rank]);
    T* own = reinterpret_cast<T*>(args.staging[args.rank] + half);
    T* output = static_cast<T*>(args.output);
    const i64 packs = ceil_div(args.n, count);
    const i64 slice = ceil_div(packs, args.ranks);
    const i64 own_slice = slice * args.rank;
    if (!rank_barrier(args, launch, 0)) return;
    for (i64 pack = grid_thread(); pack < slice && own_slice + pack < packs; pack += grid_threads()) {
        store_pack<T, count>(own, pack, slice * count, sum_pack<T>(args, inputs, own_slice + pack));
    }
    if (!rank_barrier(args, launch, 1)) return;
    for (int turn = 0; turn < args.ranks; ++turn) {
        const int peer = (args.rank + turn) % args.ranks;  // each rank starts at another peer, to spread the links
        const T* summed = reinterpret_cast<const T*>(args.staging[peer] + half);
        const i64 first = slice * peer;
        for (i64 pack = grid_thread(); pack < slice && first + pack < packs; pack += grid_threads()) {
            store_pack<T, count>(output, first + pack, args.n, load_pack<T, count>(summed, pack, slice * count));
        }
    }
    finish_launch(args, launch);
}

FASTDP_KERNEL(all_reduce_two_shot_f32, AllReduceArgs, kMaxThreads, all_reduce_two_shot_body<float>(args))
FASTDP_KERNEL(all_reduce_two_shot_f16, AllReduceArgs, kMaxThreads, all_reduce_two_shot_body<half_t>(args))
FASTDP_KERNEL(all_reduce_two_shot_bf16, AllReduceArgs, kMaxThreads, all_reduce_two_shot_body<bf16_t>(args))
