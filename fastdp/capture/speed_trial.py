"""Times some steps in each form that they may have (compiled, traced, eager), and keeps the fastest."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from fastdp.capture.captured_form import CapturedForm

STEPS = 10  # of each kind


@dataclass(frozen=True, slots=True)
class Decision:
    """The fastest form of a step in an earlier run, and why it was not the compiled one."""

    form: str
    why: str = ""


class SpeedTrial:
    """Lets a captured step run compiled, then traced, then perhaps eagerly, and keeps the fastest.

    Compiling has ended before the trial: step times measured while it runs beside the training say little.

    Args:
        captured: a traced step or pass.
        compiled: the compiled form (`CapturedForm.checked`), used from now on; None if there is none.
        eager: whether to try eager steps too.

    After the trial `chosen` is the form that stays, and `why` says why it is not the first one; else it is empty.
    During the trial `why` says that it goes on.
    """

    def __init__(self, captured: CapturedForm, compiled: Any | None, *, eager: bool = False) -> None:
        self._captured, self._compiled = captured, compiled
        self._forms = [*(["compiled"] if compiled is not None else []), "traced", *(["eager"] if eager else [])]
        self._seconds: list[float] = []
        self.why = f"being timed: {', '.join(self._forms)}"
        self.chosen = self._forms[0]
        self._take(self.chosen)

    @classmethod
    def ended(cls, captured: CapturedForm, chosen: str) -> SpeedTrial:
        """A trial that has chosen a form in another process: not the compiled one."""
        trial = cls(captured, None, eager=True)
        trial.chosen = chosen
        trial.end()
        return trial

    def end(self) -> None:
        """Let the present form stay."""
        self._forms, self._seconds, self.why = [], [], ""
        self._take(self.chosen)

    @property
    def is_over(self) -> bool:
        """Whether a form has been chosen."""
        return len(self._seconds) == len(self._forms) * STEPS

    def note(self, seconds: float) -> None:
        """Add the duration of a step."""
        if self.is_over:
            return
        self._seconds.append(seconds)
        tried, rest = divmod(len(self._seconds), STEPS)
        if not rest:
            self._take(self._forms[tried] if tried < len(self._forms) else self._fastest())

    def _take(self, form: str) -> None:
        """Let the coming steps have a form."""
        self._captured.runs_eagerly = form == "eager"
        if form == "compiled":
            assert self._compiled is not None
            self._captured.use(self._compiled)
        elif form == "traced":
            self._captured.use_traced()

    def _fastest(self) -> str:
        """The form whose steps took the least time."""
        medians = {
            form: statistics.median(self._seconds[i * STEPS : (i + 1) * STEPS]) for i, form in enumerate(self._forms)
        }
        self.chosen, self.why = min(medians, key=medians.__getitem__), ""
        if self.chosen != self._forms[0]:
            first, *others = (f"{1e3 * seconds:.2f} {form}" for form, seconds in medians.items())
            self.why = f"a step takes {first.replace(' ', ' ms ', 1)} and {' and '.join(others)}"
        return self.chosen
