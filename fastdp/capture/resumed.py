"""Captured steps that go on from a checkpoint in the form that they had.

Steps that run eagerly, traced or compiled round differently. A run that begins anew takes the first step of each shape
eagerly, and compares the next ones with eager steps; one that goes on must not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastdp.capture import product_times
from fastdp.capture.shapes import CapturedT, Shape
from fastdp.capture.speed_trial import SpeedTrial
from fastdp.capture.steps import Captures
from fastdp.comm.context import Context
from fastdp.errors import OthersBusyError

_KEPT = ("steps", "seconds", "recent")


class ResumedCaptures(Captures[CapturedT]):
    """Captured steps with a state for checkpoints.

    Args:
        shape_name: names a replica's shapes in the same way in each process.

    Other arguments as of `Captures`.
    """

    def __init__(self, *arguments: Any, shape_name: Callable[[Context], str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shape_name = shape_name
        self._saved: dict[str, Mapping[str, Any]] = {}  # the states of shapes in the run that goes on, by name

    def state_dict(self) -> dict[str, Any]:
        """How the next step of each shape will run, as plain values. Called between steps."""
        if not self._refused:
            self._look_for_changes()
            self._look_for_disagreement()
            self._collect()
        found = "" if self._step.why_never() or self._own_code() else self._refused
        shapes = [state_of(shape) for shape in self._shapes.values()]
        known = {"refused": found, "changes": self._changes, "products": product_times.state_dict()}
        return {"mode": self._mode, "shapes": shapes, **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next step of each shape run as it would have where `state_dict` was called."""
        self.close("")
        self._shapes.clear()
        self._saved = {}
        if state["mode"] == self._mode:
            self._refused, self._changes = self._refused or state["refused"], state["changes"]
            self._saved = {shape["name"]: shape for shape in state["shapes"]}
            product_times.load_state_dict(state.get("products", {}))  # earlier versions have not written it

    def _begin(self, shape: Shape[CapturedT], context: Context) -> None:
        """Give a new shape the form that it had in the run that goes on. If that fails, it begins anew."""
        shape.name = self._shape_name(context)
        state = self._saved.pop(shape.name, None)
        if state is None:
            return
        if not state["captured"]:
            _take(shape, state)
            return
        try:
            self._trace(shape, context, refuses=False)
        except OthersBusyError:  # the next step begins with the shape anew
            self._saved[shape.name] = state
            self._shapes = {key: one for key, one in self._shapes.items() if one is not shape}
            raise
        captured = shape.captured
        if captured is None:
            return
        _take(shape, state)
        if state["form"] == "compiled" and not self._no_compiler:
            self._submit(shape, captured, context.rows)
            self.wait()
            if state["ended"] and shape.trial is not None:
                shape.trial.end()
        elif state["ended"]:
            shape.trial = SpeedTrial.ended(captured, state["form"])
        captured.checks = state["checks"]

    def _may_compile(self, shape: Shape[CapturedT]) -> bool:
        """Whether it is time to compile, and no trial of the run that goes on has chosen another form."""
        return shape.trial is None and super()._may_compile(shape)


def state_of(shape: Shape[Any]) -> dict[str, Any]:
    """What is known of a shape, as plain values: its name, how long it has trained, and the form of its next step.

    `form` is "eager" for a shape that is not captured; `ended` says that a trial of speed has chosen the form.
    """
    captured, trial = shape.captured, shape.trial
    form = "eager" if captured is None else "compiled" if shape.compiled else "traced"
    state: dict[str, Any] = {name: getattr(shape, name) for name in _KEPT}
    state |= {"name": shape.name, "captured": captured is not None, "form": form, "ended": False}
    state["checks"] = captured.checks if captured is not None else 0
    if trial is not None and trial.is_over:
        state |= {"form": trial.chosen, "ended": True}
    return state


def _take(shape: Shape[Any], state: Mapping[str, Any]) -> None:
    """Let a shape have trained for as long as its state tells."""
    for name in _KEPT:
        value = state[name]
        setattr(shape, name, list(value) if isinstance(value, list) else value)
