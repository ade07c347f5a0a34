"""Each kernel of kernels/ as the simulated CUDA runs it: the bytes that it touches, and its NumPy twin."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from simulated_memory import Range, view

from fastdp.launch import args as ka
from fastdp.launch import reference as twins
from fastdp.shard import rank_range

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8}
CONVERTED = {0: np.uint8, 1: np.float32, 2: np.float16, 3: np.uint16}


@dataclass
class Launch:
    """What one launch does."""

    reads: list[Range]
    writes: list[Range]
    run: Callable[[], None]
    # Of the all-reduces: the ranks' signals, this rank, and what all ranks must launch alike.
    ranks: tuple[int, ...] = ()
    rank: int = 0
    signature: object = None
    together: Callable[[list[tuple[int, int]]], None] | None = None


def decode(name: str, params: int, grid: int, block: int) -> Launch:
    """The launch of the kernel `name` whose argument struct lies at the address `params`."""
    for base, (struct, model) in MODELS.items():
        if name == base or name.startswith(f"{base}_"):
            args = struct.from_buffer_copy((ctypes.c_char * ctypes.sizeof(struct)).from_address(params))
            types = [DTYPES[suffix] for suffix in name[len(base) + 1 :].split("_") if suffix]
            if struct is ka.AllReduceArgs:
                return model(args, types[0], (name, grid, block))
            return model(args, *types)
    raise KeyError(f"no model of the kernel {name!r}")


def _scalar(address: int | None, dtype, default):
    return view(address, 1, dtype)[0] if address else default


def _nbytes(n: int, *dtypes) -> list[int]:
    return [n * np.dtype(dtype).itemsize for dtype in dtypes]


def _pieces(*pairs: tuple[int | None, int]) -> list[Range]:
    return [(address, nbytes) for address, nbytes in pairs if address]


def _slice_rows(args: ka.SliceRowsArgs) -> Launch:
    copies = list(args.copies[: args.count])
    reads, writes = [], []
    for copy in copies:
        count = copy.rows * copy.row_elements
        reads.append((copy.source, copy.source_rows * copy.row_elements))
        if args.places:
            reads.append((args.places + 8 * copy.first_row, 8 * copy.rows))
            count = args.destination_rows * copy.row_elements
        writes.append((copy.destination, count * np.dtype(CONVERTED[copy.conversion]).itemsize))
        if args.index:
            reads.append((args.index + 8 * copy.first_row, 8 * copy.rows))
    if args.index:
        writes.append((args.error, 4))

    def run() -> None:
        for copy in copies:
            source = view(copy.source, copy.source_rows * copy.row_elements, np.uint8)
            rows = args.destination_rows if args.places else copy.rows
            destination = view(copy.destination, rows * copy.row_elements, CONVERTED[copy.conversion])
            index = view(args.index, copy.first_row + copy.rows, np.int64) if args.index else None
            outside = twins.slice_rows(
                source.reshape(copy.source_rows, copy.row_elements),
                destination.reshape(rows, copy.row_elements),
                first_row=copy.first_row,
                index=index,
                places=view(args.places, copy.first_row + copy.rows, np.int64) if args.places else None,
                rows=copy.rows,
                scale=copy.scale,
                offset=copy.offset,
            )
            if outside:
                view(args.error, 1, np.uint32)[0] = 1

    return Launch(reads, writes, run)


def _concat_rows(args: ka.ConcatRowsArgs) -> Launch:
    pieces = list(args.pieces[: args.count])

    def run() -> None:
        for piece in pieces:
            view(piece.destination, piece.nbytes, np.uint8)[:] = view(piece.source, piece.nbytes, np.uint8)

    return Launch([(p.source, p.nbytes) for p in pieces], [(p.destination, p.nbytes) for p in pieces], run)


def _all_reduce(args: ka.AllReduceArgs, dtype, launch: tuple) -> Launch:
    (nbytes,) = _nbytes(args.n, dtype)
    own = args.rank
    # What peers read of this rank they read while its own kernel runs. Staging is ordered by the kernel's barriers.
    reads = [(args.inputs[own], nbytes)]
    writes = [(args.output, nbytes), (args.staging[own], 2 * args.staging_half_bytes), (args.signals[own], 16)]

    def together(places: list[tuple[int, int]]) -> None:
        sum_ranks(places, args.n, dtype, args.scale, tree=bool(args.tree))

    signature = (*launch, args.n, args.scale, args.ranks, args.tree, tuple(args.staging), args.staging_half_bytes)
    return Launch(reads, writes, lambda: None, tuple(args.signals[: args.ranks]), own, signature, together)


def _reduce_scatter(args: ka.AllReduceArgs, dtype, launch: tuple) -> Launch:
    nbytes, align = args.n * np.dtype(dtype).itemsize, ka.PART_NBYTES // np.dtype(dtype).itemsize
    whole = _all_reduce(args, dtype, launch)
    first, last = rank_range(args.n, args.rank, args.ranks, align)
    own = (args.output + first * np.dtype(dtype).itemsize, (last - first) * np.dtype(dtype).itemsize)

    def together(places: list[tuple[int, int]]) -> None:
        parts = [view(x, args.n, dtype) for x, _ in places]
        kept = [part.copy() for part in parts]
        for rank, (_, y) in enumerate(places):
            begin, _ = rank_range(args.n, rank, args.ranks, align)
            output = view(y - begin * np.dtype(dtype).itemsize, args.n, dtype)
            twins.reduce_scatter(kept, output, rank, scale=args.scale, tree=bool(args.tree))

    reads = [(args.inputs[args.rank], nbytes)]
    writes = [own, (args.signals[args.rank], 16)]
    return Launch(reads, writes, lambda: None, whole.ranks, args.rank, whole.signature, together)


def sum_ranks(places: list[tuple[int, int]], n: int, dtype, scale: float, *, tree: bool = False) -> None:
    """What an all-reduce kernel writes on every rank, of (input, output) addresses in rank order."""
    total = twins.all_reduce([view(x, n, dtype) for x, _ in places], scale=scale, tree=tree)
    for _, y in places:
        view(y, n, dtype)[:] = total


MODELS = {
    "slice_rows": (ka.SliceRowsArgs, _slice_rows),
    "concat_rows": (ka.ConcatRowsArgs, _concat_rows),
    "all_reduce_one_shot": (ka.AllReduceArgs, _all_reduce),
    "all_reduce_two_shot": (ka.AllReduceArgs, _all_reduce),
    "reduce_scatter": (ka.AllReduceArgs, _reduce_scatter),
}
