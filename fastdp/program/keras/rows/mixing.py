"""Finds where the rows of a batch meet in a model, by trials on some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch

from fastdp.program.keras.rows.probe import Trial
from fastdp.program.keras.rows.trials import RowTrials, Verdict
from fastdp.program.keras.rows.units import Call, Plan, Unit
from fastdp.program.keras.rows.written import Place
from fastdp.tensors.row_effects import Effect, Layout

_MOST_PLANS = 50


class Tried(RowTrials):
    """The trials of a model, and the units in which its rows meet."""

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


def said_of(place: Place, model: Any) -> str:
    """The beginning of a sentence: who writes what."""
    if place.layer is not None:
        return f"{title(place.layer)} writes its attribute {place.name!r}"
    return f"{title(model)} changes `{place.name}`, which lies outside of its layers,"
