"""Finds where the rows of a batch meet in a model, by trials on some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import torch

from fastdp.program.keras.batch import Structure
from fastdp.program.keras.plain_outputs import check_same
from fastdp.program.keras.rows.effects import TOLERANCE, Effect, Layout, classify, layout_of, values_agree
from fastdp.program.keras.rows.probe import Effects, Trial, seed_generators
from fastdp.program.keras.rows.units import Call, Plan, Recorder, Unit

# Effects by which values without a row axis can be combined from the replicas' values.
_OF_OUTPUTS = (Effect.MEAN, Effect.SUM)
_OF_LOSSES = (Effect.MEAN, Effect.SUM, Effect.SAME, Effect.UNDECIDED)
_OF_VARIABLES = (*_OF_LOSSES, Effect.LARGEST, Effect.SMALLEST)
_MOST_PLANS = 50
_LAST_BITS = 5e-7
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


class Tried:
    """The results of a model on some rows: on all of them, and on two parts.

    Args:
        effects: runs the model.
        arrays: the rows.
        structure: the structure of `arrays`.
        cut: the first row of the second part.
    """

    def __init__(self, effects: Effects, arrays: Sequence[np.ndarray], structure: Structure, cut: int) -> None:
        self._effects, self._arrays, self._structure, self._cut = effects, arrays, structure, cut
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
        return self._effects._try_rows(arrays, self._structure, start, stop, **options)

    def _parts(self, plans: dict[Unit, Plan]) -> tuple[Trial, Trial]:
        """The trials of the two parts."""
        return self._part(0, self._cut, plans), self._part(self._cut, self.total, plans)

    def _part(self, start: int, stop: int, plans: dict[Unit, Plan]) -> Trial:
        """The trial of a part. With plans a unit may fail: only one of its two values may have all rows."""
        recorder = Recorder(plans, self.whole.calls)
        try:
            return self._run(self._arrays, start, stop, recorder=recorder)
        except FAILURES:
            failed = recorder.failed
            if not plans or failed is None:
                raise
            return Trial([], {}, [], {**recorder.calls, failed.unit: failed}, recorder.losses, failed.unit)

    def _otherwise(self, plans: dict[Unit, Plan], shifted: Sequence[int] = ()) -> tuple[Trial, Trial, Trial] | None:
        """Trials of the parts and the whole with the rows reversed, or with other values of some variables.

        Returns None if the model fails on these.
        """
        arrays = self._arrays if shifted else [array[::-1].copy() for array in self._arrays]
        try:
            whole = self._run(arrays, 0, self.total, shifted=shifted)
            a, b = (
                self._run(arrays, start, stop, recorder=Recorder(plans, whole.calls), shifted=shifted)
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
        losses = [Effect.UNKNOWN] * len(whole.losses)
        if len(a.losses) == len(b.losses) == len(whole.losses):
            pairs = zip(a.losses, b.losses, whole.losses, strict=True)
            losses = [classify((x, y), xy, self.rows) for x, y, xy in pairs]
        verdict = Verdict(layouts, losses, self._moves(plans))
        verdict.outputs = [
            i
            for i, layout in enumerate(layouts)
            if not (layout.is_local or (layout.effect in _OF_OUTPUTS and not whole.outputs[i].ndim))
        ]
        verdict.terms = [i for i, effect in enumerate(losses) if effect not in _OF_LOSSES]
        verdict.variables = [i for i, effect in verdict.moves.items() if effect not in _OF_VARIABLES]
        return verdict

    def _moves(self, plans: dict[Unit, Plan]) -> dict[int, Effect]:
        """How assigned variables depend on the rows.

        An extreme must also be one with the rows reversed: the last row's value may be the largest by chance. A sum
        must also be one for other values of the variable: a part independent of rows may be a multiple of the variable,
        which may be zero.
        """
        effects, (a, b), whole = self._effects, self.parts, self.whole
        found = effects._moves(a, b, whole, self.rows)
        found |= dict.fromkeys((a.moved.keys() | b.moved.keys() | whole.moved.keys()) - found.keys(), Effect.UNKNOWN)
        doubtful = [i for i, effect in found.items() if effect in (Effect.LARGEST, Effect.SMALLEST, Effect.UNKNOWN)]
        if doubtful:
            reverse = self._otherwise(plans)
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
            shifted = self._otherwise(plans, sums)
            again = effects._moves(*shifted, self.rows) if shifted is not None else {}
            found |= {i: Effect.AFFINE for i in sums if again.get(i) is not Effect.SUM}
        return found

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
            layout_of((x, y), xy, self.rows, partial(self._noise, i, xy, of))
            for i, (x, y, xy) in enumerate(zip(first, second, whole, strict=True))
        ]

    def _noise(self, i: int, whole: torch.Tensor, of: Callable[[Trial], Sequence[torch.Tensor]]) -> float:
        """The size of rounding errors in a tensor: its change when all variables change in their last bits."""
        if not self.is_repeatable():  # the difference would come from draws, not from rounding
            return 0.0
        if self._noisy is None:
            self._noisy = self._run(self._arrays, 0, self.total, jitter=_LAST_BITS)
        found = of(self._noisy)
        if i >= len(found) or found[i].shape != whole.shape or not whole.numel():
            return 0.0
        return float((found[i].double() - whole.double()).abs().nan_to_num(0.0, 0.0, 0.0).max())

    def is_repeatable(self) -> bool:
        """Whether a second run on the same rows gives the same result: all draws can be shared by devices."""
        if self._repeats is None:
            again = self._run(self._arrays, 0, self.total)
            pairs = [
                *zip(again.outputs, self.whole.outputs, strict=False),
                *zip(again.losses, self.whole.losses, strict=False),
            ]
            pairs += [(again.moved[i], value) for i, value in self.whole.moved.items() if i in again.moved]
            self._repeats = all(x.shape == y.shape and values_agree(x, y) for x, y in pairs)
        return self._repeats

    # Finding the units.

    def merged(self, verdict: Verdict) -> tuple[dict[Unit, Plan], list[Call], Verdict | None]:
        """Plans that make the verdict good, the units that mix rows, and the new verdict.

        Returns no plans and no verdict if no plans help. If the model itself mixes rows, no smaller unit can be merged.
        """
        plans: dict[Unit, Plan] = {}
        culprits: list[Call] = []
        while len(plans) < _MOST_PLANS:
            if verdict.is_well:
                return plans, culprits, verdict
            call = self._culprit(verdict, plans)
            if call is None:
                break
            culprits.append(call)
            plan = self._plan(call)
            if plan is None or call.operation is self._effects._model:
                break
            plans[call.unit] = plan
            verdict = self.verdict(plans)
        return {}, culprits, None

    def _culprit(self, verdict: Verdict, plans: dict[Unit, Plan]) -> Call | None:
        """The innermost unit that gets rows and mixes them. Units found by their losses and variables come first."""
        terms, written = set(verdict.terms), set(verdict.variables)
        others = [call for unit, call in self.whole.calls.items() if unit not in plans]
        given = [call for call in others if self._all_local(call, "given")]
        failed = next((part.failed for part in self.parts if part.failed is not None), None)
        for call in given:
            if call.unit == failed:
                return call
        for call in given:
            if call.losses & terms or call.written & written:
                return call
        planned = [self.whole.calls[unit] for unit in plans]
        if not all(self._all_local(call, "made") for call in planned):
            # A unit that has all rows and still differs reads a variable that differs between replicas.
            differ = {i for i, effect in verdict.moves.items() if effect is not Effect.SAME}
            writer = next((call for call in given if call.written & differ), None)
            if writer is not None:
                return writer
        return next((call for call in given if not self._all_local(call, "made")), None)

    def _all_local(self, call: Call, what: str) -> bool:
        """Whether replicas hold the same numbers of a unit's tensors as one device. False if a trial lacks the unit."""
        layouts = self._of_call(call, what)
        return layouts is not None and all(layout.is_local for layout in layouts)

    def _of_call(self, call: Call, what: str, parts: Sequence[Trial] = ()) -> list[Layout] | None:
        a, b = (part.calls.get(call.unit) for part in parts or self.parts)
        if a is None or b is None:
            return None

        def of(trial: Trial) -> Sequence[torch.Tensor]:
            noisy = trial.calls.get(call.unit)
            return getattr(noisy, what) if noisy is not None else ()

        return self._layouts(getattr(a, what), getattr(b, what), getattr(call, what), of)

    def _plan(self, call: Call) -> Plan | None:
        """The plan to run the unit on merged inputs; None if the trials differ in its tensors."""
        # A merged unit computes all rows, so its outputs lie as in the trials where each part was a whole batch.
        given, made = self._of_call(call, "given"), self._of_call(call, "made", self._apart)
        if given is None or made is None:
            return None
        return Plan(call.operation, title(call.operation), tuple(given), tuple(made))

    # Messages.

    def shapes(self, i: int) -> str:
        """A sentence about an output's shapes."""
        shapes = [tuple(trial.outputs[i].shape) for trial in (self._apart[0], self.whole)]
        name = self._effects._model.name
        return (
            f"Output {i} of the model {name!r} has shape {shapes[0]} for {_rows(self.rows[0])} and {shapes[1]} for "
            f"{_rows(self.total)}, so it cannot be merged from devices that each have only some of the rows."
        )

    def story(self, verdict: Verdict, culprits: Sequence[Call]) -> str:
        """A sentence that says what mixes rows, and how that shows."""
        model = self._effects._model
        for i in verdict.terms:
            layer = self.whole.layers[i] if i < len(self.whole.layers) else model
            in_call = any(i in call.losses for call in self.whole.calls.values())
            return (
                f"The {'add_loss() term' if in_call else 'activity regularizer'} of {title(layer)} is "
                f"{verdict.losses[i].value}, so its value on the whole batch cannot be combined from the devices' "
                "rows."
            )
        for i in verdict.variables:
            who = next((c for c in self.whole.calls.values() if i in c.written), None)
            return (
                f"{capital(title(who.operation if who else model))} assigns the variable {self._effects.path(i)} in "
                f"its forward pass, and the value is {verdict.moves[i].value}, so it cannot be combined from the "
                "devices' rows."
            )
        names = ", ".join(dict.fromkeys(title(call.operation) for call in culprits)) or title(model)
        return (
            f"{capital(names)} mixes the rows of the batch: its output for a row depends on other rows, and each "
            "device has only its own."
        )


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


def title(operation: Any) -> str:
    """A unit's name in messages."""
    kind = (
        "model"
        if isinstance(operation, keras.Model)
        else "layer"
        if isinstance(operation, keras.Layer)
        else "operation"
    )
    return f"the {kind} {operation.name!r} ({type(operation).__name__})"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _rows(count: int) -> str:
    return "one row of the batch" if count == 1 else f"{count} rows"
