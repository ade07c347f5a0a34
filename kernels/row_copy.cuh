// Row copies shared by slice_rows and concat_rows: segments with unaligned ends, and flat gathers of rows.
//
// A conversion turns one vector of input elements into one vector of output elements. The output vector
// always has 16 bytes; the input vector has 16 for CopyBytes, 4 for Cast<float>, 8 for Cast<half_t> and Cast<bf16_t>.
#pragma once
#include "common.cuh"

constexpr int kRowThreads = 256;
constexpr int kUnroll = 4;                             // independent 16-byte loads in flight per thread
constexpr i64 kSegmentVectors = kRowThreads * kUnroll;  // a block copies 16 KiB of output per turn

struct CopyBytes {
    using In = u8;
    using Out = u8;
    static constexpr int vector = 16;
    __device__ __forceinline__ u8 scalar(u8 x) const { return x; }
    template <int count> __device__ __forceinline__ Pack<u8, count> operator()(const Pack<u8, count>& x) const {
        return x;
    }
};

template <class T> struct Cast {  // y = cast(x * scale + offset)
    using In = u8;
    using Out = T;
    static constexpr int vector = elements_of<T>::per_pack;
    float scale, offset;
    __device__ __forceinline__ T scalar(u8 x) const { return from_float<T>(to_float(x) * scale + offset); }
    template <int count> __device__ __forceinline__ Pack<T, count> operator()(const Pack<u8, count>& x) const {
        Pack<T, count> y;
#pragma unroll
        for (int e = 0; e < count; ++e) y.at[e] = scalar(x.at[e]);
        return y;
    }
};

// Loads nbytes from any address p by aligned 4-byte words and a shift; never reads outside [begin, end).
template <int nbytes>
__device__ __forceinline__ Pack<u8, nbytes> load_unaligned(const u8* p, const u8* begin, const u8* end) {
    union { Pack<u8, nbytes> pack; u32 words[nbytes / 4]; } x;
    const u32 lead = misalignment(p, 4);
    const bool inside = p - begin >= static_cast<i64>(lead) && end - p >= nbytes + 4 - static_cast<i64>(lead);
    if (!inside) {
#pragma unroll
        for (int e = 0; e < nbytes; ++e) x.pack.at[e] = p[e];
        return x.pack;
    }
    const u32* words = reinterpret_cast<const u32*>(p - lead);
    u32 low = words[0];
#pragma unroll
    for (int w = 0; w < nbytes / 4; ++w) {
        const u32 high = words[w + 1];
        x.words[w] = __funnelshift_r(low, high, lead * 8);
        low = high;
    }
    return x.pack;
}

// One block converts n elements. It reads only in [begin, end); `out` is aligned to its element.
template <class Conversion>
__device__ __forceinline__ void copy_segment(typename Conversion::Out* out, const u8* in, i64 n, const u8* begin,
                                             const u8* end, const Conversion& convert) {
    using Out = typename Conversion::Out;
    constexpr int vector = Conversion::vector;
    const i64 to_boundary = (16 - misalignment(out, 16)) % 16 / sizeof(Out);
    const i64 head = to_boundary < n ? to_boundary : n;
    const i64 vectors = (n - head) / vector;
    const i64 tail = head + vectors * vector;
    for (i64 i = threadIdx.x; i < head + n - tail; i += blockDim.x) {
        const i64 e = i < head ? i : tail + i - head;
        out[e] = convert.scalar(in[e]);
    }
    const u8* body = in + head;
    uint4* destination = reinterpret_cast<uint4*>(out + head);
    if (misalignment(body, vector) != 0) {
        for (i64 v = threadIdx.x; v < vectors; v += blockDim.x) {
            destination[v] = convert(load_unaligned<vector>(body + v * vector, begin, end)).bits;
        }
        return;
    }
    using InPack = Pack<u8, vector>;
    const typename InPack::word* source = reinterpret_cast<const typename InPack::word*>(body);
    for (i64 first = threadIdx.x; first < vectors; first += blockDim.x * kUnroll) {
        InPack x[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const i64 v = first + static_cast<i64>(u) * blockDim.x;
            if (v < vectors) x[u].bits = source[v];
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const i64 v = first + static_cast<i64>(u) * blockDim.x;
            if (v < vectors) destination[v] = convert(x[u]).bits;
        }
    }
}

// The last item whose first block is not after this block; items are sorted by first_block.
template <class Item> __device__ __forceinline__ int item_of_block(const Item* items, int count) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (items[middle].first_block <= blockIdx.x) low = middle;
        else high = middle;
    }
    return low;
}
