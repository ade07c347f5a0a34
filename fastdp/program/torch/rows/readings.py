"""Lists what the arrays of a batch may be: rows along one of their axes, or the same for all rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastdp.tensors.row_effects import ROWS_FIRST, Effect, Layout

_MOST = 32  # readings that are tried
_SAME = Layout(Effect.SAME)
Reading = tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """An array of a batch.

    Args:
        group: arrays with the same one are read alike: they belong to one argument and have one shape.
        shape: its shape.
        layout: what the user has said about it; None if nothing.
        is_target: whether it is a target. If `whole`, the loss function gets all of it in any case.
    """

    group: str
    shape: tuple[int, ...]
    layout: Layout | None
    is_target: bool
    whole: bool

    def choices(self, rows: int) -> list[Layout]:
        """What the array may be in a batch of so many rows, likeliest first."""
        if self.layout is not None:
            axis = self.layout.axis
            return [self.layout] if axis is None else _along(self.shape, axis, rows)
        if self.is_target:
            return [ROWS_FIRST] if self.shape[0] == rows else [_SAME] if self.whole else []
        found = [Layout(Effect.ROWS, axis, 1, True) for axis, size in enumerate(self.shape) if size == rows]
        several = [] if self.shape[0] == rows else _along(self.shape, 0, rows)
        return [*found, _SAME, *several]


def readings(arrays: Sequence[Given]) -> Iterator[Reading]:
    """What the arrays of a batch may be, likeliest first: as they are by default, then one argument differs, then two.

    An equal length is no reason for anything: each reading must be tried.
    """
    found = itertools.chain.from_iterable(_of_rows(arrays, rows) for rows in _lengths(arrays))
    seen: set[Reading] = set()
    for reading in found:
        if reading not in seen:
            seen.add(reading)
            yield reading
        if len(seen) == _MOST:
            return


def _along(shape: tuple[int, ...], axis: int, rows: int) -> list[Layout]:
    """Rows along an axis, with one entry for each or several; nothing if they do not fit."""
    size = shape[axis]
    return [Layout(Effect.ROWS, axis, size // rows, True)] if size and size % rows == 0 else []


def _lengths(arrays: Sequence[Given]) -> list[int]:
    """What may be the number of rows: the commonest length of first axes, then that of others."""
    firsts = Counter(one.shape[0] for one in arrays)
    others = Counter(size for one in arrays if not one.is_target for size in one.shape[1:])
    ordered = [size for size, _ in (*firsts.most_common(), *others.most_common())]
    return [size for size in dict.fromkeys(ordered) if size > 1]


def _of_rows(arrays: Sequence[Given], rows: int) -> Iterator[Reading]:
    """The readings for one number of rows."""
    choices = [one.choices(rows) for one in arrays]
    if not all(choices):
        return
    groups = list(dict.fromkeys(one.group for one in arrays))
    usual = {one.group: found[0] for one, found in zip(arrays, choices, strict=True)}
    others = {one.group: found[1:] for one, found in zip(arrays, choices, strict=True) if found[1:]}
    for changed in itertools.chain.from_iterable(itertools.combinations(groups, number) for number in range(3)):
        for chosen in itertools.product(*(others.get(group, ()) for group in changed)):
            by_group = {**usual, **dict(zip(changed, chosen, strict=True))}
            reading = tuple(by_group[one.group] for one in arrays)
            if any(
                layout.effect is Effect.ROWS and not one.is_target for one, layout in zip(arrays, reading, strict=True)
            ):
                yield reading
