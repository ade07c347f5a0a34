"""The train, test and predict steps of a Keras model on several devices: what Keras's loops call for each batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from fastdp.engine import DataParallel
from fastdp.program.capture import Captures
from fastdp.program.keras import KerasProgram
from fastdp.program.keras_batch import flatten_batch, unpack
from fastdp.program.keras_losses import own_copy
from fastdp.step import StepResult
from fastdp.transfer import count_rows


class Steps:
    """Steps of `template` with the compile settings of `trainer`: a parallel model's, or the template's own.

    Args:
        template: a built Keras model, or any Keras layer that is a trainer too.
        trainer: whose loss, metrics and optimizer apply.
        devices: where the replicas run.
        capture_mode: None, "trace" or "inductor"; see `fastdp.wrap`.
        sync_batch_norm: BatchNormalization over the global batch.
        template_state: a context manager factory that lends the template the trainer's settings; None where they
            are one model.
        engine_options: further arguments of `DataParallel`.
    """

    def __init__(
        self,
        template: Any,
        trainer: Any,
        devices: Sequence[Any],
        *,
        capture_mode: str | None = None,
        sync_batch_norm: bool = False,
        template_state: Any = None,
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        self.template = template
        self.trainer = trainer
        self.devices = list(devices)
        self._capture_mode = capture_mode
        self._sync_batch_norm = sync_batch_norm
        self._template_state = template_state
        self._engine_options = engine_options or {}
        self._engine: DataParallel | None = None

    @property
    def engine(self) -> DataParallel:
        """The engine, made for the model as it is compiled now: asked for where Keras's loops begin."""
        if self._engine is None or self._stale(self._engine.program):
            trainer = self.trainer
            if trainer.compiled and trainer.optimizer is not None and not trainer.optimizer.built:
                trainer.optimizer.build(self.template.trainable_variables)
            program = KerasProgram(
                self.template, trainer, sync_batch_norm=self._sync_batch_norm, template_state=self._template_state
            )
            if self._capture_mode is not None and trainer.compiled:
                program.captures = Captures(program, self._capture_mode, len(self.devices))
            self._engine = DataParallel(program, self.devices, **self._engine_options)
        return self._engine

    def forget_engine(self) -> None:
        """The model was compiled anew: the next step makes another engine."""
        self._engine = None

    @property
    def captures(self) -> Captures | None:
        """The captured steps of the present engine."""
        program: Any = self._engine.program if self._engine is not None else None
        return program.captures if program is not None else None

    def train(self, engine: DataParallel, data: Any) -> Any:
        """One training step; the logs."""
        arrays, structure = flatten_batch(unpack(data))
        count_rows(arrays, structure.names)
        program: Any = engine.program
        program.inspect(arrays, structure)
        if not program.trainable:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        if program.captures is not None:
            program.captures.prepare(arrays, structure, self._wants_outputs())
        result = engine.train(arrays, structure=structure, wants_outputs=self._wants_outputs())
        self._track_loss(result)
        x, y, sample_weight = structure.pack(arrays)
        y_pred = result.notes.structure.pack(result.outputs) if result.outputs else None
        return self.trainer.compute_metrics(x, y, y_pred, sample_weight=own_copy(sample_weight))

    def test(self, engine: DataParallel, data: Any) -> Any:
        """One test step; the logs."""
        x, y, sample_weight, y_pred, result = self._forward(engine, unpack(data))
        program: Any = engine.program
        added = map(keras.ops.convert_to_tensor, result.sums[: result.notes.terms])
        with _losses_of_step(self.template, [*added, *program.regularization()]):
            loss = self.trainer._compute_loss(x, y, y_pred, own_copy(sample_weight), training=False)
        self.trainer._loss_tracker.update_state(loss, sample_weight=result.rows)
        return self.trainer.compute_metrics(x, y, y_pred, sample_weight=own_copy(sample_weight))

    def predict(self, engine: DataParallel, data: Any) -> Any:
        """The merged outputs of one batch."""
        x, _, _ = unpack(data)
        return self._forward(engine, (x, None, None))[3]

    def _stale(self, program: Any) -> bool:
        """Whether the program was made for other variables than those that are trained now."""
        if not self.trainer.compiled or self.trainer.optimizer is None:
            return False
        trainable = self.template.trainable_variables
        slots = self.trainer.optimizer.variables
        return (
            program.optimizer is not self.trainer.optimizer
            or [id(v) for v in program.trainable] != [id(v) for v in trainable]
            or [id(v) for v in program.slot_variables] != [id(v) for v in slots]
        )

    @staticmethod
    def _forward(engine: DataParallel, data: Any) -> tuple[Any, Any, Any, Any, StepResult]:
        """Run the replicas forward; the batch as tensors, the merged outputs, the engine's result."""
        arrays, structure = flatten_batch(data)
        count_rows(arrays, structure.names)
        program: Any = engine.program
        program.inspect(arrays, structure)
        result = engine.predict(arrays, structure=structure)
        program.assign(result.sums, result.notes)
        return *structure.pack(arrays), result.notes.structure.pack(result.outputs), result

    def _track_loss(self, result: StepResult) -> None:
        """Update Keras's trackers of the loss and of its terms, as one device would."""
        loss, *terms = result.sums[: 1 + result.notes.terms].tolist()
        self.trainer._loss_tracker.update_state(loss, sample_weight=result.rows)
        compiled = self.trainer._compile_loss
        for metric, term in zip(compiled.metrics if compiled is not None else [], terms, strict=False):
            metric.update_state(term, sample_weight=result.rows)

    def _wants_outputs(self) -> bool:
        """Whether a training step's outputs are looked at: by metrics."""
        own = type(self.template).compute_metrics is not keras.Model.compute_metrics
        return own or self.trainer._compile_metrics is not None


@contextmanager
def _losses_of_step(template: Any, losses: list[Any]) -> Iterator[None]:
    """Let `template.losses` be these, also for a `compute_loss` of its own."""
    template._losses_override[:] = losses
    try:
        yield
    finally:
        template._losses_override.clear()
