"""Flat buffers: the parameters, gradients and optimizer slots of a replica in one array per dtype, with views.

Collectives, copies between replicas and comparisons act on the flat buffers; programs see the views.
NumPy has no bfloat16 or float8: such arrays are stored as unsigned integers of the same size, under the
dtype's name. Code that computes with them must check that name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastdp.shard import BUCKET_NBYTES, FIRST_BUCKET_NBYTES, plan_buckets, rank_range

ALIGNMENT = 64


class Allocator(Protocol):
    """A device whose memory holds buffers, and its operations on arrays."""

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

    Each array begins at a multiple of 64 bytes; the gaps are zero, so that whole buffers can be
    compared and reduced. `views[i]` has the shape of `specs[i]` and aliases `buffers[specs[i].dtype]`.
    """

    def __init__(self, specs: Sequence[ArraySpec], device: Allocator) -> None:
        self.specs = list(specs)
        self._device = device
        self._spans: list[tuple[int, int]] = []
        lengths: dict[str, int] = {}
        for spec in self.specs:
            step = max(1, ALIGNMENT // storage_dtype(spec.dtype).itemsize)
            start = lengths.get(spec.dtype, 0)
            self._spans.append((start, start + spec.size))
            lengths[spec.dtype] = start + spec.size + -spec.size % step
        self.buffers = {dtype: device.zeros((n,), storage_dtype(dtype)) for dtype, n in lengths.items()}
        self.views: list[Any] = [
            self.buffers[spec.dtype][start:stop].reshape(spec.shape)
            for spec, (start, stop) in zip(self.specs, self._spans, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def copy_from(self, other: FlatBuffers) -> None:
        """Copy the values of `other`, which has the same specs."""
        for dtype, buffer in self.buffers.items():
            self._device.copy(buffer, other.buffers[dtype])

    def copy_part(self, other: FlatBuffers, part: Bucket) -> None:
        """Copy one span of the values of `other`, which has the same specs."""
        span = slice(part.start, part.stop)
        self._device.copy(self.buffers[part.dtype][span], other.buffers[part.dtype][span])

    def equals(self, other: FlatBuffers) -> bool:
        """Whether every bit is the same. NaNs with the same bits are equal."""
        return all(np.array_equal(self._bits(dtype), other._bits(dtype)) for dtype in self.buffers)

    def _bits(self, dtype: str) -> np.ndarray:
        """The bits of one buffer, on the host, in words as long as its length allows."""
        array = self._device.to_host(self.buffers[dtype])
        return array.view(np.uint64 if array.nbytes % 8 == 0 else np.uint8)

    def buckets(self, first: int = FIRST_BUCKET_NBYTES, cap: int = BUCKET_NBYTES) -> list[Bucket]:
        """The flat buffers split into buckets at array borders, in the order in which backward completes them.

        Backward reaches the last arrays first, so the first, small bucket of a dtype has its last arrays.
        """
        plan = []
        for dtype, buffer in self.buffers.items():
            numbers = [number for number, spec in enumerate(self.specs) if spec.dtype == dtype]
            starts = [self._spans[number][0] for number in numbers] + [buffer.size]
            sizes = [(b - a) * buffer.itemsize for a, b in itertools.pairwise(starts)]
            for begin, end in plan_buckets(sizes[::-1], first, cap):
                low, high = len(sizes) - end, len(sizes) - begin
                plan.append(Bucket(dtype, starts[low], starts[high], tuple(numbers[low:high])))
        return sorted(plan, key=lambda bucket: -bucket.arrays[0])


class Home:
    """The memory of a program's first replica. Several engines may run on one home.

    Args:
        variables: specs of parameters and buffers.
        device: the first device, or host memory in its place.

    `generation` counts the updates. An engine that did not make the last update refreshes its replicas. `doubtful`:
    the last update may have used sums of a collective that was given up, and nobody has taken it back.
    """

    def __init__(self, variables: Sequence[ArraySpec], device: Allocator) -> None:
        self.variables = FlatBuffers(variables, device)
        self.device: Any = device
        self.generation = 0
        self.doubtful = False


@dataclass(slots=True)
class Memory:
    """The flat buffers of one replica."""

    variables: FlatBuffers
    slots: FlatBuffers
    gradients: FlatBuffers
