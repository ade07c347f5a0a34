"""Keras's standard train, test and predict steps on several devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.batch import Batch, ResidentArray
from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.step import StepResult
from fastdp.errors import ReplicaError
from fastdp.keras.fit.prefetch import Prefetch
from fastdp.keras.steps.call_checks import CauseOfRowErrors, check_is_undecided, why_not_here
from fastdp.keras.steps.custom import has_own, layer_calls
from fastdp.keras.steps.device_trial import first_rows
from fastdp.keras.steps.layer_calls import LayerCalls
from fastdp.keras.steps.mean_metrics import MeanMetrics
from fastdp.keras.steps.metric_code import are_kerass, each_metric
from fastdp.keras.steps.model_engine import ModelEngine
from fastdp.keras.steps.own_loops import ModelCalls, inside_step, say_once
from fastdp.keras.steps.rollback import StepRollback
from fastdp.program.keras.batch import make_batch, unpack
from fastdp.program.keras.indices import IndicesNamed, rows_of
from fastdp.program.keras.layer_calls import CallProgram
from fastdp.program.keras.loss.per_sample import own_copy
from fastdp.tensors.arrays import as_tensor
from fastdp.tensors.deterministic import deterministic_algorithms
from fastdp.tensors.row_effects import UndecidedError
from fastdp.warn import warn_user


def _deterministic_if_asked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of `Steps` use torch's deterministic algorithms where the options request it."""

    @functools.wraps(step)
    def run(self: Steps, engine: DataParallel[CallProgram], data: Any, *further: Any) -> Any:
        if not self._options.deterministic:
            return step(self, engine, data, *further)
        with deterministic_algorithms():
            return step(self, engine, data, *further)

    return run


class Steps(ModelEngine):
    """Steps of a model. Arguments as in `ModelEngine`.

    If nothing in a template's own step could be split, that is a warning where the caller falls back to plain Keras,
    and an error elsewhere.
    """

    _model_calls: ModelCalls | None = None
    _told_of_values = False
    trained_rows = 0  # rows of the training steps so far, for callbacks that tell samples per second
    _checked: tuple[Any, Batch] | None = None
    _prepared: Any = None  # what captured steps were last prepared for
    # The prefetched batches of the current `fit`; None where batches are not fetched ahead.
    ahead: Prefetch | None = None

    @functools.cached_property
    def _means(self) -> MeanMetrics:
        return MeanMetrics()

    def follow(self, epochs: Any) -> None:
        """Prefetch the batches of this `fit`, unless the template's own `train_step` takes them one by one."""
        if not has_own(self.template, "train_step"):
            self.ahead = Prefetch(epochs)

    def end_following(self) -> None:
        """Stop prefetching at the end of `fit`."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.end(self._engine)

    def check_batch(self, data: Any) -> None:
        """Check that the arrays of the next step's batch have the same number of rows.

        Raises:
            ValueError: as from `make_batch`.
        """
        self._checked = data, make_batch(unpack(data))

    def _batch(self, data: Any, ahead: Prefetch | None = None) -> Batch:
        """The data as a batch for the engine. Reuses the batch that was checked or prefetched for the same data."""
        checked, self._checked = self._checked, None
        if checked is not None and checked[0] is data:
            return checked[1]
        return make_batch(unpack(data)) if ahead is None else ahead.batch_of(data)

    def _check_variables(self) -> None:
        """Let Keras check, once per engine, that the optimizer was built for all variables that are trained now."""
        if not self._variables_known:
            self.trainer.optimizer._check_variables_are_known(self.template.trainable_variables)
            self._variables_known = True

    @property
    def calls_report(self) -> list[dict[str, Any]]:
        """How many calls of each layer were split in the template's own steps."""
        return self._calls.report if self._calls is not None else []

    def train(self, engine: DataParallel[CallProgram], data: Any) -> Any:
        """Run one training step; returns the logs."""
        logs = self.train_quietly(engine, data)
        return self.results() if logs is None else logs

    @_deterministic_if_asked
    def train_quietly(
        self, engine: DataParallel[CallProgram], data: Any, following: Any = None, unchanged: bool = False
    ) -> Any:
        """Run one training step; returns logs only where the template makes them itself. `results()` are the others.

        Args:
            engine, data: as for `train`.
            following: the next batch, if it is there already.
            unchanged: nothing but fastdp and Keras has run since the last step.
        """
        if has_own(self.template, "train_step"):
            logs = self._own_step("train_step", data)
            self.trained_rows += first_rows(data)
            return logs
        ahead = self.ahead
        batch = self._batch(data, ahead)
        self._check_variables()
        if not engine.program.trainable:
            warn_user("The model does not have any trainable weights.")
        if self._options.survives:
            result = engine.surviving(partial(self._trained, engine, batch, [ahead], following, unchanged))
        else:
            result = self._trained(engine, batch, [ahead], following, unchanged)
        self.trained_rows += batch.rows
        if result.skipped:  # as if the batch had not come
            return None
        return self._told_metrics(batch, result)

    def _trained(
        self, engine: DataParallel[CallProgram], batch: Batch, once: list[Any], following: Any, unchanged: bool
    ) -> StepResult:
        """Run a training step on the replicas that there are. `once` has what fetches ahead, for the first try."""
        program, ahead = engine.program, once.pop() if once else None
        program.inspect(batch)
        wants_outputs = self._wants_outputs()
        if program.captures is not None:
            prepared = (program.captures, batch.rows, batch.shapes, batch.structure, wants_outputs)
            if not (unchanged and prepared == self._prepared and all(s.is_settled for s in program.captures.present)):
                program.captures.prepare(batch, wants_outputs)
                self._prepared = prepared
        began = time.perf_counter()
        reduce = program.accumulation.reduces(engine)
        # Code that draws random numbers while it makes batches must run after the step's own draws.
        meanwhile = None if ahead is None or program.draws.moves else partial(ahead.advance, engine, following)
        with CauseOfRowErrors():
            try:
                result = engine.train(batch, wants_outputs=wants_outputs, reduce=reduce, while_running=meanwhile)
            except ReplicaError as error:  # nothing was changed yet
                check_is_undecided(error)
                program.inspect(batch, every_row=True)
                result = engine.train(batch, wants_outputs=wants_outputs, reduce=reduce)
        program.accumulation.stepped()
        program.leave_gradients(engine)
        if program.captures is not None:
            program.captures.note(time.perf_counter() - began)
        return result

    def _told_metrics(self, batch: Batch, result: StepResult) -> Any:
        """Update the metrics by a training step; returns logs only where the template makes them itself."""
        self._track_loss(result)
        if result.notes.added:
            self._leave_losses(result.sums[1 + result.notes.terms - result.notes.added : 1 + result.notes.terms])
        compiled = self.trainer._compile_metrics
        if compiled is None and not self._has_own_metrics():
            return None
        x = y = sample_weight = y_pred = None
        if result.notes.structure is not None:  # otherwise nothing reads the outputs
            x, y, sample_weight = batch.structure.pack(batch.arrays, inputs=self._has_own_metrics())
            y_pred = result.notes.structure.pack(result.outputs)
            y_pred, y = self._with_targets(y_pred, y)
        if self._has_own_metrics():
            return self.trainer.compute_metrics(x, y, y_pred, sample_weight=own_copy(sample_weight))
        compiled.update_state(y, y_pred, own_copy(sample_weight))
        return None

    def results(self) -> dict[str, Any]:
        """The present results of all metrics, as Keras's `get_metrics_result` gives them. Means are Python numbers."""
        if type(self.trainer).get_metrics_result is not keras.Model.get_metrics_result:
            return dict(self.trainer.get_metrics_result())
        found: dict[str, Any] = {}
        for metric in self.trainer.metrics:
            result = self._means.result(metric)
            found.update(result if isinstance(result, dict) else {metric.name: result})
        return found

    def needs_no_logs(self) -> bool:
        """Whether nobody can tell whether logs are made after each training step, if no callback reads them.

        A template's own methods and metrics may do anything when they are asked for results.
        """
        return not (
            has_own(self.template, "train_step")
            or self._has_own_metrics()
            or type(self.trainer).get_metrics_result is not keras.Model.get_metrics_result
            or any(not type(metric).__module__.startswith("keras.") for metric in each_metric(self.trainer.metrics))
        )

    def runs_no_other_code(self) -> bool:
        """Whether nothing but fastdp and Keras runs in a captured training step, and after it, on the host.

        That code might change what a step reads of Python.
        """
        program = self.made_engine.program if self.made_engine is not None else None
        return (
            program is not None
            and program.captures is not None
            and program.update_is_reliable
            and are_kerass(self.trainer._compile_metrics)
        )

    @_deterministic_if_asked
    def test(self, engine: DataParallel[CallProgram], data: Any) -> Any:
        """Run one test step; returns the logs."""
        if has_own(self.template, "test_step"):
            return self._own_step("test_step", data)
        batch = self._batch(data)
        y_pred, result = self._forward(engine, batch)
        looks = self._has_own_metrics() or self._has_own_loss()
        x, y, sample_weight = batch.structure.pack(batch.arrays, inputs=looks)
        y_pred, y = self._with_targets(y_pred, y)
        added = map(keras.ops.convert_to_tensor, result.sums[: result.notes.terms])
        named = IndicesNamed(partial(self._loss_of_rows, (x, y, y_pred, sample_weight)), 0, result.rows)
        with _losses_of_step(self.template, [*added, *engine.program.loss.regularization()]), named:
            loss = self.trainer._compute_loss(x, y, y_pred, own_copy(sample_weight), training=False)
        self.trainer._loss_tracker.update_state(loss, sample_weight=result.rows)
        return self.trainer.compute_metrics(x, y, y_pred, sample_weight=own_copy(sample_weight))

    def _loss_of_rows(self, data: tuple[Any, ...], start: int, stop: int) -> None:
        """Compute the loss of some rows without any effect on state."""
        x, y, y_pred, weights = keras.tree.map_structure(partial(rows_of, start=start, stop=stop), data)
        with keras.StatelessScope():
            self.trainer._compute_loss(x, y, y_pred, own_copy(weights), training=False)

    @_deterministic_if_asked
    def predict(self, engine: DataParallel[CallProgram], data: Any) -> Any:
        """Run one prediction step; returns the merged outputs of one batch."""
        if has_own(self.template, "predict_step"):
            return self._own_step("predict_step", data)
        return self.outputs(engine, data)

    @_deterministic_if_asked
    def outputs(self, engine: DataParallel[CallProgram], data: Any) -> Any:
        """The merged outputs of the model for one batch, ignoring a `predict_step` of its own."""
        x, _, _ = unpack(data)
        return self._forward(engine, make_batch((x, None, None)))[0]

    def merged_outputs(self, inputs: Any) -> Any:
        """The model's outputs for a call from the script that needs no gradient."""
        engine = self.engine_for_calls
        engine.program.doubt()
        return self.outputs(engine, (inputs, None, None))

    def call(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one call of the model from the script. The merged outputs have a gradient where plain Keras's do."""
        reason = why_not_here()
        if reason is not None:
            say_once(self.template, reason)
            with inside_step():
                return original(self.template, *args, **kwargs)
        engine = self.engine_for_calls
        if self._model_calls is None or self._model_calls.engine is not engine:
            self._model_calls = ModelCalls(engine)
        return self._model_calls.run(self.template, original, args, kwargs)

    def _own_step(self, name: str, data: Any) -> Any:
        """Run a step that the template overrides, with the calls of its layers on all devices.

        Raises:
            ValueError: no call of a layer could be split, and the caller does not fall back to plain Keras. The step's
                changes are rolled back.
        """
        calls = self._calls
        assert calls is not None, "a template with a step of its own has a CallProgram"
        data = self._values(name, data)
        before = None
        calls.postponed = False
        with ExitStack() as stack:
            if self._template_state is not None:
                stack.enter_context(self._template_state())
            if not (self._falls_back or calls.count or calls.told):
                before = StepRollback([self.template, self.trainer])
                stack.enter_context(before.watching())
            if name != "train_step":
                stack.enter_context(torch.no_grad())
            stack.enter_context(inside_step())
            stack.enter_context(layer_calls(calls))
            logs = getattr(self.template, name)(data)
            if calls.has_others and not (calls.count or calls.told or calls.postponed) and _has_rows(data):
                if before is not None:
                    before.restore()
                self._not_split(name, calls)
        return logs

    def _values(self, name: str, data: Any) -> Any:
        """The data with device-resident arrays as tensors in host memory, where a model's own step works."""
        if not any(isinstance(leaf, ResidentArray) for leaf in keras.tree.flatten(data)):
            return data
        if not self._told_of_values:
            self._told_of_values = True
            warn_user(
                f"fastdp: the model {self.template.name!r} has its own {name}(), which runs on the host and gets the "
                "batches of a DeviceDataset as arrays in host memory, so it is no faster than with fit(x, y)."
            )
        return keras.tree.map_structure(lambda leaf: as_tensor(leaf) if isinstance(leaf, ResidentArray) else leaf, data)

    def _not_split(self, name: str, calls: LayerCalls) -> None:
        """Report that a step ran on one device: a warning where the caller falls back to plain Keras, else an error."""
        why = "; ".join(f"{layer}: {reason}" for layer, reason in calls.refused.items())
        message = (
            f"{name}() of the model {self.template.name!r} calls no layer of the model that can be split over devices"
            f"{' (' + why + ')' if why else ''}"
        )
        if not self._falls_back:
            raise ValueError(
                f"{message}. Weights, optimizers, metrics and seeds are as before this batch. Let it call the model's "
                "layers on batches, or train the model itself on one device (model.fit)."
            )
        calls.told = True
        warn_user(f"fastdp: {message}, so it ran on one device. Let it call the model's layers on batches.")

    def _forward(self, engine: DataParallel[CallProgram], batch: Batch) -> tuple[Any, StepResult]:
        """Run the replicas forward; returns the merged outputs and the engine's result."""
        program = engine.program
        program.inspect(batch, training=False)
        with CauseOfRowErrors():
            try:
                result = engine.predict(batch)
                program.assign(result.sums, result.notes, result.every_note)
            except (ReplicaError, UndecidedError) as error:  # nothing was changed yet
                check_is_undecided(error)
                program.inspect(batch, training=False, every_row=True)
                result = engine.predict(batch)
                program.assign(result.sums, result.notes, result.every_note)
        self._leave_losses(result.sums[: result.notes.terms])
        return result.notes.structure.pack(result.outputs), result

    def _track_loss(self, result: StepResult) -> None:
        """Update Keras's trackers of the loss and its terms as one device would."""
        loss, *terms = result.sums[: 1 + result.notes.terms].tolist()
        self._means.add(self.trainer._loss_tracker, loss, result.rows)
        compiled = self.trainer._compile_loss if terms else None
        for metric, term in zip(compiled.metrics if compiled is not None else [], terms, strict=False):
            self._means.add(metric, term, result.rows)

    def _leave_losses(self, values: np.ndarray) -> None:
        """Put the `add_loss` terms of this step into `model.losses`, where callbacks find them in plain Keras too."""
        if values.size:
            self.template._clear_losses()
            for value in values.tolist():
                keras.Layer.add_loss(self.template, keras.ops.convert_to_tensor(value))

    def _wants_outputs(self) -> bool:
        """Whether metrics read a training step's outputs."""
        return self._has_own_metrics() or self.trainer._compile_metrics is not None

    def _has_own_metrics(self) -> bool:
        """Whether the template overrides `compute_metrics`, which may then read `x`."""
        return type(self.template).compute_metrics is not keras.Model.compute_metrics

    def _has_own_loss(self) -> bool:
        """Whether the template overrides `compute_loss`, which may then read `x`."""
        return type(self.template).compute_loss is not keras.Model.compute_loss


def _has_rows(data: Any) -> bool:
    """Whether a batch has two rows or more, which could have been split."""
    return any(len(getattr(leaf, "shape", ())) and leaf.shape[0] > 1 for leaf in keras.tree.flatten(data))


@contextmanager
def _losses_of_step(template: keras.Model, losses: list[Any]) -> Iterator[None]:
    """Make `template.losses` these values, also for a `compute_loss` of its own."""
    template._losses_override[:] = losses
    try:
        yield
    finally:
        template._losses_override.clear()
