"""Computes the launches of slice_rows and concat_rows: runs of bytes, vector widths, blocks. Integers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastdp.launch import args as ka

__all__ = ["RowPiece", "RowSlice", "concat_rows_launches", "slice_rows_launches"]

_CONVERSION = {None: 0, "float32": 1, "float16": 2, "bfloat16": 3}
# Misaligned rows of at least this length are copied by one block each, as shifted words instead of elements.
_LONG_ROW_ELEMENTS = 1024

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowSlice:
    """One array of a scatter.

    Attributes:
        source, destination: device addresses, local, peer or pinned host. Row 0 of the result goes to `destination`,
            which must be aligned to its element if `cast` is given.
        rows: how many rows the destination gets from this source.
        row_elements: elements per row if `cast` is given, else bytes per row.
        source_rows: rows of the source array.
        first_row: the first row of the source, or the first entry of the index (and of the places) if there is one.
        cast: "float32", "float16" or "bfloat16" for a uint8 source, with the result x * scale + offset.
            None copies bytes.
    """

    source: int
    destination: int
    rows: int
    row_elements: int
    source_rows: int
    first_row: int = 0
    cast: str | None = None
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class RowPiece:
    """One replica's rows of one output.

    Attributes:
        source: device address of the replica's row 0.
        destination: device address of row 0 of the merged buffer, local, peer or pinned host.
        rows: the number of rows.
        row_nbytes: bytes per row.
        destination_row: the row of the merged buffer where the replica's row 0 goes.
    """

    source: int
    destination: int
    rows: int
    row_nbytes: int
    destination_row: int


def slice_rows_launches(
    slices: Sequence[RowSlice],
    *,
    index: int,
    error: int,
    sm_count: int,
    places: int = 0,
    destination_rows: int = 0,
) -> Iterable[tuple[int, ka.SliceRowsArgs]]:
    """The (grid, argument) of each launch: one for up to 52 arrays that have something to copy.

    Raises:
        ValueError: rows outside the source, an index without an error flag, places without an index, an unknown cast,
            or a destination that is not aligned to its element.
    """
    if places and not index:
        raise ValueError("places with index=0: expected the address of an index, whose rows go to these places")
    if index and not error:
        raise ValueError("error=0 with an index: expected the address of a uint32 that takes out-of-range rows")
    for item in slices:
        _check_slice(item, bool(index))
    for group in _groups([s for s in slices if s.rows and s.row_elements], ka.MAX_COPIES):
        copies = [_row_copy(item, bool(index)) for item in group]
        units = [_units(copy) for copy in copies]
        blocks = ka.share_blocks(units, sm_count * ka.BLOCKS_PER_SM)
        args = ka.SliceRowsArgs(
            index=index, places=places, destination_rows=destination_rows, error=error, count=len(copies)
        )
        for i, copy in enumerate(copies):
            copy.first_block, copy.blocks = sum(blocks[:i]), blocks[i]
            args.copies[i] = copy
        yield sum(blocks), args


def concat_rows_launches(pieces: Sequence[RowPiece], *, sm_count: int) -> Iterable[tuple[int, ka.ConcatRowsArgs]]:
    """The (grid, argument) of each launch: one for up to 120 pieces that have rows.

    Raises:
        ValueError: a negative count or place.
    """
    for piece in pieces:
        if min(piece.rows, piece.row_nbytes, piece.destination_row) < 0:
            raise ValueError(f"{piece}: expected rows, row_nbytes and destination_row >= 0")
    for group in _groups([p for p in pieces if p.rows and p.row_nbytes], ka.MAX_PIECES):
        units = [ka.ceil_div(p.rows * p.row_nbytes, ka.SEGMENT_NBYTES) for p in group]
        blocks = ka.share_blocks(units, sm_count * ka.BLOCKS_PER_SM)
        args = ka.ConcatRowsArgs(count=len(group))
        for i, p in enumerate(group):
            place = p.destination + p.destination_row * p.row_nbytes
            args.pieces[i] = ka.Piece(p.source, place, p.rows * p.row_nbytes, sum(blocks[:i]), blocks[i])
        yield sum(blocks), args


def _groups(items: Sequence[Item], most: int) -> Iterable[Sequence[Item]]:
    return (items[i : i + most] for i in range(0, len(items), most))


def _check_slice(item: RowSlice, indexed: bool) -> None:
    if item.cast not in _CONVERSION:
        raise ValueError(f"cast={item.cast!r}: expected None, 'float32', 'float16' or 'bfloat16'")
    if min(item.rows, item.row_elements, item.first_row, item.source_rows) < 0:
        raise ValueError(f"{item}: expected rows, row_elements, first_row and source_rows >= 0")
    if not indexed and item.first_row + item.rows > item.source_rows:
        raise ValueError(
            f"rows {item.first_row} to {item.first_row + item.rows} of an array of {item.source_rows} rows: "
            "expected first_row + rows <= source_rows"
        )
    if item.cast and item.destination % ka.ITEMSIZE[item.cast]:
        raise ValueError(
            f"destination={item.destination:#x} with cast={item.cast!r}: expected an address aligned to "
            f"{ka.ITEMSIZE[item.cast]} bytes"
        )


def _row_copy(item: RowSlice, indexed: bool) -> ka.RowCopy:
    """The descriptor of one array. Without an index all rows are merged into one."""
    copy = ka.RowCopy(
        source=item.source,
        destination=item.destination,
        rows=item.rows,
        row_elements=item.row_elements,
        source_rows=item.source_rows,
        first_row=item.first_row,
        conversion=_CONVERSION[item.cast],
        scale=item.scale,
        offset=item.offset,
    )
    if indexed:
        copy.vector = _gather_vector(item)
    else:
        copy.source = item.source + item.first_row * item.row_elements
        copy.rows, copy.row_elements = 1, item.rows * item.row_elements
        copy.source_rows, copy.first_row = 1, 0
    return copy


def _gather_vector(item: RowSlice) -> int:
    """Input bytes per access of a gather, or 0 to copy each row by a whole block."""
    if item.cast:
        widest = ka.PACK_NBYTES // ka.ITEMSIZE[item.cast]
        aligned = item.destination % ka.PACK_NBYTES == 0 and (item.source | item.row_elements) % widest == 0
        vector = widest if aligned else 1
    else:
        addresses = item.source | item.destination | item.row_elements | ka.PACK_NBYTES
        widest = ka.PACK_NBYTES
        vector = addresses & -addresses  # the largest power of two that divides all
    return 0 if vector * 4 < widest and item.row_elements >= _LONG_ROW_ELEMENTS else vector


def _units(copy: ka.RowCopy) -> int:
    """The array's size in units of work; a block does one unit per turn."""
    itemsize = {0: 1, 1: 4, 2: 2, 3: 2}[copy.conversion]
    if copy.vector:
        return ka.ceil_div(copy.rows * copy.row_elements, copy.vector * ka.THREADS * ka.UNROLL)
    return int(copy.rows * ka.ceil_div(copy.row_elements * itemsize, ka.SEGMENT_NBYTES))
