"""What callbacks know of the model that they watch: its template, its report and the rows that it has trained on."""

from __future__ import annotations

from typing import Any

import keras

from fastdp.engine.make_report import make_report
from fastdp.engine.report import Report
from fastdp.keras.install import made_steps
from fastdp.keras.parallel_model import ParallelModel
from fastdp.keras.steps.custom import has_own
from fastdp.keras.steps.standard import Steps
from fastdp.tensors.arrays import peak_nbytes


class Watched:
    """A model that trains: a parallel one, a plain one under `fastdp.install`, or a plain one.

    Args:
        model: the model that Keras gives to callbacks.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.template: keras.Model = model.template if isinstance(model, ParallelModel) else model
        self._epoch_rows = 0.0
        self._before = 0.0

    @property
    def _steps(self) -> Steps | None:
        """The steps that fastdp runs for it."""
        return self._model._steps if isinstance(self._model, ParallelModel) else made_steps(self._model)

    def report(self) -> Report | None:
        """The report of its engine; None before it has one."""
        steps = self._steps
        engine = steps.made_engine if steps is not None else None
        if engine is None:
            return None
        if isinstance(self._model, ParallelModel):
            return self._model.report()
        return make_report(engine, engine.program.steps_report, library_nbytes=peak_nbytes)

    def begin_epoch(self) -> None:
        """Rows are counted from here on."""
        steps = self._steps
        self._before = float(steps.trained_rows) if steps is not None else 0.0

    @property
    def epoch_rows(self) -> float | None:
        """The rows of this epoch so far; None if nobody counts them.

        fastdp's steps count them. Plain Keras does by its tracker of the loss, unless the model has its own train_step.
        """
        steps = self._steps
        split = float(steps.trained_rows) - self._before if steps is not None else 0.0
        if split > 0:
            return split
        tracker: Any = getattr(self._model, "_loss_tracker", None)
        if tracker is None or has_own(self.template, "train_step"):
            return None
        return float(keras.ops.convert_to_numpy(tracker.count))
