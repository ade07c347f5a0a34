"""Flat buffers by dtype, or the parts of them that one device updates, as Keras optimizers get them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from fastdp.buffers import FlatBuffers, Memory
from fastdp.tensors.arrays import as_tensor, dtype_name, tensors_of

# Elements per piece on a CPU. An update passes over its operands several times, and a piece stays in the caches
# meanwhile. bench/optimizers.py has the measurements.
PIECE = 1 << 18
# With several threads: pieces per core, so that all threads end at about the same time, and the smallest piece.
SHARED_PIECES, SMALLEST_PIECE = 3, 1 << 14


@dataclass(slots=True)
class Region:
    """Trainable variables of one dtype: the memory of the variables, the gradients and each kind of slots.

    `members` are the numbers of the variables, `starts` their offsets. The gaps between them stay zero. The first and
    the last one may be there in part.
    """

    variables: torch.Tensor
    gradients: torch.Tensor
    kinds: list[torch.Tensor]
    members: list[int]
    starts: list[int]
    gaps: torch.Tensor

    def first(self) -> Region:
        """A region with copies of the first element of each buffer."""
        variables, gradients, *kinds = (t[:1].clone() for t in (self.variables, self.gradients, *self.kinds))
        return Region(variables, gradients, kinds, self.members[:1], [0], self.gaps[:0])

    def scratch(self) -> Region:
        """An element of zeros that belongs to no variable: an update of it moves the optimizer's scalars alone."""
        variables, gradients, *kinds = (t.new_zeros(1) for t in (self.variables, self.gradients, *self.kinds))
        return Region(variables, gradients, kinds, [-1], [0], self.gaps[:0])

    def part(self, low: int, high: int, kinds: Sequence[torch.Tensor]) -> Region:
        """The elements `[low, high)`, with kinds of slots that have these elements alone."""
        ends = [*self.starts[1:], self.variables.numel()]
        inside = [at for at, start in enumerate(self.starts) if start < high and ends[at] > low]
        gaps = self.gaps[(self.gaps >= low) & (self.gaps < high)] - low
        return Region(
            self.variables[low:high],
            self.gradients[low:high],
            list(kinds),
            [self.members[at] for at in inside],
            [max(0, self.starts[at] - low) for at in inside],
            gaps,
        )

    def spans(
        self, unused: frozenset[int], decays: Sequence[bool], cores: int | None
    ) -> Iterator[tuple[slice, bool, bool]]:
        """Pieces of adjacent variables that are treated alike: each with whether it is unused, and decays.

        Args:
            unused: numbers of the variables without a gradient.
            decays: by number, whether a variable's weights decay.
            cores: that share the pieces; None if one thread takes them all.
        """
        length = self.variables.numel()
        size = PIECE if self.variables.device.type == "cpu" else max(1, length)  # on a GPU one large kernel is faster
        if cores is not None:
            size = min(size, max(SMALLEST_PIECE, -(-length // (SHARED_PIECES * cores))))
        alike = [(i in unused, i >= 0 and decays[i]) for i in self.members]
        ends = [*self.starts[1:], length]
        for (is_unused, decay), group in groupby(zip(self.starts, ends, alike, strict=True), key=lambda span: span[2]):
            neighbours = list(group)
            begin, end = neighbours[0][0], neighbours[-1][1]
            for start in range(begin, end, size):
                yield slice(start, min(start + size, end)), is_unused, decay


def regions_of(memory: Memory, kinds: int) -> dict[str, Region]:
    """The flat buffers of all trainable variables by dtype, in the order in which dtypes first appear.

    Args:
        memory: the trainable variables, which are the first ones, their gradients and slots.
        kinds: the number of kinds of slots in the memory.

    Raises:
        RuntimeError: they are laid out differently.
    """
    gradients = tensors_of(memory.gradients)
    variables = tensors_of(memory.variables)[: len(gradients)]
    by_slot = tensors_of(memory.slots)
    views = [by_slot[i * len(gradients) : (i + 1) * len(gradients)] for i in range(kinds)]
    regions = {}
    for dtype, buffer in memory.gradients.buffers.items():
        numbers = [i for i, g in enumerate(gradients) if dtype_name(g) == dtype and g.numel()]
        if not numbers:
            continue
        flat = as_tensor(buffer, dtype)
        starts = _starts(flat, [gradients[i] for i in numbers])
        parts = []
        for flats, tensors in ((memory.variables, variables), *((memory.slots, one) for one in views)):
            parts.append(_alike(flats, dtype, [tensors[i] for i in numbers], starts, flat.numel()))
        ends = [start + gradients[i].numel() for start, i in zip(starts, numbers, strict=True)]
        gaps = [g for end, start in zip(ends, [*starts[1:], flat.numel()], strict=True) for g in range(end, start)]
        index = torch.tensor(gaps, dtype=torch.int64, device=flat.device)
        regions[dtype] = Region(parts[0], flat, parts[1:], numbers, starts, index)
    return regions


def _alike(
    flats: FlatBuffers, dtype: str, views: Sequence[torch.Tensor], starts: Sequence[int], length: int
) -> torch.Tensor:
    """The memory of views that lie in their buffer as their gradients do."""
    whole = as_tensor(flats.buffers[dtype], dtype)
    found = _starts(whole, views)
    if [start - found[0] for start in found] != [start - starts[0] for start in starts]:
        raise RuntimeError("Variables, gradients and slots are laid out differently. This is a bug in fastdp.")
    return whole[found[0] : found[0] + length]


def _starts(flat: torch.Tensor, views: Sequence[torch.Tensor]) -> list[int]:
    """The offsets of views in their flat buffer, in elements."""
    return [(view.data_ptr() - flat.data_ptr()) // flat.itemsize for view in views]
