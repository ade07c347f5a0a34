"""Parameters, gradients and slots of a replica as a few flat buffers, and views back.

Collectives, copies between replicas and comparisons act on the flat buffers; programs see the views.
NumPy has no bfloat16 or float8: such arrays are kept as unsigned integers of the same size under their
own name, and whoever computes with them knows the name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastdp.shard import BUCKET_NBYTES, FIRST_BUCKET_NBYTES, plan_buckets

ALIGNMENT = 64
Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]


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
    """Elements `[start, stop)` of the flat buffer of `dtype`, reduced by one collective."""

    dtype: str
    start: int
    stop: int


def storage_dtype(name: str) -> np.dtype:
    """The NumPy dtype that stores the dtype called `name`.

    Raises:
        TypeError: `name` is no dtype.
    """
    # By name, before NumPy is asked: once a library imports ml_dtypes, np.dtype("bfloat16") exists too, and
    # is not what the collectives and torch expect to find in the buffers.
    if name == "bfloat16":
        return np.dtype("uint16")
    if name.startswith("float8_"):
        return np.dtype("uint8")
    return np.dtype(name)


class FlatBuffers:
    """Arrays of the given specs, laid out in one contiguous buffer per dtype.

    Args:
        specs: what to lay out, in this order within each dtype.
        allocate: `device.empty`; called once per dtype.

    Each array begins at a multiple of 64 bytes; the gaps are zero, so that whole buffers can be
    compared and reduced. `views[i]` has the shape of `specs[i]` and aliases `buffers[specs[i].dtype]`.
    """

    def __init__(self, specs: Sequence[ArraySpec], allocate: Allocate) -> None:
        self.specs = list(specs)
        self._spans: list[tuple[int, int]] = []
        lengths: dict[str, int] = {}
        for spec in self.specs:
            step = max(1, ALIGNMENT // storage_dtype(spec.dtype).itemsize)
            start = lengths.get(spec.dtype, 0)
            self._spans.append((start, start + spec.size))
            lengths[spec.dtype] = start + spec.size + -spec.size % step
        self.buffers = {dtype: allocate((n,), storage_dtype(dtype)) for dtype, n in lengths.items()}
        for buffer in self.buffers.values():
            buffer[...] = 0
        self.views = [
            self.buffers[spec.dtype][start:stop].reshape(spec.shape)
            for spec, (start, stop) in zip(self.specs, self._spans, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def copy_from(self, other: FlatBuffers) -> None:
        """Take over the values of `other`, which has the same specs."""
        for dtype, buffer in self.buffers.items():
            np.copyto(buffer, other.buffers[dtype])

    def equals(self, other: FlatBuffers) -> bool:
        """Whether every bit is the same: NaNs of the same bits count as equal."""
        return all(
            np.array_equal(buffer.view(np.uint8), other.buffers[dtype].view(np.uint8))
            for dtype, buffer in self.buffers.items()
        )

    def buckets(self, first: int = FIRST_BUCKET_NBYTES, cap: int = BUCKET_NBYTES) -> list[Bucket]:
        """The flat buffers cut into buckets at array borders, in the order of the specs."""
        plan = []
        for dtype, buffer in self.buffers.items():
            spans = [s for s, spec in zip(self._spans, self.specs, strict=True) if spec.dtype == dtype]
            starts = [start for start, _ in spans] + [buffer.size]
            sizes = [(b - a) * buffer.itemsize for a, b in itertools.pairwise(starts)]
            plan += [Bucket(dtype, starts[a], starts[b]) for a, b in plan_buckets(sizes, first, cap)]
        return plan
