"""Remembers for later runs which form of a step was the fastest, so that they begin with it.

A decision is a small file in the user's cache folder. Its name is a hash of the model's structure, the shapes of the
batch, the devices, versions and the machine. It only says when a step is traced and whether it is compiled: the code
itself goes by the exact graph (`fastdp.capture.compile.kept_code`), so a wrong or foreign decision costs time, and
changes no result. A run that begins with a compiled step times it against the traced one all the same, and drops a
decision that no longer holds.
"""

from __future__ import annotations

import json
import time
from typing import Any

from fastdp.capture.compile import kept_code
from fastdp.capture.pure_step import PureFunction
from fastdp.capture.shapes import Shape
from fastdp.capture.speed_trial import Decision
from fastdp.comm.context import Context

FOLDER = "step-decisions"
MOST_NBYTES = 4096
FORMS = ("compiled", "traced", "eager")
# A form that needs no compiler is not timed against a compiled one again. So that decision has an end, and it takes two
# runs that agree: one alone may have been timed while the machine was busy, when compiled steps suffer most.
VALID_SECONDS = 14 * 24 * 3600.0
AGREEING_RUNS = 2


class Decisions:
    """The decisions about the steps of one model.

    Args:
        step: what is captured.
        setting: what else a decision depends on: the number of replicas, and what can be tried.

    Raises:
        ValueError: FASTDP_REMEMBER has a wrong value.
    """

    def __init__(self, step: PureFunction, *setting: object) -> None:
        self._step, self._setting = step, setting

    def begin(self, shape: Shape[Any], context: Context) -> None:
        """Find the decision about a new shape."""
        where = context.device.name if context.device is not None else ""
        key = self._step.structure(), self._step.shape_name(context), where, self._setting
        shape.key = kept_code.digest(key, kept_code.machine())
        shape.remembered = _read(kept_code.found(FOLDER, shape.key, MOST_NBYTES))

    def note(self, shape: Shape[Any]) -> None:
        """Keep the outcome of a shape's trial once it is over, or drop a decision that it contradicts."""
        if not shape.key:
            return
        trial = shape.trial
        if trial is None or not trial.is_over:
            return
        if shape.remembered is not None and shape.remembered.form != trial.chosen:
            self.drop(shape)
            return
        before = _content(kept_code.found(FOLDER, shape.key, MOST_NBYTES))
        agreeing = _runs(before) + 1 if before.get("form") == trial.chosen else 1
        content = {"form": trial.chosen, "why": trial.why[:500], "time": time.time(), "runs": agreeing}
        kept_code.put(FOLDER, shape.key, json.dumps(content).encode())
        shape.key = ""

    def drop(self, shape: Shape[Any]) -> None:
        """Drop the decision about a shape: another form was faster, or this one failed."""
        if shape.key:
            kept_code.drop(shape.key, FOLDER)
        shape.key = ""


def _read(content: bytes | None) -> Decision | None:
    """The decision in a file; None where it is none, too old, or of too few runs."""
    found = _content(content)
    if found.get("form") not in FORMS or not isinstance(found.get("time"), (int, float)):
        return None
    if found["form"] != "compiled" and not (
        _runs(found) >= AGREEING_RUNS and 0 <= time.time() - found["time"] <= VALID_SECONDS
    ):
        return None
    why = "".join(c if c.isprintable() else " " for c in str(found.get("why", "")))[:500]
    return Decision(found["form"], f"in an earlier run {why}" if why else "")


def _content(content: bytes | None) -> dict[str, Any]:
    """What a file holds; nothing where it is damaged."""
    try:
        found = json.loads(content or b"{}")
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return {}
    return found if isinstance(found, dict) else {}


def _runs(found: dict[str, Any]) -> int:
    """How many runs in a row came to this decision."""
    runs = found.get("runs")
    return runs if isinstance(runs, int) and runs > 0 else 0
