"""Runs a model on some rows of a batch and on two parts of them, and judges how its values depend on the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from fastdp.program.keras.batch import Structure
from fastdp.program.keras.plain_outputs import check_same
from fastdp.program.keras.rows.probe import Change, Effects, Trial, last_bits, other_weights, seed_generators
from fastdp.program.keras.rows.units import Plan, Recorder, Unit
from fastdp.program.keras.rows.written import Place, Writes
from fastdp.tensors.row_effects import NOISE_FACTOR, TOLERANCE, Effect, Layout, classify, layout_of, values_agree

# Effects by which values without a row axis can be combined from the replicas' values.
_OF_OUTPUTS = (Effect.MEAN, Effect.SUM)
_OF_LOSSES = (Effect.MEAN, Effect.SUM, Effect.SAME, Effect.UNDECIDED)
_OF_VARIABLES = (*_OF_LOSSES, Effect.LARGEST, Effect.SMALLEST)
# Values below so many units in the last place of one may be nothing but rounding errors.
_FAINT = 1e4
# Errors that a model's own code may raise on rows that it was not made for.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(slots=True)
class Verdict:
    """How everything depends on the rows, and what replicas cannot compute.

    Attributes:
        layouts, losses, moves: how outputs, `add_loss` terms and variables depend on the rows.
        outputs, terms, variables: the numbers of those that cannot be combined from the replicas' rows.
    """

    layouts: list[Layout]
    losses: list[Effect]
    moves: dict[int, Effect]
    outputs: list[int] = field(default_factory=list)
    terms: list[int] = field(default_factory=list)
    variables: list[int] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether everything can be combined from the replicas' rows."""
        return not (self.outputs or self.terms or self.variables)

    @property
    def is_affine(self) -> bool:
        """Whether the only obstacles are variables that change by a sum over rows plus a part independent of rows."""
        return not (self.outputs or self.terms) and all(self.moves[i] is Effect.AFFINE for i in self.variables)


_Trials = tuple[Trial, Trial, Trial]  # of the two parts, and the whole


class RowTrials:
    """The results of a model on some rows: on all of them, and on two parts.

    Args:
        effects: runs the model.
        arrays: the rows.
        structure: the structure of `arrays`.
        cut: the first row of the second part.
    """

    def __init__(self, effects: Effects, arrays: Sequence[np.ndarray], structure: Structure, cut: int) -> None:
        self._effects, self.arrays, self.structure, self._cut = effects, arrays, structure, cut
        self.total = len(arrays[0])
        self.rows = cut, self.total - cut
        self.whole = self._run(arrays, 0, self.total)
        self.parts = self._apart = self._parts({})
        check_same([trial.plain for trial in (*self.parts, self.whole)], self.whole.nest)
        self._noisy: Trial | None = None
        self._repeats: bool | None = None

    def _run(self, arrays: Sequence[np.ndarray], start: int, stop: int, **options: Any) -> Trial:
        """Run one trial. Draws outside keras.random are the same in all trials."""
        seed_generators()
        return self._effects._try_rows(arrays, self.structure, start, stop, **options)

    def _parts(self, plans: dict[Unit, Plan]) -> tuple[Trial, Trial]:
        """The trials of the two parts."""
        return self._part(0, self._cut, plans), self._part(self._cut, self.total, plans)

    def _part(self, start: int, stop: int, plans: dict[Unit, Plan]) -> Trial:
        """The trial of a part. With plans a unit may fail: only one of its two values may have all rows."""
        recorder = Recorder(plans, self.whole.calls)
        try:
            return self._run(self.arrays, start, stop, recorder=recorder)
        except FAILURES:
            failed = recorder.failed
            if not plans or failed is None:
                raise
            return Trial([], {}, [], {**recorder.calls, failed.unit: failed}, recorder.losses, failed.unit)

    def _otherwise(self, plans: dict[Unit, Plan], *, reverse: bool = False, **options: Any) -> _Trials | None:
        """Trials of the parts and the whole with the rows reversed, or with other values of some variables.

        `options` are those of `Effects._try_rows`. Returns None if the model fails on these.
        """
        arrays = [array[::-1].copy() for array in self.arrays] if reverse else self.arrays
        try:
            whole = self._run(arrays, 0, self.total, **options)
            a, b = (
                self._run(arrays, start, stop, recorder=Recorder(plans, whole.calls), **options)
                for start, stop in ((0, self._cut), (self._cut, self.total))
            )
        except FAILURES:
            return None
        return a, b, whole

    # Results of the trials.

    def verdict(self, plans: dict[Unit, Plan]) -> Verdict:
        """How everything depends on the rows, with the planned units on merged inputs."""
        if plans:
            self.parts = self._parts(plans)
        (a, b), whole = self.parts, self.whole
        if a.failed or b.failed:
            layouts = [Layout(Effect.UNKNOWN)] * len(whole.outputs)
            losses = [Effect.UNKNOWN] * len(whole.losses)
            return Verdict(layouts, losses, {}, list(range(len(layouts))), list(range(len(losses))))
        layouts, unknown = [], [Layout(Effect.UNKNOWN)] * len(whole.outputs)
        if a.outputs and b.outputs:
            layouts = self._layouts(a.outputs, b.outputs, whole.outputs, lambda trial: trial.outputs) or unknown
        losses, moves = self._losses((a, b, whole)), self._moves(plans, (a, b, whole))
        self._ask_elsewhere(plans, losses, moves)
        verdict = Verdict(layouts, losses, moves)
        verdict.outputs = [
            i
            for i, layout in enumerate(layouts)
            if not (layout.is_local or (layout.effect in _OF_OUTPUTS and not whole.outputs[i].ndim))
        ]
        verdict.terms = [i for i, effect in enumerate(losses) if effect not in _OF_LOSSES]
        verdict.variables = [i for i, effect in verdict.moves.items() if effect not in _OF_VARIABLES]
        return verdict

    def _ask_elsewhere(self, plans: dict[Unit, Plan], losses: list[Effect], moves: dict[int, Effect]) -> None:
        """Replace effects that may be due to the present weights by those for other weights.

        The mean of what a LayerNormalization returns is a rounding error until its offset is trained, and the mean of
        the squares of normalized rows is the same for all rows.
        """
        whole = self.whole
        faint = [i for i, value in enumerate(whole.losses) if self._is_faint(value, _loss(i))]
        doubtful = [
            i
            for i, value in whole.moved.items()
            if (moves[i] is Effect.SAME and self._dtype(i).is_floating_point)
            or self._is_faint(value, _move(i), self._dtype(i))
        ]
        other = self._otherwise(plans, change=other_weights) if faint or doubtful else None
        if other is None:
            return
        _replace(losses, [i for i in faint if _is_finite(other, _loss(i))], dict(enumerate(self._losses(other))))
        doubtful = [i for i in doubtful if _is_finite(other, _move(i))]
        _replace(moves, doubtful, self._moves(plans, other, other_weights))

    def _losses(self, trials: _Trials) -> list[Effect]:
        """How the `add_loss` terms depend on the rows."""
        a, b, whole = trials
        if not len(a.losses) == len(b.losses) == len(whole.losses):
            return [Effect.UNKNOWN] * len(whole.losses)
        return [classify((x, y), xy, self.rows) for x, y, xy in zip(a.losses, b.losses, whole.losses, strict=True)]

    def _moves(self, plans: dict[Unit, Plan], trials: _Trials, change: Change | None = None) -> dict[int, Effect]:
        """How assigned variables depend on the rows.

        An extreme must also be one with the rows reversed: the last row's value may be the largest by chance. A sum
        must also be one for other values of the variable: a part independent of rows may be a multiple of the variable,
        which may be zero.

        Args:
            trials: of the two parts and the whole.
            change: as of `Effects._try_rows`, for `trials` and further ones.
        """
        effects, (a, b, whole) = self._effects, trials
        found = effects._moves(a, b, whole, self.rows)
        found |= dict.fromkeys((a.moved.keys() | b.moved.keys() | whole.moved.keys()) - found.keys(), Effect.UNKNOWN)
        doubtful = [i for i, effect in found.items() if effect in (Effect.LARGEST, Effect.SMALLEST, Effect.UNKNOWN)]
        if doubtful:
            reverse = self._otherwise(plans, reverse=True, change=change)
            again = effects._moves(*reverse, self.rows) if reverse is not None else {}
            for i in doubtful:
                if again.get(i) is found[i] is not Effect.UNKNOWN:
                    continue
                parts = _without_rows(i, a, b, whole), _without_rows(i, *reverse) if reverse is not None else None
                found[i] = Effect.AFFINE if _are_equal(*parts) else Effect.UNKNOWN
        sums = [
            i
            for i, effect in found.items()
            if effect is Effect.SUM
            and id(effects._variables[i]) not in effects._metric_ids
            and effects._variables[i].dtype.startswith(("float", "bfloat"))
        ]
        if sums:
            shifted = self._otherwise(plans, shifted=sums, change=change)
            again = effects._moves(*shifted, self.rows) if shifted is not None else {}
            found |= {i: Effect.AFFINE for i in sums if again.get(i) is not Effect.SUM}
        return found

    def _dtype(self, i: int) -> torch.dtype:
        """The dtype of a variable."""
        return self._effects._variables[i].value.dtype

    def _is_faint(
        self, value: torch.Tensor, of: Callable[[Trial], torch.Tensor | None], dtype: torch.dtype | None = None
    ) -> bool:
        """Whether a value is so small that it consists of rounding errors, which say nothing about its rows.

        Args:
            value: of all rows.
            of: returns it from a trial.
            dtype: what it was computed in, if not in its own.
        """
        dtype = dtype or value.dtype
        if not dtype.is_floating_point or not value.numel():
            return False
        size = float(value.abs().max())
        if not 0.0 < size <= _FAINT * torch.finfo(dtype).eps:
            return False
        return size <= NOISE_FACTOR * self._noise(value, of)

    def _layouts(
        self,
        first: Sequence[torch.Tensor],
        second: Sequence[torch.Tensor],
        whole: Sequence[torch.Tensor],
        of: Callable[[Trial], Sequence[torch.Tensor]],
    ) -> list[Layout] | None:
        """How tensors depend on the rows; None if their number differs between the trials.

        `of` returns such tensors from a trial.
        """
        if not len(first) == len(second) == len(whole):
            return None
        return [
            layout_of((x, y), xy, self.rows, partial(self._noise, xy, partial(_entry, of, i)))
            for i, (x, y, xy) in enumerate(zip(first, second, whole, strict=True))
        ]

    def _noise(self, whole: torch.Tensor, of: Callable[[Trial], torch.Tensor | None]) -> float:
        """The size of rounding errors in a tensor: its change when all variables change in their last bits.

        `of` returns the tensor from a trial, None if it has none.
        """
        if not self.is_repeatable():  # the difference would come from draws, not from rounding
            return 0.0
        if self._noisy is None:
            self._noisy = self._run(self.arrays, 0, self.total, change=last_bits)
        found = of(self._noisy)
        if found is None or found.shape != whole.shape or not whole.numel():
            return 0.0
        return float((found.double() - whole.double()).abs().nan_to_num(0.0, 0.0, 0.0).max())

    def moved_on_by(self, writes: Writes) -> Place | None:
        """What makes a second pass, which begins with what the first one has written, another one; None if nothing."""
        writes.keeps = True
        try:
            self._run(self.arrays, 0, self.total)
            again = self._run(self.arrays, 0, self.total)
        finally:
            writes.keeps = False
            writes.take_back()
        if again.moved.keys() != self.whole.moved.keys() or not _same(again, self.whole):
            return writes.first()
        return writes.moved_on()

    def is_repeatable(self) -> bool:
        """Whether a second run on the same rows gives the same result: all draws can be shared by devices."""
        if self._repeats is None:
            again = self._run(self.arrays, 0, self.total)
            self._repeats = _same(again, self.whole)
        return self._repeats


def _same(one: Trial, other: Trial) -> bool:
    """Whether two trials of the same rows have given the same."""
    pairs = [*zip(one.outputs, other.outputs, strict=False), *zip(one.losses, other.losses, strict=False)]
    pairs += [(one.moved[i], value) for i, value in other.moved.items() if i in one.moved]
    return all(x.shape == y.shape and values_agree(x, y) for x, y in pairs)


def _entry(of: Callable[[Trial], Sequence[torch.Tensor]], i: int, trial: Trial) -> torch.Tensor | None:
    """One of several tensors of a trial."""
    found = of(trial)
    return found[i] if i < len(found) else None


def _loss(i: int) -> Callable[[Trial], torch.Tensor | None]:
    """A function that returns an `add_loss` term of a trial."""
    return partial(_entry, lambda trial: trial.losses, i)


def _move(i: int) -> Callable[[Trial], torch.Tensor | None]:
    """A function that returns the change of a variable in a trial."""
    return lambda trial: trial.moved.get(i)


def _is_finite(trials: _Trials, of: Callable[[Trial], torch.Tensor | None]) -> bool:
    """Whether a value is there, and finite, in all trials."""
    return all(value is not None and bool(torch.isfinite(value).all()) for value in map(of, trials))


def _replace(found: Any, places: Sequence[int], again: Mapping[int, Effect]) -> None:
    """Put effects that a further trial has shown in place of earlier ones; what is still zero shows nothing."""
    for i in places:
        if again.get(i, Effect.UNDECIDED) is not Effect.UNDECIDED:
            found[i] = again[i]


def _without_rows(i: int, a: Trial, b: Trial, whole: Trial) -> torch.Tensor | None:
    """A variable's change without any rows, assuming that it changes by this and a sum over rows."""
    if not (i in a.moved and i in b.moved and i in whole.moved):
        return None
    return a.moved[i] + b.moved[i] - whole.moved[i]


def _are_equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    scale = TOLERANCE * float(torch.maximum(one.abs().max(), other.abs().max()))
    return scale > 0.0 and bool(((one - other).abs() <= scale).all())
