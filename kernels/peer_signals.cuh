// Barriers between the same block of all ranks, through flags in peer memory.
//
// Each rank owns one Signals in plain device memory that all ranks can write (peer access, or the same card).
// The host zeroes it once, before the first launch, and never touches it again, so that a recorded CUDA graph
// can be replayed: kernels read the launch number from device memory, and the last block to finish increments
// it. All flags only grow. Ranks must make the same sequence of launches with the same grid and block.
//
// A block waits only for the blocks with its index in the other ranks, so the grids of all ranks must be
// resident at the same time. With one GPU per rank this always holds, since no block waits for a later block of
// the same rank. If R ranks share one card, launch/peer_group.py limits each rank's grid to floor(SMs / R), that is one
// block per SM in the worst case. The launches must also reach the card independently: one stream per rank,
// none of them the legacy default stream, and CUDA_DEVICE_MAX_CONNECTIONS not below the number of streams in
// use (its default is 8; CUDA C++ Programming Guide, environment variables).
//
// A wait gives up after spin_limit polls: it sets *error to 1 + the missing rank, and its block writes no
// output. While *error is set, every later launch of that rank returns at once, so that its peers time out too.
// A peer that was only late may still complete the launch that others gave up, so a step is valid only if no
// rank's *error is set. To recover, synchronize all ranks, then zero every Signals and *error.
#pragma once
#include "common.cuh"

constexpr int kMaxRanks = 8;
constexpr int kMaxSignalBlocks = 64;
constexpr u64 kBarriersPerLaunch = 2;  // the maximum over all kernels

struct Signals {
    u64 launches;
    u32 finished_blocks;
    u32 unused;
    u64 arrived[kMaxSignalBlocks][kMaxRanks];  // [block][rank that arrived], written by that rank
};

struct AllReduceArgs {
    const void* inputs[kMaxRanks];  // in rank order; all_reduce_one_shot reads only inputs[rank]
    void* output;                   // may be inputs[rank]
    u8* staging[kMaxRanks];         // in rank order, each 2 * staging_half_bytes, 16-byte aligned
    Signals* signals[kMaxRanks];    // in rank order
    u32* error;
    i64 n;
    i64 staging_half_bytes;
    float scale;
    int rank;
    int ranks;
    u32 spin_limit;
    int tree;  // whether ranks are added in a binary tree instead of in their order
};

// Whether an earlier wait of this rank timed out. The whole block gets one answer, since another block of this
// launch may be setting the flag now.
__device__ __forceinline__ bool gave_up(const AllReduceArgs& args) {
    return __syncthreads_or(load_relaxed_system(args.error) != 0);
}

__device__ __forceinline__ bool wait_for(const u64* flag, u64 target, u32 spin_limit) {
    for (u32 spin = 0; spin < spin_limit; ++spin) {
        if (load_acquire_system(flag) >= target) return true;
        if (spin > 256) __nanosleep(64);
    }
    return false;
}

// Barrier `which` of this launch among the blocks of this index in all ranks; false after a time-out. Writes of
// any thread of those blocks before the barrier are visible to all threads of this block after it.
__device__ __forceinline__ bool rank_barrier(const AllReduceArgs& args, u64 launch, u64 which) {
    const u64 target = launch * kBarriersPerLaunch + which + 1;
    bool timed_out = false;
    __syncthreads();
    for (int peer = threadIdx.x; peer < args.ranks; peer += blockDim.x) {
        store_release_system(&args.signals[peer]->arrived[blockIdx.x][args.rank], target);
        if (!wait_for(&args.signals[args.rank]->arrived[blockIdx.x][peer], target, args.spin_limit)) {
            store_relaxed_system(args.error, 1 + peer);
            timed_out = true;
        }
    }
    return !__syncthreads_or(timed_out);
}

// Increments the launch number once all blocks have read it, for the next launch of the stream.
__device__ __forceinline__ void finish_launch(const AllReduceArgs& args, u64 launch) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    Signals* own = args.signals[args.rank];
    if (add_acquire_release_device(&own->finished_blocks, 1) == gridDim.x - 1) {
        own->finished_blocks = 0;
        own->launches = launch + 1;
    }
}

// The sum of `ranks` numbers in rank order.
__device__ __forceinline__ float sum_in_order(const float (&x)[kMaxRanks], int ranks) {
    float sum = x[0];
#pragma unroll
    for (int rank = 1; rank < kMaxRanks; ++rank) {
        if (rank < ranks) sum += x[rank];
    }
    return sum;
}

// The sum of `ranks` numbers in a binary tree: neighbours first, then neighbouring pairs, and so on.
__device__ __forceinline__ float sum_in_tree(const float (&x)[kMaxRanks], int ranks) {
    float sum[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) sum[rank] = x[rank];
#pragma unroll
    for (int step = 1; step < kMaxRanks; step *= 2) {
#pragma unroll
        for (int rank = 0; rank + step < kMaxRanks; rank += 2 * step) {
            if (rank + step < ranks) sum[rank] += sum[rank + step];
        }
    }
    return sum[0];
}

// The sum of one pack over all ranks, in rank order or in a tree, times scale: the same bits on every rank.
template <class T>
__device__ __forceinline__ Pack<T, elements_of<T>::per_pack> sum_pack(const AllReduceArgs& args,
                                                                      const T* const (&arrays)[kMaxRanks], i64 pack) {
    constexpr int count = elements_of<T>::per_pack;
    Pack<T, count> x[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) {
        if (rank < args.ranks) x[rank] = load_pack<T, count>(arrays[rank], pack, args.n);
    }
    Pack<T, count> y;
#pragma unroll
    for (int e = 0; e < count; ++e) {
        float one[kMaxRanks];
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank) one[rank] = rank < args.ranks ? to_float(x[rank].at[e]) : 0.0f;
        const float sum = args.tree ? sum_in_tree(one, args.ranks) : sum_in_order(one, args.ranks);
        y.at[e] = from_float<T>(sum * args.scale);
    }
    return y;
}
