"""The train, test and predict steps of a Keras model on several devices: what Keras's loops call for each batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np
import torch

from fastdp.engine import DataParallel
from fastdp.keras.ahead import Ahead
from fastdp.keras.before_step import BeforeStep
from fastdp.keras.custom_steps import LayerCalls, has_own, layer_calls
from fastdp.program.capture import Captures
from fastdp.program.capture_record import Recorder
from fastdp.program.keras import KerasProgram
from fastdp.program.keras_batch import Structure, flatten_batch, unpack
from fastdp.program.keras_custom import CallProgram
from fastdp.program.keras_indices import IndicesNamed, rows_of
from fastdp.program.keras_losses import own_copy
from fastdp.program.torch_tensors import as_tensor
from fastdp.step import StepResult
from fastdp.step_scope import alone
from fastdp.transfer import ResidentArray, count_rows


class Steps:
    """Steps of `template` with the compile settings of `trainer`: a parallel model's, or the template's own.

    Args:
        template: a built Keras model, or any Keras layer that is a trainer too.
        trainer: whose loss, metrics and optimizer apply.
        devices: where the replicas run.
        capture_mode: None, "trace", "inductor" or "auto"; see `fastdp.wrap`.
        graphs: how captured steps are recorded as CUDA graphs, "bucket" or "step", or "" for not at all.
        sync_batch_norm: BatchNormalization over the global batch.
        template_state: a context manager factory that lends the template the trainer's settings; None where they
            are one model.
        engine_options: further arguments of `DataParallel`.
        strict: a step of the template's own in which nothing could be split is an error, not a warning.
    """

    def __init__(
        self,
        template: Any,
        trainer: Any,
        devices: Sequence[Any],
        *,
        capture_mode: str | None = None,
        graphs: str = "",
        sync_batch_norm: bool = False,
        template_state: Any = None,
        engine_options: dict[str, Any] | None = None,
        strict: bool = True,
    ) -> None:
        self.template = template
        self.trainer = trainer
        self.devices = list(devices)
        self._capture_mode = capture_mode
        self._graphs = graphs
        self._sync_batch_norm = sync_batch_norm
        self._template_state = template_state
        self._engine_options = engine_options or {}
        self._strict = strict
        self._engine: DataParallel | None = None
        self._calls: LayerCalls | None = None
        self._trains: list[bool] = []
        self._variables_known = False
        self._told_of_values = False
        # The batches of the present `fit`, where the next one is fetched while a step runs.
        self.ahead: Ahead | None = None

    @property
    def engine(self) -> DataParallel:
        """The engine, made for the model as it is compiled now: asked for where Keras's loops begin."""
        if self._engine is None or self._stale(self._engine.program):
            trainer = self.trainer
            if trainer.compiled and trainer.optimizer is not None and not trainer.optimizer.built:
                trainer.optimizer.build(self.template.trainable_variables)
            self.forget_engine()
            program = self._program()
            if self._capture_mode is not None and trainer.compiled and not has_own(self.template, "train_step"):
                parts = self._graphs == "step"
                recorder = Recorder(self.template.name, alone, parts=parts) if self._graphs else None
                program.captures = Captures(program, self._capture_mode, len(self.devices), recorder, alone)
            self._engine = DataParallel(program, self.devices, **self._engine_options)
            self._calls = LayerCalls(self._engine) if isinstance(program, CallProgram) else None
            self._trains, self._variables_known = self._trainability(program), False
        return self._engine

    @property
    def engine_within_loop(self) -> DataParallel:
        """The engine for the next batch: another where a callback has frozen weights, or changed the optimizer, since.

        Asked for at each batch, so it compares flags, and not the lists of variables that Keras would make of them.
        """
        if self._engine is None:
            return self.engine
        program: Any = self._engine.program
        optimizer = self.trainer.optimizer if self.trainer.compiled else None
        changed = program.optimizer is not optimizer or self._trainability(program) != self._trains
        return self.engine if changed else self._engine

    def _check_variables(self) -> None:
        """The optimizer was built for all that is trained: what was thawed since is Keras's error, once asked for."""
        if not self._variables_known:
            self.trainer.optimizer._check_variables_are_known(self.template.trainable_variables)
            self._variables_known = True

    def _trainability(self, program: Any) -> list[bool]:
        """The flags from which Keras tells the variables that are trained."""
        return [self.template.trainable, *[variable._trainable for variable in program.variables]]

    @property
    def made_engine(self) -> DataParallel | None:
        """The engine, if there is one by now."""
        return self._engine

    def forget_engine(self) -> None:
        """The model was compiled anew: the next step makes another engine, and what this one compiles is ended."""
        captures = self.captures
        if captures is not None:
            captures.close()
            captures.forget_graphs()
        self._engine = None

    def follow(self, epochs: Any) -> None:
        """Fetch the batches of this `fit` ahead; a template's own `train_step` takes them one by one."""
        if not has_own(self.template, "train_step"):
            self.ahead = Ahead(epochs)

    def end_following(self) -> None:
        """`fit` is over."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.end(self._engine)

    def settle(self) -> None:
        """Let the optimizer's own accumulators have the gradients of a cycle that is not over."""
        program: Any = self._engine.program if self._engine is not None else None
        if program is not None:
            program.accumulation.settle()

    def capture_by(self, mode: str | None) -> None:
        """Let the next engine capture steps by another mode."""
        self._capture_mode = mode

    @property
    def captures(self) -> Captures | None:
        """The captured steps of the present engine."""
        program: Any = self._engine.program if self._engine is not None else None
        return program.captures if program is not None else None

    def train(self, engine: DataParallel, data: Any) -> Any:
        """One training step; the logs."""
        if has_own(self.template, "train_step"):
            return self._own_step("train_step", data)
        ahead = self.ahead
        arrays, structure = flatten_batch(unpack(data)) if ahead is None else ahead.flat(data)
        count_rows(arrays, structure.names)
        program: Any = engine.program
        self._check_variables()
        program.inspect(arrays, structure)
        if not program.trainable:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        if program.captures is not None:
            program.captures.prepare(arrays, structure, self._wants_outputs())
        began = time.perf_counter()
        reduce = program.accumulation.reduces(engine)
        result = engine.train(
            arrays,
            structure=structure,
            wants_outputs=self._wants_outputs(),
            reduce=reduce,
            while_running=None if ahead is None else lambda: ahead.advance(engine),
        )
        program.accumulation.stepped()
        if program.captures is not None:
            program.captures.note(time.perf_counter() - began)
        self._track_loss(result)
        x = y = sample_weight = y_pred = None
        if result.outputs:  # otherwise nobody looks
            x, y, sample_weight = structure.pack(arrays, inputs=self._has_own_metrics())
            y_pred = result.notes.structure.pack(result.outputs)
        return self.trainer.compute_metrics(x, y, y_pred, sample_weight=own_copy(sample_weight))

    def test(self, engine: DataParallel, data: Any) -> Any:
        """One test step; the logs."""
        if has_own(self.template, "test_step"):
            return self._own_step("test_step", data)
        arrays, structure, y_pred, result = self._forward(engine, unpack(data))
        x, y, sample_weight = structure.pack(arrays, inputs=self._has_own_metrics() or self._has_own_loss())
        program: Any = engine.program
        added = map(keras.ops.convert_to_tensor, result.sums[: result.notes.terms])
        named = IndicesNamed(partial(self._loss_of_rows, (x, y, y_pred, sample_weight)), 0, result.rows)
        with _losses_of_step(self.template, [*added, *program.regularization()]), named:
            loss = self.trainer._compute_loss(x, y, y_pred, own_copy(sample_weight), training=False)
        self.trainer._loss_tracker.update_state(loss, sample_weight=result.rows)
        return self.trainer.compute_metrics(x, y, y_pred, sample_weight=own_copy(sample_weight))

    def _loss_of_rows(self, data: tuple[Any, ...], start: int, stop: int) -> None:
        """The loss of some rows, which counts nowhere."""
        x, y, y_pred, weights = keras.tree.map_structure(partial(rows_of, start=start, stop=stop), data)
        with keras.StatelessScope():
            self.trainer._compute_loss(x, y, y_pred, own_copy(weights), training=False)

    def predict(self, engine: DataParallel, data: Any) -> Any:
        """One prediction step; the merged outputs of one batch."""
        if has_own(self.template, "predict_step"):
            return self._own_step("predict_step", data)
        return self.outputs(engine, data)

    def outputs(self, engine: DataParallel, data: Any) -> Any:
        """The merged outputs of the model itself for one batch."""
        x, _, _ = unpack(data)
        return self._forward(engine, (x, None, None))[2]

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

    def _program(self) -> KerasProgram:
        """What the replicas run: whole steps, or single layers too where the template has steps of its own."""
        options = {"sync_batch_norm": self._sync_batch_norm, "template_state": self._template_state}
        if any(has_own(self.template, step) for step in ("train_step", "test_step", "predict_step")):
            own = has_own(self.template, "train_step")
            return CallProgram(self.template, self.trainer, own_train_step=own, **options)
        return KerasProgram(self.template, self.trainer, **options)

    def _own_step(self, name: str, data: Any) -> Any:
        """A step that the template has of its own, with the calls of its layers on all devices.

        Raises:
            ValueError: no call of a layer could be split, and `strict`. What the step has changed is taken back.
        """
        calls = self._calls
        assert calls is not None, "a template with a step of its own has a CallProgram"
        data = self._values(name, data)
        before = None
        calls.postponed = False
        with ExitStack() as stack:
            if self._template_state is not None:
                stack.enter_context(self._template_state())
            if self._strict and not (calls.count or calls.told):
                before = BeforeStep([self.template, self.trainer])
                stack.enter_context(before.watching())
            if name != "train_step":
                stack.enter_context(torch.no_grad())
            stack.enter_context(layer_calls(calls))
            logs = getattr(self.template, name)(data)
            if not (calls.count or calls.told or calls.postponed) and _has_rows(data):
                if before is not None:
                    before.restore()
                self._not_split(name, calls)
        return logs

    def _values(self, name: str, data: Any) -> Any:
        """A batch of a data set on the devices as tensors in host memory, since such a step works there."""
        if not any(isinstance(leaf, ResidentArray) for leaf in keras.tree.flatten(data)):
            return data
        if not self._told_of_values:
            self._told_of_values = True
            warnings.warn(
                f"fastdp: {name}() of the model {self.template.name!r} is its own and runs on the host, so it gets the "
                "batches of a DeviceDataset as arrays in host memory: nothing is gained over fit(x, y).",
                stacklevel=5,
            )
        return keras.tree.map_structure(lambda leaf: as_tensor(leaf) if isinstance(leaf, ResidentArray) else leaf, data)

    def _not_split(self, name: str, calls: LayerCalls) -> None:
        """Say that a step has run on one device: an error if `strict`, and a warning otherwise."""
        why = "; ".join(f"{layer}: {reason}" for layer, reason in calls.refused.items())
        message = (
            f"{name}() of the model {self.template.name!r} calls no layer of the model that can be split over devices"
            f"{' (' + why + ')' if why else ''}"
        )
        if self._strict:
            raise ValueError(
                f"{message}. Weights, optimizers, metrics and seeds are as before this batch. Let it call the model's "
                "layers on batches, or train the model itself on one device (model.fit)."
            )
        calls.told = True
        warnings.warn(
            f"fastdp: {message}, so it ran on one device. Let it call the model's layers on batches.", stacklevel=4
        )

    @staticmethod
    def _forward(engine: DataParallel, data: Any) -> tuple[Any, Structure, Any, StepResult]:
        """Run the replicas forward; the batch and its structure, the merged outputs, the engine's result."""
        arrays, structure = flatten_batch(data)
        count_rows(arrays, structure.names)
        program: Any = engine.program
        program.inspect(arrays, structure)
        result = engine.predict(arrays, structure=structure)
        program.assign(result.sums, result.notes)
        return arrays, structure, result.notes.structure.pack(result.outputs), result

    def _track_loss(self, result: StepResult) -> None:
        """Update Keras's trackers of the loss and of its terms, as one device would."""
        loss, *terms = result.sums[: 1 + result.notes.terms].tolist()
        _add_to_mean(self.trainer._loss_tracker, loss, result.rows)
        compiled = self.trainer._compile_loss
        for metric, term in zip(compiled.metrics if compiled is not None else [], terms, strict=False):
            _add_to_mean(metric, term, result.rows)

    def _wants_outputs(self) -> bool:
        """Whether a training step's outputs are looked at: by metrics."""
        return self._has_own_metrics() or self.trainer._compile_metrics is not None

    def _has_own_metrics(self) -> bool:
        """Whether the template has a `compute_metrics` of its own, which may look at `x`."""
        return type(self.template).compute_metrics is not keras.Model.compute_metrics

    def _has_own_loss(self) -> bool:
        """Whether the template has a `compute_loss` of its own, likewise."""
        return type(self.template).compute_loss is not keras.Model.compute_loss


def _add_to_mean(metric: Any, value: float, rows: int) -> None:
    """`metric.update_state(value, sample_weight=rows)`, for Keras's own mean of float32 without the calls around it."""
    if type(metric) is not keras.metrics.Mean or metric.dtype != "float32":
        metric.update_state(value, sample_weight=rows)
        return
    with torch.no_grad():
        metric.total.value.add_(float(np.float32(value) * np.float32(rows)))
        metric.count.value.add_(float(rows))


def _has_rows(data: Any) -> bool:
    """Whether a batch has two rows or more, which could have been split."""
    return any(len(getattr(leaf, "shape", ())) and leaf.shape[0] > 1 for leaf in keras.tree.flatten(data))


@contextmanager
def _losses_of_step(template: Any, losses: list[Any]) -> Iterator[None]:
    """Let `template.losses` be these, also for a `compute_loss` of its own."""
    template._losses_override[:] = losses
    try:
        yield
    finally:
        template._losses_override.clear()
