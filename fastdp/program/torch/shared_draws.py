"""Random draws that the replicas of a step share: each is made once, for all rows, from torch's own generator.

The draws of a step are numbered. The replica that comes first makes a draw as one device would, for the rows of the
whole batch; the others get the same outcome, and each takes its rows. So draws leave torch's generator in the order of
one device, whatever replica is ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdp.comm.context import Context
from fastdp.shard import Rows
from fastdp.tensors.random import global_generator


@dataclass(slots=True)
class _Draw:
    """A draw that some replicas have not taken yet: its outcome by the generator that made it.

    `before` is the state of the first of these generators before the draw, unless it is torch's.
    """

    request: tuple[Any, ...]
    left: int
    before: torch.Tensor | None
    outcomes: dict[torch.Generator, torch.Tensor] = field(default_factory=dict)


Site = tuple[str, int] | None  # file and line of the user's code


@dataclass(frozen=True, slots=True)
class DrawPlace:
    """Where the rows of a draw are.

    Args:
        axis: the axis of the rows; None if all rows share the draw.
        order: the axes in the order of memory, outermost first.
        given: for a draw with parameters, such as probabilities: the axes of their rows.
        sizes: the shape of the draw for one row.
        site: where it is made.
    """

    axis: int | None
    order: tuple[int, ...]
    given: tuple[int | None, ...] = ()
    sizes: tuple[int, ...] = ()
    site: Site = None

    def allows(self, shape: tuple[int, ...], count: int) -> bool:
        """Whether the draw of so many rows may have this shape."""
        if len(shape) != len(self.order):
            return False
        return self.axis is None or bool(shape[self.axis] and shape[self.axis] % count == 0)

    def fits(self, shape: tuple[int, ...], count: int) -> bool:
        """Whether the draw of so many rows has this shape."""
        return self.allows(shape, count) and sizes_of(shape, self.axis, count) == self.sizes

    def agrees_with(self, other: DrawPlace) -> bool:
        """Whether rows are in the same place, whatever the sizes."""
        return (self.axis, self.order, self.given) == (other.axis, other.order, other.given)


class DrawPlaces(dict[int, DrawPlace]):
    """Where the rows are in the draws that a trial has seen, by number."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[Site, tuple[int, ...], int], dict[int, DrawPlace] | DrawPlace] = {}

    def find(self, number: int, site: Site, shape: tuple[int, ...], count: int) -> DrawPlace | None:
        """Where the rows are in a draw; None if the trial has seen none like it at its site, or several that differ.

        The number decides only where it must: a module that skips parts at random has other numbers in each step.

        Args:
            number: of the draw among those of the replica.
            site: where it is made.
            shape: of the draw.
            count: the number of rows.
        """
        key = (site, shape, count)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._fitting(site, shape, count)
        return found if isinstance(found, DrawPlace) else found.get(number)

    def _fitting(self, site: Site, shape: tuple[int, ...], count: int) -> dict[int, DrawPlace] | DrawPlace:
        """The places at a site for draws of this shape, by number; one place if they agree."""
        here = {at: place for at, place in self.items() if place.site == site}
        fits = {at: place for at, place in here.items() if place.fits(shape, count)}
        fits = fits or {at: place for at, place in here.items() if place.allows(shape, count)}
        every = list(fits.values())
        return every[0] if every and all(place.agrees_with(every[0]) for place in every) else fits


def sizes_of(shape: Sequence[int], axis: int | None, count: int) -> tuple[int, ...]:
    """The shape of a draw for one row, from that for so many rows."""
    return tuple(size // count if at == axis else size for at, size in enumerate(shape))


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes of a tensor in the order of memory, outermost first."""
    # An axis of length one has the stride of the axis around it, so a single row stands inside that axis.
    return tuple(sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride(axis), tensor.shape[axis] == 1)))


class SharedDraws:
    """The draws of one step. Called on the threads of all its replicas.

    Attributes:
        places: where the rows are in the draws that a trial has seen, by number; None without a trial.
        repeated_places: where they are in draws that backward may repeat.
    """

    stays_in_process = True

    def __init__(self) -> None:
        self.places: DrawPlaces | None = None
        self._draws: dict[int, _Draw] = {}
        self._states: dict[torch.Generator, torch.Tensor] = {}
        self._begun: dict[torch.Generator, torch.Tensor] = {}
        self._repeatable: dict[int, torch.Tensor] = {}
        self._repeated: dict[int, tuple[int, torch.Tensor]] = {}
        self.repeated_places: dict[int, DrawPlace] = {}
        self._kept: dict[int, torch.Tensor] = {}

    def begin(self) -> None:
        """Called by each replica when its pass begins: from now on only shared draws may use torch's generator."""
        with global_generator:
            self._begin(torch.default_generator)

    def undo(self) -> None:
        """Give the generators the states that they had before the step. Called when it has failed."""
        with global_generator:
            for generator, state in self._begun.items():
                generator.set_state(state)

    @property
    def generators(self) -> list[torch.Generator]:
        """Those that the step has used."""
        return list(self._begun)

    @property
    def tried(self) -> bool:
        """Whether a trial has seen the draws of the module."""
        return self.places is not None

    def place_of(self, number: int, site: Site, shape: tuple[int, ...], rows: Rows) -> DrawPlace:
        """Where the rows are in a draw, by what a trial has seen at its site.

        Args:
            number: of the draw among those of the replica.
            site: where it is made.
            shape: of the replica's draw.
            rows: the replica's rows.

        Raises:
            RuntimeError: the trial has seen no such draw there, or several that differ.
        """
        assert self.places is not None
        place = self.places.find(number, site, shape, rows.count)
        if place is None:
            raise RuntimeError(
                f"Draw {number} of the step has shape {shape} for {rows.count} rows{_told_site(site)}. When fastdp "
                "tried the module on a few rows it made no such draw there, or several that differ: the module takes "
                f"another path now. {_REMEDY}"
            )
        return place

    def take(
        self,
        number: int,
        replicas: int,
        request: tuple[Any, ...],
        draw: Callable[[], torch.Tensor],
        generator: torch.Generator,
        *,
        repeatable: bool = False,
    ) -> torch.Tensor:
        """The outcome of a replica's draw for the whole batch. Read-only.

        Args:
            number: of the draw among those of the replica.
            replicas: how many replicas take it.
            request: the function, its numbers and the shape for the whole batch: the same on all replicas.
            draw: makes the draw, if no other replica has.
            generator: what it uses. A generator that each replica has made itself is used by each.
            repeatable: keep what `repeat` needs.

        Raises:
            RuntimeError: another replica has asked for something else, or something else has used the generator.
        """
        with global_generator:
            found = self._draws.get(number)
            if found is None:
                before = None if generator is torch.default_generator else generator.get_state()
                found = self._draws[number] = _Draw(request, replicas, before)
            elif found.request != request:
                raise RuntimeError(
                    f"The replicas draw different random numbers: draw {number} of the step is "
                    f"{_told(found.request)} on one and {_told(request)} on another, for all rows. {_REMEDY}"
                )
            if generator not in found.outcomes:
                if found.outcomes and not _equal(generator.get_state(), found.before):
                    raise RuntimeError(
                        f"The replicas draw different random numbers: for draw {number} of the step each has made a "
                        f"generator, and these are in different states. {_REMEDY}"
                    )
                found.outcomes[generator] = self.alone(number, draw, generator, repeatable=repeatable)
            found.left -= 1
            if not found.left:
                del self._draws[number]
            return found.outcomes[generator]

    def alone(
        self, number: int, draw: Callable[[], torch.Tensor], generator: torch.Generator, *, repeatable: bool = False
    ) -> torch.Tensor:
        """Make a draw that no other replica takes. Arguments as of `take`.

        Raises:
            RuntimeError: something else has used the generator.
        """
        with global_generator:
            self._begin(generator)
            self._check_untouched(generator)
            if repeatable:
                self._repeatable[number] = self._states[generator]
            outcome = draw()
            self._states[generator] = generator.get_state()
            return outcome

    def repeat(self, number: int, replicas: int, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The outcome of a repeatable draw of torch's generator, again. Read-only. Arguments as of `take`.

        Raises:
            RuntimeError: there was no such draw.
        """
        with global_generator:
            if number not in self._repeatable:
                raise RuntimeError(
                    f"A part that torch.utils.checkpoint runs again makes other random draws than in forward: draw "
                    f"{number} of the step is a new one. {_REMEDY}"
                )
            left, outcome = self._repeated.pop(number, (replicas, None))
            if outcome is None:
                now = torch.get_rng_state()
                torch.set_rng_state(self._repeatable[number])
                try:
                    outcome = draw()
                finally:
                    torch.set_rng_state(now)
            if left > 1:
                self._repeated[number] = left - 1, outcome
            return outcome

    def keep(self, number: int, outcome: torch.Tensor) -> None:
        """Keep the outcome of a draw from parameters, which backward may ask for again."""
        with global_generator:
            self._kept[number] = outcome

    def kept(self, number: int) -> torch.Tensor:
        """The outcome that was kept."""
        return self._kept[number]

    def note_parameters(self, number: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """A replica is about to draw from parameters of these shapes."""

    def exchanged(self, context: Context, given: list[torch.Tensor], what: str) -> list[list[torch.Tensor]]:
        """The parameters of all replicas."""
        return context.exchange(given, what)

    def note_lengths(self, number: int, lengths: torch.Tensor) -> None:
        """The only replica is about to draw for a packed sequence with rows of these lengths."""

    def exchanged_lengths(
        self, context: Context, number: int, lengths: torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], int]:
        """The lengths of the rows of a packed sequence on each replica, and the replica's own number among them."""
        return [one for (one,) in context.exchange([lengths], "the lengths of a packed sequence")], context.rank

    def end(self) -> None:
        """Called when all replicas have ended.

        Raises:
            RuntimeError: a replica made fewer draws than another, or something else has used the generator.
        """
        if self._draws:
            number, draw = next(iter(self._draws.items()))
            raise RuntimeError(
                f"The replicas draw different random numbers: draw {number} of the step, {_told(draw.request)} for all "
                f"rows, was made on some of them only. {_REMEDY}"
            )
        for generator in self._states:
            self._check_untouched(generator)

    def _begin(self, generator: torch.Generator) -> None:
        """Note the state of a generator that the step uses."""
        if generator not in self._states:
            self._states[generator] = self._begun[generator] = generator.get_state()

    def _check_untouched(self, generator: torch.Generator) -> None:
        """Check that only shared draws have used a generator."""
        if torch.equal(generator.get_state(), self._states[generator]):
            return
        if generator is not torch.default_generator:
            raise RuntimeError(
                "The module used a torch.Generator of its own in a way that fastdp does not see, such as a method of "
                "it: replicas share the generator, and would each seed it. Seed it outside of forward, or use gpus=[0]."
            )
        raise RuntimeError(
            "The module used torch's random generator in a way that fastdp does not see, so the replicas do not "
            "draw what one device would: from compiled code or an extension, or by a method of a generator; or "
            "another thread of this process drew from it meanwhile. Draw by torch's functions, or use gpus=[0]."
        )


_REMEDY = (
    "A draw must not depend on the values of some rows: not whether it is made, nor its shape. Draw for all rows and "
    "select afterwards, or use gpus=[0]."
)


def _equal(state: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(state, other)


def _told_site(site: Site) -> str:
    return "" if site is None else f" at {site[0]}:{site[1]}"


def _told(request: tuple[Any, ...]) -> str:
    name, *rest = request
    return f"{name} {tuple(rest)}"
