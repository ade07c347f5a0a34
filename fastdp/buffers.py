"""Flat buffers: the parameters, gradients and optimizer slots of a replica in one array per dtype, with views.

Collectives, copies between replicas and comparisons act on the flat buffers; programs see the views.
NumPy has no bfloat16 or float8: such arrays are stored as unsigned integers of the same size, under the
dtype's name. Code that computes with them must check that name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastdp.shard import BUCKET_NBYTES, FIRST_BUCKET_NBYTES, plan_buckets, rank_range

ALIGNMENT = 64


class Allocator(Protocol):
    """A device whose memory holds buffers, and its operations on arrays. `space` names the memory."""

    space: str

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array of zeros in the device's memory, aligned to at least 64 bytes."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of the same shape and dtype, of this or another device, into an array of this one."""

    def to_host(self, array: Any) -> np.ndarray:
        """The array's current values in host memory; may share the array's memory."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Name, shape and dtype name of one array."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Elements `[start, stop)` of the flat buffer of `dtype`, reduced by one collective.

    `arrays` are the indices of the arrays in this span. The bucket is complete when all of them have their values.
    """

    dtype: str
    start: int
    stop: int
    arrays: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of these elements."""
        return (self.stop - self.start) * storage_dtype(self.dtype).itemsize

    def part(self, rank: int, ranks: int) -> Bucket:
        """The part that belongs to one rank between a reduce-scatter and an all-gather; may be empty.

        All parts are equally long, a multiple of 64 bytes. The last rank's part also has the rest.
        """
        align = max(1, ALIGNMENT // storage_dtype(self.dtype).itemsize)
        first, last = rank_range(self.stop - self.start, rank, ranks, align)
        return Bucket(self.dtype, self.start + first, self.start + last)


def storage_dtype(name: str) -> np.dtype:
    """The NumPy dtype that stores the dtype called `name`.

    Raises:
        TypeError: `name` is no dtype.
    """
    # Checked before NumPy looks the name up: once a library imports ml_dtypes, np.dtype("bfloat16") exists too, and
    # is not the type that the collectives and torch expect in the buffers.
    if name == "bfloat16":
        return np.dtype("uint16")
    if name.startswith("float8_"):
        return np.dtype("uint8")
    return np.dtype(name)


class FlatBuffers:
    """Arrays of the given specs, laid out in one contiguous buffer per dtype.

    Args:
        specs: the arrays to lay out, in this order within each dtype.
        device: allocates the memory, one array per dtype.
        lent: arrays that lie in other buffers already, by number: those buffers, and the number there. They stay where
            they are: each run of them is one more buffer, named after dtype and number ("float32+1").
        like: buffers of the same specs, whose layout is taken over, in memory of its own.

    Each array begins at a multiple of 64 bytes; the gaps are zero, so that whole buffers can be
    compared and reduced. `views[i]` has the shape of `specs[i]` and aliases `buffers[names[i]]`; the name is the dtype
    for arrays that are not lent.
    """

    def __init__(
        self,
        specs: Sequence[ArraySpec],
        device: Allocator,
        *,
        lent: Mapping[int, tuple[FlatBuffers, int]] | None = None,
        like: FlatBuffers | None = None,
    ) -> None:
        self.specs = list(specs)
        self._device = device
        self.names = [spec.dtype for spec in self.specs]
        self._spans: list[tuple[int, int]] = [(0, 0)] * len(self.specs)
        self.buffers: dict[str, Any]
        if like is not None:
            self.names, self._spans = like.names, like._spans
            self.buffers = {name: device.zeros(buffer.shape, buffer.dtype) for name, buffer in like.buffers.items()}
        else:
            self.buffers = self._lay_out(lent or {})
        self.views: list[Any] = [
            self.buffers[name][start:stop].reshape(spec.shape)
            for spec, name, (start, stop) in zip(self.specs, self.names, self._spans, strict=True)
        ]

    def _lay_out(self, lent: Mapping[int, tuple[FlatBuffers, int]]) -> dict[str, Any]:
        """Give each array its place; the buffers by name."""
        lengths: dict[str, int] = {}
        for number, spec in enumerate(self.specs):
            if number not in lent:
                start = lengths.get(spec.dtype, 0)
                self._spans[number] = start, start + spec.size
                lengths[spec.dtype] = start + _padded(spec)
        buffers = {dtype: self._device.zeros((n,), storage_dtype(dtype)) for dtype, n in lengths.items()}
        for run in _runs(lent, self.specs):
            name = f"{self.specs[run[0]].dtype}+{len(buffers)}"
            first, last = (lent[number][0]._spans[lent[number][1]][0] for number in (run[0], run[-1]))
            lender, at = lent[run[0]]
            buffers[name] = lender.buffers[lender.names[at]][first : last + _padded(self.specs[run[-1]])]
            for number in run:
                start, stop = lender._spans[lent[number][1]]
                self.names[number], self._spans[number] = name, (start - first, stop - first)
        return buffers

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def span(self, number: int) -> tuple[str, int, int]:
        """Where an array lies: the name of its buffer, and its first and last elements there."""
        return self.names[number], *self._spans[number]

    def copy_from(self, other: FlatBuffers) -> None:
        """Copy the values of `other`, which has the same specs and layout."""
        for name, buffer in self.buffers.items():
            self._device.copy(buffer, other.buffers[name])

    def clear(self) -> None:
        """Set all values to zero."""
        for buffer in self.buffers.values():
            buffer[...] = 0

    def copy_part(self, other: FlatBuffers, part: Bucket) -> None:
        """Copy one span of the values of `other`, which has the same specs."""
        span = slice(part.start, part.stop)
        self._device.copy(self.buffers[part.dtype][span], other.buffers[part.dtype][span])

    def equals(self, other: FlatBuffers) -> bool:
        """Whether every bit is the same. NaNs with the same bits are equal."""
        return all(np.array_equal(self._bits(dtype), other._bits(dtype)) for dtype in self.buffers)

    def on_host(self) -> list[np.ndarray]:
        """The values of all buffers, in host memory; they may share the buffers' memory."""
        return [self._device.to_host(buffer) for buffer in self.buffers.values()]

    def _bits(self, dtype: str) -> np.ndarray:
        """The bits of one buffer, on the host, in words as long as its length allows."""
        array = self._device.to_host(self.buffers[dtype])
        return array.view(np.uint64 if array.nbytes % 8 == 0 else np.uint8)

    def buckets(self, first: int = FIRST_BUCKET_NBYTES, cap: int = BUCKET_NBYTES) -> list[Bucket]:
        """The flat buffers split into buckets at array borders, in the order in which backward completes them.

        Backward reaches the last arrays first, so the first, small bucket of a dtype has its last arrays. Arrays that
        are lent are in no bucket: nobody reduces them.
        """
        plan = []
        for dtype, buffer in self.buffers.items():
            numbers = [i for i, spec in enumerate(self.specs) if self.names[i] == dtype == spec.dtype]
            if not numbers:
                continue
            starts = [self._spans[number][0] for number in numbers] + [buffer.size]
            sizes = [(b - a) * buffer.itemsize for a, b in itertools.pairwise(starts)]
            for begin, end in plan_buckets(sizes[::-1], first, cap):
                low, high = len(sizes) - end, len(sizes) - begin
                plan.append(Bucket(dtype, starts[low], starts[high], tuple(numbers[low:high])))
        return sorted(plan, key=lambda bucket: -bucket.arrays[0])


def _padded(spec: ArraySpec) -> int:
    """The elements from the begin of an array to that of the next one."""
    return spec.size + -spec.size % max(1, ALIGNMENT // storage_dtype(spec.dtype).itemsize)


def _runs(lent: Mapping[int, tuple[FlatBuffers, int]], specs: Sequence[ArraySpec]) -> list[list[int]]:
    """The numbers of arrays that are lent, in runs that lie behind each other in one buffer."""

    def place(number: int) -> tuple[int, str, int]:
        lender, at = lent[number]
        return id(lender), lender.names[at], lender._spans[at][0]

    runs: list[list[int]] = []
    end = None
    for number in sorted(lent, key=place):
        lender, name, start = place(number)
        if (lender, name, start) == end:
            runs[-1].append(number)
        else:
            runs.append([number])
        end = lender, name, start + _padded(specs[number])
    return runs


class _Block:
    """What homes know of memory that they share: the number of its updates, and whether the last one is in doubt."""

    updates = 0
    doubtful = False


class Home:
    """The memory of a program's first replica. Several engines may run on one home.

    Args:
        variables: specs of parameters and buffers.
        device: the first device, or host memory in its place.
        lent: variables that lie in other homes already, by number: those homes, and the number there. They stay there.
    """

    def __init__(
        self, variables: Sequence[ArraySpec], device: Allocator, lent: Mapping[int, tuple[Home, int]] | None = None
    ) -> None:
        lent = lent or {}
        flats = {number: (home.variables, at) for number, (home, at) in lent.items()}
        self.variables: FlatBuffers = FlatBuffers(variables, device, lent=flats)
        self.device: Any = device
        self._blocks = dict.fromkeys(self.variables.buffers, _Block())
        for number, (home, at) in lent.items():
            self._blocks[self.variables.names[number]] = home._blocks[home.variables.names[at]]

    @property
    def generation(self) -> int:
        """Counts the updates of this memory. An engine that did not make the last update refreshes its replicas."""
        return sum([block.updates for block in self._blocks.values()])

    def advance(self) -> None:
        """Count an update, so that all engines on this memory notice."""
        for block in {*self._blocks.values()}:
            block.updates += 1

    @property
    def doubtful(self) -> bool:
        """Whether the last update may have used sums of a collective that was given up, and was not taken back."""
        return any(block.doubtful for block in self._blocks.values())

    @doubtful.setter
    def doubtful(self, value: bool) -> None:
        for block in self._blocks.values():
            block.doubtful = value


@dataclass(slots=True)
class Memory:
    """The flat buffers of one replica.

    `ranks` is the number of replicas that each update their part of the variables; 1 if one updates all of them.
    `parts` are then the slots of this replica's part, which the program makes.
    """

    variables: FlatBuffers
    slots: FlatBuffers
    gradients: FlatBuffers
    ranks: int = 1
    parts: FlatBuffers | None = None
