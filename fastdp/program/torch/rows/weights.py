"""What the rows of a batch count in a mean over some of its entries, such as tokens whose labels are not ignored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdp.shard import Rows

# What modules write to leave entries out, besides the numbers that they are seen to compare with.
_USUAL = (0,)
_MOST = 12
_OPERATORS = ("ne", "eq", "gt", "ge", "lt", "le")
_CUTS = {"": slice(None), "[:, 1:]": slice(1, None), "[:, :-1]": slice(None, -1)}


@dataclass(frozen=True, slots=True)
class Counted:
    """Entries of one array of a batch: each row counts as many as it has.

    Args:
        place: of the array, in the batch.
        operator: how entries that count compare with `number`; "sum" for entries that count as much as they are, and
            "isnan" for those that are numbers.
        number: which entries are compared with.
        cut: the part of the second axis that counts.
    """

    place: int
    operator: str
    number: float = 0.0
    cut: str = ""

    def of(self, array: torch.Tensor) -> torch.Tensor:
        """What each row of the array counts."""
        if self.cut:
            array = array[:, _CUTS[self.cut]]
        if self.operator == "isnan":
            found = ~torch.isnan(array)
        else:
            found = array if self.operator == "sum" else getattr(torch, self.operator)(array, self.number)
        return found.reshape(len(array), -1).double().sum(1)

    @property
    def nothing(self) -> float:
        """A number that stands for an entry that does not count."""
        if self.operator == "isnan":
            return math.nan
        if self.operator in ("ne", "gt", "lt"):
            return self.number
        return self.number + {"sum": 0, "eq": 1, "ge": -1, "le": 1}[self.operator]


class RowWeights:
    """What the rows of a batch count in a mean.

    Args:
        weights: of each row. If they add up to zero, all rows count alike.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self._sums = np.concatenate([[0.0], np.cumsum(weights.numpy())])

    def share(self, rows: Rows) -> float:
        """What some rows count."""
        total = self._sums[-1]
        return float((self._sums[rows.stop] - self._sums[rows.start]) / total) if total else rows.share


def counted(place: int, array: torch.Tensor, compared: Iterable[float]) -> list[Counted]:
    """What may count in a mean over entries of an array, likeliest first.

    Args:
        place: of the array, in the batch.
        array: some rows of it.
        compared: the numbers that the module compares tensors with.
    """
    if array.is_complex():
        return []
    ways = [("sum", 0.0)]
    if array.dtype == torch.bool:
        ways.append(("eq", 0.0))
    else:
        seen = [number for number in compared if not math.isnan(number)]
        seen = seen if array.is_floating_point() else [number for number in seen if number == int(number)]
        ways += [("ne", float(number)) for number in _USUAL]
        ways += [one for one in itertools.product(_OPERATORS, seen) if one not in ways]
        if array.is_floating_point():
            ways.append(("isnan", 0.0))
    cuts = list(_CUTS) if array.ndim > 1 and array.shape[1] > 1 else [""]
    return [Counted(place, operator, number, cut) for cut in cuts for operator, number in ways]


def usual_numbers(array: torch.Tensor, compared: Iterable[float]) -> list[float | None]:
    """What may stand in an array for an entry that does not count; None for any other values in its range."""
    if array.dtype == torch.bool:
        return [None]
    if array.is_floating_point():
        return [0.0, math.nan]
    if array.is_complex() or not array.numel():
        return []
    info = torch.iinfo(array.dtype)
    flags = [2] if array.min() >= 0 and array.max() <= 1 else []
    whole = sorted(int(number) for number in compared if number == number // 1)
    whole.sort(key=lambda number: not bool((array == number).any()))  # what is there comes before sizes and the like
    near = [number + step for step in (0, -1, 1) for number in whole]
    found = [number for number in dict.fromkeys([*_USUAL, *flags, *near]) if info.min <= number <= info.max]
    return [None, *found[:_MOST]]


def _count_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two ways to count give each row the same share, as with and without the first label of each row."""
    totals = one.sum(), other.sum()
    return torch.equal(one, other) or (
        bool(totals[0] * totals[1]) and torch.allclose(one / totals[0], other / totals[1], rtol=1e-12, atol=0.0)
    )


def agreed(arrays: Sequence[torch.Tensor], ways: Sequence[Counted]) -> RowWeights:
    """What the rows of a batch count, in each of these ways.

    Raises:
        ValueError: the ways, among which a trial could not decide, differ for these arrays.
    """
    found = [way.of(arrays[way.place]) for way in ways]
    for other in found[1:]:
        if not _count_alike(other, found[0]):
            raise ValueError(
                "An output of the module is a mean over some entries of the batch, and fastdp cannot tell which ones. "
                'Say it: fastdp.wrap(module, rows={"output": fastdp.mean_over(lambda labels: labels != -100)}); or use '
                "gpus=[0]."
            )
    return RowWeights(found[0])
