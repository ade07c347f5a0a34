"""The random draws of a trial: made in the run on all rows, and taken by the runs of its parts."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastdp.comm.context import Context
from fastdp.program.torch.shared_draws import DrawPlace, DrawPlaces, SharedDraws, Site, memory_order, sizes_of
from fastdp.shard import Rows


class CannotSplitError(ValueError):
    """A module does what copies of it cannot do alike. The message has the remedies."""


class OtherDrawsError(ValueError):
    """A module draws for some rows what does not belong to its draws for all rows. The message has the remedies."""


class TrialDraws(SharedDraws):
    """The draws of the runs of a trial.

    Attributes:
        found: where the rows are in the draws, by number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = DrawPlaces()
        self.places = self.found
        self._whole = False
        self._made: dict[int, torch.Tensor] = {}
        self._parameters: dict[tuple[int, bool], Sequence[tuple[int, ...]]] = {}
        self._expected: dict[torch.Generator, torch.Tensor] = {}
        self._lengths: dict[int, dict[int, torch.Tensor]] = {}  # of packed sequences, by draw and first row of a part
        self._all_lengths: dict[int, torch.Tensor] = {}

    @contextmanager
    def run(self, rows: Rows, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Hold this in a run on these rows. The module's own generators have their states again afterwards.

        Raises:
            CannotSplitError: the module uses one of them otherwise than for draws.
        """
        self._whole = rows.count == rows.total
        self._expected = {}
        self._begun = {generator: generator.get_state() for generator in generators}
        for generator in generators:
            self._expected[generator] = generator.manual_seed(1).get_state()
        try:
            yield
            for generator in generators:
                self._check(generator)
        finally:
            self.undo()

    def alone(
        self, number: int, draw: Callable[[], torch.Tensor], generator: torch.Generator, *, repeatable: bool = False
    ) -> torch.Tensor:
        """Make a draw for all rows."""
        if generator is not torch.default_generator:
            self._begun.setdefault(generator, generator.get_state())
            self._check(generator)
        self._made[number] = found = draw()
        self._expected[generator] = generator.get_state()
        return found

    def place_of(self, number: int, site: Site, shape: tuple[int, ...], rows: Rows) -> DrawPlace:
        """Where the rows are in a draw, by its shapes for all rows and for a part of them.

        Raises:
            OtherDrawsError: the shapes depend on the rows in another way, or differently in two runs.
        """
        made = self._of_all(number)
        axis = _axis(tuple(made.shape), shape, rows)
        shapes = zip(self._parameters.get((number, True), ()), self._parameters.get((number, False), ()), strict=True)
        given = tuple(_axis(whole, part, rows) for whole, part in shapes)
        place = DrawPlace(axis, memory_order(made), given, sizes_of(made.shape, axis, rows.total), site)
        if self.found.setdefault(number, place) != place:
            raise OtherDrawsError(f"The module draws other random numbers for some rows than for others. {_REMEDY}")
        return place

    def take(self, number: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A draw for all rows: the one that was made for them."""
        return self._of_all(number)

    def repeat(self, number: int, replicas: int, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A draw for all rows, again."""
        return self._of_all(number)

    def note_parameters(self, number: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Note the shapes of the parameters for all rows, or for a part of them."""
        self._parameters[number, self._whole] = shapes

    def exchanged(self, context: Context, given: list[torch.Tensor], what: str) -> list[list[torch.Tensor]]:
        """Those of the part: nothing is drawn from them."""
        return [given]

    def note_lengths(self, number: int, lengths: torch.Tensor) -> None:
        """Note the lengths of all rows."""
        self._lengths[number] = {}
        self._all_lengths[number] = lengths

    def exchanged_lengths(
        self, context: Context, number: int, lengths: torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], int]:
        """Those of the parts before, which have run, those of this part, and all others."""
        if number not in self._all_lengths:
            raise OtherDrawsError(f"The module packs sequences for some rows and not for others. {_REMEDY}")
        parts, start = self._lengths[number], context.rows.start
        parts[start] = lengths
        before = [parts[at] for at in sorted(parts) if at < start]
        rest = collections.Counter(self._all_lengths[number].tolist())
        rest.subtract(torch.cat([*before, lengths]).tolist())
        return [*before, lengths, torch.tensor(list(rest.elements()), dtype=torch.int64)], len(before)

    def _of_all(self, number: int) -> torch.Tensor:
        """The draw of this number, for all rows."""
        if number not in self._made:
            raise OtherDrawsError(f"The module makes other random draws for some rows than for others. {_REMEDY}")
        return self._made[number]

    def _check(self, generator: torch.Generator) -> None:
        """Check that only draws have used a generator."""
        expected = self._expected.get(generator)
        if expected is not None and not torch.equal(generator.get_state(), expected):
            raise CannotSplitError(
                "The module seeds its torch.Generator in forward. Replicas share the generator, and would each seed "
                "it, between draws of the others. Seed it outside of forward, or use gpus=[0]."
            )


def _axis(whole: tuple[int, ...], part: tuple[int, ...], rows: Rows) -> int | None:
    """The axis of the rows in a shape, by that for all rows and that for a part of them.

    Raises:
        OtherDrawsError: they differ in another way.
    """
    axes = [at for at, (size, other) in enumerate(zip(whole, part, strict=False)) if size != other]
    axis = axes[0] if axes else None
    fits = axis is None or part[axis] * rows.total == whole[axis] * rows.count
    if len(whole) != len(part) or len(axes) > 1 or not fits:
        raise OtherDrawsError(
            f"The module draws random numbers of shape {whole} for {rows.total} rows and {part} for {rows.count} of "
            f"them, which does not belong to rows. {_REMEDY}"
        )
    return axis


_REMEDY = "Draw for all rows, with one axis of the rows, and select afterwards; or use gpus=[0]."
