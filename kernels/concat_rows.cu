// concat_rows: copies every replica's rows of every output to their place in the merged buffer, in one launch.
//
//   destination[j][destination_row[j] + r, :] = source[j][r, :]      for each piece j and row r < rows[j]
//
// The rows of a piece are contiguous on both sides, so a piece is one run of bytes; launch/rows.py folds
// destination_row into the pointer. Unequal row counts are runs of different length.
// Grid: 1-D; piece j owns blocks [first_block, first_block + blocks), in proportion to its bytes; 256
// threads; a block copies segments of 16 KiB, 4 independent 16-byte loads per thread. The ends of an
// unaligned destination are copied by bytes, an unaligned source by word shifts.
// Pointers may be local, peer or pinned host. Bytes moved: 2 x sum of the pieces (one read, one write).
// NumPy twin: fastdp.launch.reference.concat_rows
#include "row_copy.cuh"

constexpr int kMaxPieces = 120;  // 120 x 32 bytes + 8 stay below the 4,096 bytes of kernel parameters

struct Piece {
    const u8* source;
    u8* destination;
    i64 nbytes;
    u32 first_block;
    u32 blocks;
};

struct ConcatRowsArgs {
    int count;
    Piece pieces[kMaxPieces];
};

__device__ __forceinline__ void concat_piece(const Piece& piece) {
    const i64 segment = kSegmentVectors * 16;
    const i64 step = static_cast<i64>(piece.blocks) * segment;
    for (i64 at = static_cast<i64>(blockIdx.x - piece.first_block) * segment; at < piece.nbytes; at += step) {
        const i64 left = piece.nbytes - at;
        copy_segment(piece.destination + at, piece.source + at, left < segment ? left : segment, piece.source,
                     piece.source + piece.nbytes, CopyBytes{});
    }
}

FASTDP_KERNEL(concat_rows, ConcatRowsArgs, kRowThreads,
              concat_piece(args.pieces[item_of_block(args.pieces, args.count)]))
