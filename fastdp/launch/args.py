"""The arguments of a kernel launch as numbers: structs, grid sizes, element types.

Each struct mirrors the one of the same name in kernels/*.cu, field by field; tests/kernels checks their sizes
against the compiled ones. Pointers are device addresses as ints, 0 for none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p

__all__ = [
    "ITEMSIZE",
    "MAX_RANKS",
    "MAX_SIGNAL_BLOCKS",
    "PACK_NBYTES",
    "PART_NBYTES",
    "SIGNALS_NBYTES",
    "SUFFIX",
    "THREADS",
    "UNROLL",
    "AllReduceArgs",
    "ConcatRowsArgs",
    "Piece",
    "RowCopy",
    "SliceRowsArgs",
    "ceil_div",
    "float_type",
    "share_blocks",
]

PACK_NBYTES = 16  # one access of a thread
PART_NBYTES = 64  # the parts of a reduce-scatter are multiples of this, except the last
THREADS = 256  # per block of all kernels but the all-reduces
UNROLL = 4  # packs in flight per thread
SEGMENT_NBYTES = THREADS * UNROLL * PACK_NBYTES  # bytes of output that a block copies at a time
BLOCKS_PER_SM = 8  # 8 x 256 threads fill an SM of every data-centre GPU since Volta
MAX_COPIES = 52  # arrays in one launch of slice_rows
MAX_PIECES = 120  # runs in one launch of concat_rows
MAX_RANKS = 8
MAX_SIGNAL_BLOCKS = 64

# Keras's names of the element types, and their names in kernel entries.
SUFFIX = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOATS = ("float32", "float16", "bfloat16")


class RowCopy(ctypes.Structure):
    """One array of slice_rows."""

    _fields_ = (
        ("source", c_void_p),
        ("destination", c_void_p),
        ("rows", c_int64),
        ("row_elements", c_int64),
        ("source_rows", c_int64),
        ("first_row", c_int64),
        ("first_block", c_uint32),
        ("blocks", c_uint32),
        ("conversion", c_int32),
        ("vector", c_int32),
        ("scale", c_float),
        ("offset", c_float),
    )


class SliceRowsArgs(ctypes.Structure):
    """The parameter of slice_rows."""

    _fields_ = (
        ("index", c_void_p),
        ("places", c_void_p),
        ("destination_rows", c_int64),
        ("error", c_void_p),
        ("count", c_int32),
        ("copies", RowCopy * MAX_COPIES),
    )


class Piece(ctypes.Structure):
    """One run of bytes of concat_rows."""

    _fields_ = (
        ("source", c_void_p),
        ("destination", c_void_p),
        ("nbytes", c_int64),
        ("first_block", c_uint32),
        ("blocks", c_uint32),
    )


class ConcatRowsArgs(ctypes.Structure):
    """The parameter of concat_rows."""

    _fields_ = (("count", c_int32), ("pieces", Piece * MAX_PIECES))


class Signals(ctypes.Structure):
    """The state of a rank of the peer all-reduces in device memory, zeroed once."""

    _fields_ = (
        ("launches", c_uint64),
        ("finished_blocks", c_uint32),
        ("unused", c_uint32),
        ("arrived", c_uint64 * MAX_RANKS * MAX_SIGNAL_BLOCKS),
    )


SIGNALS_NBYTES = ctypes.sizeof(Signals)


class AllReduceArgs(ctypes.Structure):
    """The parameter of all_reduce_one_shot, all_reduce_two_shot and reduce_scatter."""

    _fields_ = (
        ("inputs", c_void_p * MAX_RANKS),
        ("output", c_void_p),
        ("staging", c_void_p * MAX_RANKS),
        ("signals", c_void_p * MAX_RANKS),
        ("error", c_void_p),
        ("n", c_int64),
        ("staging_half_bytes", c_int64),
        ("scale", c_float),
        ("rank", c_int32),
        ("ranks", c_int32),
        ("spin_limit", c_uint32),
        ("tree", c_int32),
    )


def float_type(dtype: str, argument: str) -> str:
    """Return the dtype if it is a float type; else raise a ValueError that names the argument."""
    if dtype not in FLOATS:
        raise ValueError(f"{argument}={dtype!r}: expected one of {', '.join(FLOATS)}")
    return dtype


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; a >= 0, b > 0."""
    return -(-a // b)


def share_blocks(units: Sequence[int], most: int) -> list[int]:
    """Blocks for each item of a launch: its units of work, scaled down in proportion if their sum exceeds `most`.

    Each item gets at least one block, so the total may exceed `most` by the number of items.
    """
    total = sum(units)
    if total <= most:
        return list(units)
    return [max(1, unit * most // total) for unit in units]
