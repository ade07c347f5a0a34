"""Finds where forward decides by a number of all of its rows, which each device would decide by its own.

On a few rows such a number (`if x.norm() > 5`) may lie on the same side of its limit for all rows and for some, and in
a later step it does not. So a run takes the other way at each such place: if the outputs are others, it matters.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdp.program.torch.rows.draws import CannotSplitError

_HERE, _TORCH = str(Path(__file__).parents[3]), str(Path(torch.__file__).parent)
_NEAR = 1e-3  # rounding, and sums in another order


class Site(NamedTuple):
    """A line of the user's code."""

    file: str
    line: int

    @property
    def name(self) -> str:
        """The line for messages."""
        code = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}, line {self.line}" + (f": `{code}`" if code else "")


class Decisions:
    """Which numbers a run compares, by the line of the user's code.

    Args:
        other: where the first comparison has the other outcome.
    """

    def __init__(self, other: Site | None = None) -> None:
        self.numbers: dict[Site, list[float]] = {}
        self._other = other

    def compared(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The result of torch's comparison of two numbers, of which one is a tensor's; anything else as it is."""
        result = function(*args)
        site = self._note(args)
        return result.logical_not() if site is not None and self._takes(site) else result

    def read(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The result of `Tensor.item`, whose comparisons may have the other outcome."""
        result = function(*args)
        site = self._note((*args, math.nan)) if type(result) is float else None
        return _Other(result, self) if site is not None and site == self._other else result

    def _note(self, args: Sequence[Any]) -> Site | None:
        """Note the numbers, if a tensor has one that is no count. Signs and empty sums are asked for by guards."""
        tensors = [one.detach() for one in args if isinstance(one, torch.Tensor)]
        if not any(one.is_floating_point() for one in tensors) or any(one.numel() != 1 for one in tensors):
            return None
        if any(type(one) in (int, float) and one == 0 for one in args):
            return None
        site = _site()
        if site is not None:
            self.numbers.setdefault(site, []).extend(float(one) for one in tensors)
        return site

    def _takes(self, site: Site) -> bool:
        """Whether a comparison there has the other outcome: the first one has."""
        found = site == self._other
        self._other = None if found else self._other
        return found

    def ends(self) -> bool:
        """Whether a comparison of a number that was read has the other outcome: the first one has."""
        found, self._other = self._other is not None, None
        return found

    def differing(self, parts: Sequence[Decisions]) -> list[Site]:
        """Where runs on parts of the rows have compared other numbers than this one, on all of them."""
        return [
            site
            for site, numbers in self.numbers.items()
            if any(not _alike(numbers, part.numbers.get(site, ())) for part in parts)
        ]


class _Other(float):
    """A number that was read from a tensor, of whose comparisons the first one has the other outcome."""

    _decisions: Decisions

    def __new__(cls, value: float, decisions: Decisions) -> _Other:
        made = super().__new__(cls, value)
        made._decisions = decisions
        return made


def _comparing(name: str) -> Callable[[_Other, Any], Any]:
    plain = getattr(float, name)

    def compare(self: _Other, other: Any) -> Any:
        found = plain(self, other)
        return found if found is NotImplemented or other == 0 or not self._decisions.ends() else not found

    return compare


def _computing(name: str) -> Callable[[_Other, Any], Any]:
    plain = getattr(float, name)

    def compute(self: _Other, other: Any) -> Any:
        found = plain(self, other)
        return found if found is NotImplemented else _Other(found, self._decisions)

    return compute


for _name in ("__lt__", "__le__", "__gt__", "__ge__"):
    setattr(_Other, _name, _comparing(_name))
for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"):
    setattr(_Other, _name, _computing(_name))


def _alike(numbers: Sequence[float], others: Sequence[float]) -> bool:
    return len(numbers) == len(others) and all(
        math.isclose(one, other, rel_tol=_NEAR) for one, other in zip(numbers, others, strict=True)
    )


def _site() -> Site | None:
    """The line of the user's code that the call comes from."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH)):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else Site(frame.f_code.co_filename, frame.f_lineno)


def refused(site: Site) -> CannotSplitError:
    """The error for a decision that matters."""
    return CannotSplitError(
        f"forward decides by a number of all of its rows ({site.name}). Each device would decide by its own rows, and "
        "other batches would get other results than on one device. Decide by what all rows have "
        "(if fastdp.replica.all_reduce(error, 'max') > 5), or for each row (torch.where), or use gpus=[0]."
    )
