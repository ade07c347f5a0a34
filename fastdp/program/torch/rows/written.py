"""Judges from runs of a trial how what forward writes to attributes and containers depends on the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastdp.program.torch.following.merged import Role, as_tensor, equal, refused
from fastdp.program.torch.following.writes import MISSING, Known, Place, Written, present
from fastdp.program.torch.rows.judged import Candidates, candidates, decided, is_exact, row_layout, state_candidates
from fastdp.program.torch.rows.trial import Run
from fastdp.tensors.row_effects import Effect, Layout

_NUMBERS = (int, float, complex)
_Leaf = tuple[Place, int]


class WrittenRoles:
    """Finds the roles of what forward writes, trial by trial.

    Args:
        rows: the numbers of rows of the parts of a trial.
        rough: values are computed in a lower precision than their own.
    """

    def __init__(self, rows: Sequence[int], *, rough: bool) -> None:
        self._rows, self._rough = rows, rough
        self._layouts: dict[_Leaf, Layout] = {}
        self._left: dict[_Leaf, Candidates] = {}
        self._exact: dict[_Leaf, bool] = {}
        self._adds: dict[_Leaf, bool] = {}
        self._specs: dict[Place, Any] = {}

    def look(self, parts: Sequence[Run], whole: Run, again: Callable[[], Run], *, trusted: bool) -> None:
        """Judge one trial.

        Args:
            parts, whole: the runs on the parts of the rows, and on all of them.
            again: runs the module twice on all rows, one after the other.
            trusted: leave open what cannot be merged: the step compares the devices.

        Raises:
            ValueError: something that is written cannot be merged.
        """
        second = functools.cache(again)
        for place, every in _places((*parts, whole)):
            if every is None:
                self._refuse(place, "for some rows of the batch only, or in another structure than for others", trusted)
                continue
            self._specs.setdefault(place, every[-1].spec)
            for i, values in enumerate(zip(*(one.leaves for one in every), strict=True)):
                self._leaf((place, i), values, _before(whole, place, i), second, trusted)

    def look_again(self, parts: Sequence[Run], whole: Run, *, trusted: bool) -> None:
        """Judge one trial on rows with other values, where all runs have written values of one shape.

        Raises:
            ValueError: something that is written cannot be merged.
        """
        for place, every in _places((*parts, whole)):
            if every is not None:
                self._again(place, every, whole, trusted)

    def _again(self, place: Place, every: Sequence[Written], whole: Run, trusted: bool) -> None:
        """Judge again what was written at one place."""
        for i, values in enumerate(zip(*(one.leaves for one in every), strict=True)):
            left = self._left.get((place, i))
            if left is None or not all(is_number(value) for value in values):
                continue
            tensors = [as_tensor(value).detach() for value in values]
            if len({value.shape for value in tensors}) > 1 or not bool(torch.isfinite(tensors[2]).all()):
                continue
            base = self._base(_before(whole, place, i), tensors[2]) if self._adds.get((place, i)) else None
            found: Candidates | None
            if base is None:
                found = candidates(tensors[:2], tensors[2], self._rows, rough=self._rough)
            else:
                found = state_candidates(tensors[:2], tensors[2], base, self._rows, rough=self._rough)
            if found is not None:
                self._keep((place, i), found, trusted=trusted)

    def look_later(self, parts: Sequence[Run], whole: Run, *, trusted: bool) -> None:
        """Judge what a second pass has written, where it has the structure of what the first one has.

        Raises:
            ValueError: it cannot be merged as that of the first one.
        """
        for place, every in _places((*parts, whole)):
            if every is not None and every[-1].spec == self._specs.get(place):
                self._again(place, every, whole, trusted)

    def keeps(self) -> bool:
        """Whether something is written that may depend on the rows."""
        return bool(self.by_rows()) or any(left != {Effect.SAME} for left in self._left.values())

    def by_rows(self) -> dict[_Leaf, Layout]:
        """Where the rows are in what is written by rows."""
        return {leaf: layout for leaf, layout in self._layouts.items() if layout.effect is Effect.ROWS}

    def has_means(self) -> bool:
        """Whether something that is written is a mean."""
        return any(
            not self._exact[leaf] and decided(left, exact=False) is Effect.MEAN for leaf, left in self._left.items()
        )

    def saved(self) -> dict[_Leaf, Candidates]:
        """What is possible now, for `restore`."""
        return dict(self._left)

    def restore(self, saved: dict[_Leaf, Candidates]) -> None:
        """Forget what later trials have shown."""
        self._left = saved

    def is_open(self) -> bool:
        """Whether further trials may tell more."""
        return any(decided(found, exact=self._exact[leaf]) is None for leaf, found in self._left.items())

    def roles(self) -> dict[_Leaf, Role]:
        """The roles of all that is written.

        Raises:
            ValueError: the trials cannot tell.
        """
        found = {leaf: Role(layout) for leaf, layout in self._layouts.items()}
        for leaf, left in self._left.items():
            effect = decided(left, exact=self._exact[leaf])
            if effect is None and Effect.SAME in left:  # zero, whatever the parameters are
                effect = Effect.SAME if self._exact[leaf] else Effect.MEAN
            if effect in (None, Effect.UNKNOWN):
                raise refused(leaf[0].name, "to values that may be a sum or an extreme over rows")
            assert effect is not None
            found[leaf] = Role(Layout(effect), self._adds.get(leaf, False) and effect is Effect.SUM)
        return found

    def _leaf(self, leaf: _Leaf, values: Sequence[Any], before: Any, second: Callable[[], Run], trusted: bool) -> None:
        """Judge the values of one leaf, for the two parts and for all rows."""
        place, kind = leaf[0], type(values[-1])
        if any(type(value) is not kind for value in values):
            self._refuse(place, "to values of different types for some rows and for others", trusted)
        elif is_number(values[-1]):
            self._numbers(leaf, [as_tensor(value).detach() for value in values], before, second, trusted)
        elif all(equal(values[0], value) for value in values):
            self._layouts[leaf] = Layout(Effect.SAME)
        elif isinstance(values[-1], Known):
            self._refuse(place, f"to a {type(values[-1].value).__name__} of each device's own", trusted)
        else:
            self._refuse(place, "to different values for some rows and for others", trusted)

    def _numbers(
        self,
        leaf: _Leaf,
        values: list[torch.Tensor],
        before: Any,
        second: Callable[[], Run],
        trusted: bool,
    ) -> None:
        place = leaf[0]
        if len({value.shape for value in values}) > 1:
            layout = row_layout(values[:2], values[2], self._rows, rough=self._rough)
            if layout.effect is Effect.UNKNOWN or self._layouts.get(leaf, layout) != layout or leaf in self._left:
                self._refuse(place, "to tensors whose rows side by side are not those of the whole batch", trusted)
                return
            self._layouts[leaf] = layout
            return
        left = candidates(values[:2], values[2], self._rows, rough=self._rough)
        base = self._base(before, values[2])
        if base is None and place.kind in ("tensor", "array") and left != {Effect.SAME}:
            self._refuse(place, "in place, by the rows of the batch, and it is large: make it a buffer", trusted)
            return
        if left != {Effect.SAME} and base is not None:
            adds = self._adds_up(leaf, values[2], second)
            if adds:
                changed = state_candidates(values[:2], values[2], base, self._rows, rough=self._rough)
                adds = changed is None or bool(changed)  # else each run gives another one of several
                left = changed if changed is not None and adds else left
            self._adds[leaf] = adds or self._adds.get(leaf, False)
        self._exact[leaf] = is_exact(values[2])
        self._keep(leaf, left, trusted=trusted)

    def _keep(self, leaf: _Leaf, found: Candidates, *, trusted: bool) -> None:
        """Keep what is possible for a leaf without rows."""
        left = self._left.get(leaf, found) & found
        if not left or leaf in self._layouts:
            self._refuse(leaf[0], "by the rows of the batch, to what is no mean, sum or extreme over rows", trusted)
            self._left.pop(leaf, None)
        else:
            self._left[leaf] = left

    def _adds_up(self, leaf: _Leaf, value: torch.Tensor, second: Callable[[], Run]) -> bool:
        """Whether a second run on the same rows moves the value on."""
        run = second()
        found = run.written.get(leaf[0]) or present(run.guard, leaf[0])
        if found is None or len(found.leaves) <= leaf[1]:
            return False
        return not equal(as_tensor(found.leaves[leaf[1]]).detach(), value)

    @staticmethod
    def _base(before: Any, value: torch.Tensor) -> torch.Tensor | None:
        """The value before, if it can be added to."""
        if type(before) not in _NUMBERS and not isinstance(before, (torch.Tensor, np.ndarray)):
            return None
        base = as_tensor(before).detach()
        return base if base.shape == value.shape else None

    @staticmethod
    def _refuse(place: Place, how: str, trusted: bool) -> None:
        if not trusted:
            raise refused(place.name, how)


def _before(run: Run, place: Place, number: int) -> Any:
    """What was in the place of a leaf before a run; MISSING if it has not written there, or nothing was there."""
    return run.written[place].before_at(number) if place in run.written else MISSING


def is_number(value: Any) -> bool:
    """Whether a leaf is a number, a tensor or an array."""
    return type(value) in _NUMBERS or isinstance(value, (torch.Tensor, np.ndarray))


def _places(runs: Sequence[Run]) -> Iterator[tuple[Place, list[Written] | None]]:
    """Where some of these runs have written, and what all have there; None if it differs in structure."""
    for place in dict.fromkeys(place for run in runs for place in run.written):
        every = [run.written.get(place) or present(run.guard, place) for run in runs]
        found = [one for one in every if one is not None]
        yield place, found if len(found) == len(runs) and all(one.spec == found[0].spec for one in found) else None
