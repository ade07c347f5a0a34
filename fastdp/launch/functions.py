"""One typed function per kernel: it checks arguments, packs them and computes the grid.

The functions take device addresses as ints (0 for none), sizes in elements, element types by Keras's names and a
stream handle. They enqueue and return. They need neither CuPy nor a GPU; a Launcher makes the launches. The caller
owns all memory and keeps it alive until the stream has run the launch. Unless stated otherwise, pointers need only the
alignment of their elements; full speed needs 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from fastdp.launch import args as ka
from fastdp.launch.loader import BoundLaunches, Kernels
from fastdp.launch.peer_group import PeerGroup, all_reduce_launch, reduce_scatter_launch
from fastdp.launch.rows import RowPiece, RowSlice, concat_rows_launches, slice_rows_launches

AnyKernels: TypeAlias = Kernels | BoundLaunches

__all__ = [
    "all_reduce_one_shot",
    "all_reduce_two_shot",
    "concat_rows",
    "reduce_scatter",
    "slice_rows",
]


def slice_rows(
    kernels: AnyKernels,
    slices: Sequence[RowSlice],
    *,
    index: int = 0,
    places: int = 0,
    destination_rows: int = 0,
    error: int = 0,
    stream: int,
) -> None:
    """Copy a device's rows of every array of a batch, in one launch (for up to 52 arrays).

    Args:
        kernels: the kernels of the device that runs the copy.
        slices: the arrays; empty ones are skipped.
        index: address of int64 row numbers for a shuffled gather, at least first_row + rows of them.
        places: address of as many int64 rows of the destination, where the rows of the index go; 0: in order. No row of
            a destination may be named twice.
        destination_rows: with places, the rows of each destination.
        error: address of a uint32 that becomes 1 if a row number or a place is out of range (that row is left
            unchanged). Needed with an index, and zeroed by the caller.
        stream: the stream of the copy.

    Raises:
        ValueError: see fastdp.launch.rows.slice_rows_launches.
    """
    where = {"index": index, "places": places, "destination_rows": destination_rows, "error": error}
    for grid, args in slice_rows_launches(slices, **where, sm_count=kernels.sm_count):
        kernels.launch("slice_rows", "slice_rows", grid, args, stream)


def concat_rows(kernels: AnyKernels, pieces: Sequence[RowPiece], *, stream: int) -> None:
    """Copy replicas' rows of every output to their places in the merged buffers, 120 pieces per launch.

    Raises:
        ValueError: see fastdp.launch.rows.concat_rows_launches.
    """
    for grid, args in concat_rows_launches(pieces, sm_count=kernels.sm_count):
        kernels.launch("concat_rows", "concat_rows", grid, args, stream)


def all_reduce_one_shot(
    kernels: AnyKernels,
    group: PeerGroup,
    *,
    x: int,
    y: int,
    n: int,
    dtype: str,
    scale: float = 1.0,
    stream: int,
) -> None:
    """Sum x over all ranks, times scale, into y on each rank. Every rank reads all inputs. For small buckets.

    All ranks call it in the same order with the same n, dtype and scale. y may be x; neither needs to be
    visible to peers. Half of the staging buffer must hold n elements. The sum is in fp32 and in rank order, so all
    ranks get the same bits.

    Raises:
        ValueError: an element type other than the three float types, or a staging buffer that is too small.
    """
    suffix = ka.SUFFIX[ka.float_type(dtype, "dtype")]
    inputs = [x if rank == group.rank else 0 for rank in range(len(group.signals))]
    grid, args = all_reduce_launch(group, inputs, y, n=n, staged_n=n, dtype=dtype, scale=scale)
    if n:
        file = "all_reduce_one_shot"
        kernels.launch(file, f"{file}_{suffix}", grid, args, stream, group.threads)


def all_reduce_two_shot(
    kernels: AnyKernels,
    group: PeerGroup,
    *,
    inputs: Sequence[int],
    y: int,
    n: int,
    dtype: str,
    scale: float = 1.0,
    stream: int,
) -> None:
    """As all_reduce_one_shot, by a reduce-scatter and an all-gather through peer memory. For larger buckets.

    Args that differ:
        inputs: every rank's input, in rank order, each visible to all peers. y may be inputs[rank].
    Half of the staging buffer must hold one rank's slice: n elements / ranks, rounded up to whole 16-byte packs.

    Raises:
        ValueError: as all_reduce_one_shot, or not one input per rank.
    """
    if len(inputs) != len(group.signals):
        raise ValueError(f"{len(inputs)} inputs for {len(group.signals)} ranks: expected one for each")
    suffix = ka.SUFFIX[ka.float_type(dtype, "dtype")]
    per_pack = ka.PACK_NBYTES // ka.ITEMSIZE[dtype]
    slice_n = ka.ceil_div(ka.ceil_div(n, per_pack), len(inputs)) * per_pack
    grid, args = all_reduce_launch(group, inputs, y, n=n, staged_n=slice_n, dtype=dtype, scale=scale)
    if n:
        file = "all_reduce_two_shot"
        kernels.launch(file, f"{file}_{suffix}", grid, args, stream, group.threads)


def reduce_scatter(
    kernels: AnyKernels,
    group: PeerGroup,
    *,
    inputs: Sequence[int],
    y: int,
    n: int,
    dtype: str,
    scale: float = 1.0,
    stream: int,
) -> None:
    """Sum all ranks' inputs, times scale, into this rank's part of y. The rest of y is left unchanged.

    Args that differ from all_reduce_two_shot:
        y: address of the first of n elements. Only the rank's part is written: `fastdp.shard.rank_range` in multiples
            of 64 bytes. y may be inputs[rank].
    Nothing is staged. The sum is in fp32 and in rank order, with the same bits as the all-reduces.

    Raises:
        ValueError: an element type other than the three float types, or not one input per rank.
    """
    if len(inputs) != len(group.signals):
        raise ValueError(f"{len(inputs)} inputs for {len(group.signals)} ranks: expected one for each")
    suffix = ka.SUFFIX[ka.float_type(dtype, "dtype")]
    grid, args = reduce_scatter_launch(group, inputs, y, n=n, dtype=dtype, scale=scale)
    if n:
        kernels.launch("reduce_scatter", f"reduce_scatter_{suffix}", grid, args, stream, group.threads)
