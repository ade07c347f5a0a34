// slice_rows: copies a device's rows of every array of a batch, in one launch.
//
//   destination[j][to, :] = convert_j(source[j][index ? index[first_row + r] : first_row + r, :])
//   to = places ? places[first_row + r] : r; so rows of several owners' memory take turns in one destination
//   convert: the bytes unchanged, or cast(x * scale + offset) from uint8 to fp32, fp16 or bf16
//
// Without an index the rows are contiguous: launch/rows.py folds first_row into the pointer and all rows into one.
// An index outside [0, source_rows), or a place outside [0, destination_rows), leaves its row unwritten and sets
// *error to 1.
// Grid: 1-D; array j owns blocks [first_block, first_block + blocks), in proportion to its bytes; 256
// threads. Two layouts, chosen by launch/rows.py:
//   vector == 0  segments: a block copies 16 KiB of one row (contiguous arrays, long rows), unaligned ends
//                by element, an unaligned source by word shifts
//   vector  > 0  gather: rows shorter than a segment; thread t copies input vectors of `vector` bytes number
//                t, t + threads, ... of the flat output, and advances row and column without a division
// Pointers may be local, peer or pinned host. Bytes moved: one read and one write of each element, plus
// 8 bytes per row for the index, and for the places. NumPy twin: fastdp.launch.reference.slice_rows
#include "row_copy.cuh"

constexpr int kMaxCopies = 52;  // 52 x 72 bytes + 40 stay below the 4,096 bytes of kernel parameters

enum Conversion { kBytes = 0, kFloat = 1, kHalf = 2, kBfloat16 = 3 };

struct RowCopy {
    const u8* source;
    void* destination;
    i64 rows;
    i64 row_elements;  // bytes if the conversion is kBytes
    i64 source_rows;
    i64 first_row;
    u32 first_block;
    u32 blocks;
    int conversion;
    int vector;
    float scale;
    float offset;
};

struct SliceRowsArgs {
    const i64* index;
    const i64* places;
    i64 destination_rows;
    u32* error;
    int count;
    RowCopy copies[kMaxCopies];
};

struct RowPair {
    i64 source, destination;
    bool valid;
};

// The source row and the destination row number r of a copy, and whether both are in bounds.
__device__ __forceinline__ RowPair row_pair(const SliceRowsArgs& args, const RowCopy& copy, i64 r) {
    if (!args.index) return {r, r, true};
    const i64 row = args.index[copy.first_row + r];
    const bool inside = row >= 0 && row < copy.source_rows;
    if (!args.places) return {row, r, inside};
    const i64 place = args.places[copy.first_row + r];
    return {row, place, inside && place >= 0 && place < args.destination_rows};
}

template <class Convert>
__device__ void copy_segments(const SliceRowsArgs& args, const RowCopy& copy, const Convert& convert) {
    using Out = typename Convert::Out;
    const i64 segment = kSegmentVectors * Convert::vector;
    const i64 per_row = ceil_div(copy.row_elements, segment);
    for (i64 unit = blockIdx.x - copy.first_block; unit < copy.rows * per_row; unit += copy.blocks) {
        const i64 r = unit / per_row;
        const i64 at = (unit - r * per_row) * segment;
        const RowPair row = row_pair(args, copy, r);
        if (!row.valid) {
            store_relaxed_system(args.error, 1);
            continue;
        }
        const i64 left = copy.row_elements - at;
        const u8* begin = copy.source + row.source * copy.row_elements;
        copy_segment(static_cast<Out*>(copy.destination) + row.destination * copy.row_elements + at, begin + at,
                     left < segment ? left : segment, begin, begin + copy.row_elements, convert);
    }
}

struct Position {  // of a vector: its row and its column, in vectors
    i64 row, column;
    __device__ __forceinline__ void advance(const Position& step, i64 per_row) {
        row += step.row;
        column += step.column;
        if (column >= per_row) {
            column -= per_row;
            ++row;
        }
    }
};

template <class Convert, int vector>
__device__ void gather_vectors(const SliceRowsArgs& args, const RowCopy& copy, const Convert& convert) {
    using Out = typename Convert::Out;
    using InPack = Pack<u8, vector>;
    using OutPack = Pack<Out, vector>;
    const i64 per_row = copy.row_elements / vector;
    const i64 threads = static_cast<i64>(copy.blocks) * blockDim.x;
    const i64 thread = static_cast<i64>(blockIdx.x - copy.first_block) * blockDim.x + threadIdx.x;
    Position at{thread / per_row, thread % per_row};
    const Position step{threads / per_row, threads % per_row};
    const auto* source = reinterpret_cast<const typename InPack::word*>(copy.source);
    auto* destination = static_cast<typename OutPack::word*>(copy.destination);
    while (at.row < copy.rows) {
        InPack x[kUnroll];
        i64 to[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const bool live = at.row < copy.rows;
            const RowPair row = live ? row_pair(args, copy, at.row) : RowPair{0, 0, false};
            to[u] = row.valid ? row.destination * per_row + at.column : -1;
            if (row.valid) x[u].bits = source[row.source * per_row + at.column];
            else if (live) store_relaxed_system(args.error, 1);
            at.advance(step, per_row);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (to[u] >= 0) destination[to[u]] = convert(x[u]).bits;
        }
    }
}

template <class T> __device__ __forceinline__ void cast_rows(const SliceRowsArgs& args, const RowCopy& copy) {
    const Cast<T> convert{copy.scale, copy.offset};
    if (copy.vector == 0) copy_segments(args, copy, convert);
    else if (copy.vector == 1) gather_vectors<Cast<T>, 1>(args, copy, convert);
    else gather_vectors<Cast<T>, Cast<T>::vector>(args, copy, convert);
}

__device__ __forceinline__ void copy_rows(const SliceRowsArgs& args, const RowCopy& copy) {
    switch (copy.vector) {
        case 0: return copy_segments(args, copy, CopyBytes{});
        case 1: return gather_vectors<CopyBytes, 1>(args, copy, CopyBytes{});
        case 2: return gather_vectors<CopyBytes, 2>(args, copy, CopyBytes{});
        case 4: return gather_vectors<CopyBytes, 4>(args, copy, CopyBytes{});
        case 8: return gather_vectors<CopyBytes, 8>(args, copy, CopyBytes{});
        default: return gather_vectors<CopyBytes, 16>(args, copy, CopyBytes{});
    }
}

__device__ __forceinline__ void slice_rows_body(const SliceRowsArgs& args) {
    const RowCopy& copy = args.copies[item_of_block(args.copies, args.count)];
    switch (copy.conversion) {
        case kFloat: return cast_rows<float>(args, copy);
        case kHalf: return cast_rows<half_t>(args, copy);
        case kBfloat16: return cast_rows<bf16_t>(args, copy);
        default: return copy_rows(args, copy);
    }
}

FASTDP_KERNEL(slice_rows, SliceRowsArgs, kRowThreads, slice_rows_body(args))
