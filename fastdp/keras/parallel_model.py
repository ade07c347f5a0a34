"""`ParallelModel`: a Keras model whose training, test and predict steps run on all devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import keras
from keras.src.utils import io_utils

from fastdp.comm.processes import leads
from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.make_report import SmallWorkWarning, make_report
from fastdp.engine.report import Report
from fastdp.keras.checks import check_augment, check_loop, check_options, check_template
from fastdp.keras.compile_state import borrowed, follow, take_over
from fastdp.keras.fit.arguments import arguments_by_name, stream_fit, stream_forward
from fastdp.keras.fit.callbacks import at_once, close_files, quiet_elsewhere
from fastdp.keras.fit.device_dataset import as_fed, resident_batch, resident_fit, resident_forward
from fastdp.keras.fit.executions import (
    Executions,
    joined,
    looks_at_batches,
    one_batch_at_a_time,
    several_steps,
    stages_built,
)
from fastdp.keras.fit.feeding import Feeds, feed_here, feeding, input_report
from fastdp.keras.membership import Membership
from fastdp.keras.steps.call_checks import is_hooked, why_not_here
from fastdp.keras.steps.custom import check_own_step
from fastdp.keras.steps.own_loops import calls_model, is_plain_call, wants_gradient, within_step
from fastdp.keras.steps.standard import Steps
from fastdp.keras.template_view import TemplateView, merged_outputs
from fastdp.options import Options
from fastdp.program.keras.augmented import prepared_call
from fastdp.program.keras.layer_calls import CallProgram
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.program import KerasProgram
from fastdp.runtime.forks import LongLock
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.arrays import peak_nbytes
from fastdp.tracing.trace import Traceable
from fastdp.warn import warn_user


@keras.saving.register_keras_serializable(package="fastdp")
class ParallelModel(Traceable, Membership, TemplateView):
    """The template, trained and run on several devices. Made by `fastdp.wrap` and `multi_gpu_model`.

    Keras's own `fit`, `evaluate` and `predict` loops, data adapters and callbacks run on the host; the engine runs
    each train, test and predict step. Weights, optimizer state and files are the template's: the two models share
    every variable.

    Args:
        template: a built Keras model.
        devices: where the replicas run; their order is the order of the rows.
        options: the chosen options, documented in `fastdp.wrap`.
        device_groups: all devices of each replica, where replicas span several; `devices` has the first of each.
        numbers_all_outputs: whether the first of several outputs with one name gets a number too, as in Keras 2.

    Attributes:
        fetch_ahead: whether `fit` fetches the next batch of an epoch, and sends its rows to the devices, while a step
            runs. True on GPUs. Set it to False for a data set that reads the model's weights itself: during a step it
            may see old or new ones.
        prefetch: how many batches a thread reads ahead in `fit`, `evaluate` and `predict`, never beyond an epoch. None,
            the default: two, where making a batch takes two milliseconds or more. 0 reads none ahead. Data whose
            results would change are not read ahead, and `report().inputs` says why.
    """

    def __init__(
        self,
        template: keras.Model,
        devices: Sequence[QueueDevice],
        options: Options,
        *,
        device_groups: Sequence[Sequence[QueueDevice]] | None = None,
        numbers_all_outputs: bool = False,
    ) -> None:
        check_template(template)
        check_options(options, devices)
        if options.augment is not None:
            check_augment(template, spans_devices=device_groups is not None)
        quiet_elsewhere()
        super().__init__(name=f"{template.name}_parallel", dtype=template.dtype_policy)
        self.template = template
        self._merge_layer = merged_outputs()
        self.numbers_all_outputs = numbers_all_outputs
        self.cpu_merge = options.cpu_merge
        self.cpu_relocation = options.cpu_relocation
        self._options = options
        self._steps = Steps(
            template,
            self,
            devices,
            options,
            template_state=lambda: borrowed(template, self),
            device_groups=device_groups,
        )
        self._augmented = self._steps.augmented
        self._fitting = LongLock()
        self._begins_fit = self._in_fit = False
        self._latest_fit = SimpleNamespace(inputs=[])  # an object of its own, whose lists Keras does not track
        self._looked_at = True
        self._executions = Executions(None, looked_at=True)
        self.fetch_ahead = any(device.on_gpu for device in devices)
        self.prefetch: int | None = None
        self._small_work = SmallWorkWarning()
        self._call_has_training_arg = True
        self._compute_loss_has_training_arg = True
        self.built = True

    # Compiling.

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configure training; arguments as in Keras.

        `jit_compile=True` compiles steps, and False runs them eagerly; "auto" follows the argument `compile` of
        `fastdp.wrap`. `run_eagerly=True` runs them eagerly too.

        An uncompiled template gets the same settings, so that `template.save()` includes the optimizer. A template
        that overrides `compile` is compiled by its own method, and this model takes over its settings.

        Raises:
            ValueError: a template that can no longer be replicated, or one whose own `train_step` has no layer that
            could be split.

        `steps_per_execution=k` runs k steps between two calls of callbacks, as on Keras's other backends.
        """
        check_template(self.template)
        check_own_step(self.template)
        jit_compile = kwargs.get("jit_compile", "auto")
        if type(self.template).compile is not keras.Model.compile:
            self.template.compile(*args, **kwargs)
            take_over(self, self.template)
        else:
            super().compile(*args, **kwargs)
        self._steps.forget_engine()
        chosen = {True: "inductor", False: None}.get(jit_compile, self._options.compile)
        self._steps.capture_by(None if self.run_eagerly else chosen)
        follow(self.template, self)

    # Keras's own loops, which here read an `HDF5Matrix` batch by batch.

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Train; arguments as in Keras. `HDF5Matrix` and `h5py.Dataset` are read by batches, ahead of the steps.

        `shuffle="batch"` works as in Keras 2; `"chunks"` mixes rows and reads each chunk of a file once.

        `x` and `validation_data` may each be a `fastdp.data.DeviceDataset` that includes targets and weights.

        With `verbose=2` the report's `line` is printed at the end. One warning appears if the work is too small to
        split.

        Raises:
            RuntimeError: another thread is fitting this model.
            ValueError: a DeviceDataset for other devices, or one passed together with `y` or `sample_weight`.
        """
        check_loop(self.template, "fit", "make_train_function")
        if not self._fitting.acquire(blocking=False):
            raise RuntimeError(
                f"The model {self.name!r} is already in fit() in another thread. Train one parallel model from one "
                "thread at a time, or wrap a model for each thread."
            )
        arguments: dict[str, Any] = {}
        try:
            arguments = resident_fit(arguments_by_name(keras.Model.fit, args, kwargs), self.devices)
            self._begins_fit = self._in_fit = True
            self._looked_at = looks_at_batches(arguments.get("callbacks"), arguments.get("verbose", "auto"))
            with replica_aware(), several_steps(self.steps_per_execution), self._feeding(arguments) as feeds:  # once
                arguments = stream_fit(arguments, self.prefetch)
                try:
                    history = super().fit(**self._told_at_once(arguments))
                finally:
                    self._latest_fit.inputs = input_report(arguments.get("x"), feeds)
            self._steps.settle()
            if arguments.get("verbose") == 2 and leads():
                io_utils.print_msg(self.report().line)
            self._small_work.check(self._steps.made_engine)
            return history
        except BaseException:
            close_files(arguments.get("callbacks"))
            raise
        finally:
            self._begins_fit = self._in_fit = False
            self._executions = Executions(None, looked_at=True)
            self._steps.end_following()
            self._fitting.release()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Test; arguments as in Keras. `HDF5Matrix` is read by batches; `x` may be a DeviceDataset."""
        check_loop(self.template, "evaluate", "make_test_function")
        arguments = resident_forward(arguments_by_name(keras.Model.evaluate, args, kwargs), self.devices)
        with several_steps(self.steps_per_execution), self._feeding(arguments):
            return super().evaluate(**self._told_at_once(stream_forward(arguments, self.prefetch)))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; arguments as in Keras. `HDF5Matrix` is read by batches; `x` may be a DeviceDataset."""
        check_loop(self.template, "predict", "make_predict_function")
        arguments = resident_forward(arguments_by_name(keras.Model.predict, args, kwargs), self.devices)
        with several_steps(self.steps_per_execution), self._feeding(arguments):
            return super().predict(**self._told_at_once(stream_forward(arguments, self.prefetch)))

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch; arguments as in Keras. `x` may be a batch of a DeviceDataset (`data.rows(numbers)`)."""
        check_loop(self.template, "train_on_batch", "make_train_function")
        arguments = arguments_by_name(keras.Model.train_on_batch, args, kwargs)
        return super().train_on_batch(**resident_batch(arguments, self.devices))

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Test on one batch; arguments as in `train_on_batch`."""
        check_loop(self.template, "test_on_batch", "make_test_function")
        arguments = arguments_by_name(keras.Model.test_on_batch, args, kwargs)
        return super().test_on_batch(**resident_batch(arguments, self.devices))

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Predict for one batch; arguments as in `train_on_batch`."""
        check_loop(self.template, "predict_on_batch", "make_predict_function")
        arguments = arguments_by_name(keras.Model.predict_on_batch, args, kwargs)
        return super().predict_on_batch(resident_batch(arguments, self.devices)["x"])

    @staticmethod
    def as_fed(data: Any) -> Any:
        """Convert arrays in any nest to what `fit` feeds the model: in host memory, floats in `keras.config.floatx()`.

        `DeviceDataset` calls it. Arrays that need no conversion are not copied.

        Raises:
            ValueError: a value that Keras does not accept as an array, or a `floatx` that NumPy lacks.
        """
        return as_fed(data)

    def _told_at_once(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run callbacks in the training thread when training on the host. On GPUs that would wait for each batch."""
        if self.fetch_ahead:
            return arguments
        return {**arguments, "callbacks": at_once(arguments.get("callbacks"))}

    def _feeding(self, arguments: dict[str, Any]) -> AbstractContextManager[Feeds]:
        """The block of one of Keras's loops, whose batches a thread reads ahead."""
        return feeding(self._options.timeout, self.prefetch, arguments.get("callbacks"))

    # Methods that Keras's loops call.

    def _assert_compile_called(self, method_name: str | None = None) -> None:
        """Keras's check, plus its warning about layers frozen since `compile`, which Keras 3.15 never reaches."""
        super()._assert_compile_called(method_name)
        self._warn_if_trainable_state_changed()

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Build metrics as Keras does, for a batch whose arrays have the same number of rows."""
        if data_batch is not None:
            self._steps.check_batch(data_batch)
        with one_batch_at_a_time(iterator):
            data_batch = stages_built(self._augmented, iterator, data_batch)
            super()._symbolic_build(iterator, data_batch)
        if iterator is not None:
            feed_here(iterator, self._options.timeout)
            if self._begins_fit:
                self._executions = Executions(iterator, looked_at=self._looked_at)
                if self.fetch_ahead:
                    self._steps.follow(iterator)
            self._begins_fit = False

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        """The function that Keras's `fit` calls for each execution."""
        assert self.engine is not None  # made here, before the loop begins
        self.train_function = self._train_execution
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        """The function that Keras's `evaluate` calls for each execution."""
        assert self.engine is not None
        steps = self._steps
        self.test_function = lambda data: [steps.test(steps.engine_within_loop, one) for one in data][-1]
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Callable[..., Any]:
        """The function that Keras's `predict` calls for each execution."""
        assert self._steps.engine_of_model is not None
        epochs = sys._getframe(1).f_locals.get("epoch_iterator")  # Keras's `predict` gives it to no method
        if epochs is not None:
            feed_here(epochs, self._options.timeout)
        steps = self._steps
        self.predict_function = lambda data: joined([steps.predict(steps.engine_for_calls, one) for one in data])
        return self.predict_function

    def _train_execution(self, data: list[Any]) -> Any:
        """Train on the batches of one execution, and of further ones where no callback looks; returns the last logs."""
        steps, executions = self._steps, self._executions
        engine = steps.engine_within_loop
        logs = steps.train_quietly(engine, data[0], data[1] if len(data) > 1 else None)
        if executions.go_on or len(data) > 1:
            quiet = executions.quiet(steps.runs_no_other_code())
            goes_on = executions.go_on and steps.needs_no_logs() and not self.run_eagerly
            for one, following in executions.rest(data, lambda: goes_on and not self.stop_training):
                unchanged = quiet()
                engine = engine if unchanged else steps.engine_within_loop
                logs = steps.train_quietly(engine, one, following, unchanged)
        return steps.results() if logs is None else logs

    # Calls.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the merged outputs for a global batch, as the template would. Takes all arguments of its call.

        The outputs have a gradient where those of the template would: `loss.backward()` gives the template's weights
        the gradient of one device, and `torch.autograd.grad` works too. A call that cannot be split (arguments with
        unequal numbers of rows, a model whose outputs mix rows) runs on one device, and one warning says why. A
        gradient of a gradient is computed on one device.
        """
        if is_hooked(self) or not calls_model(args, kwargs):
            return super().__call__(*args, **kwargs)
        looks_only = is_plain_call(args, kwargs) and not wants_gradient(self.template, args, kwargs)
        if looks_only and why_not_here() is None:
            return super().__call__(*args, **kwargs)
        args, kwargs = prepared_call(self._augmented, args, kwargs)
        return self._steps.call(_call_layer, args, kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs: Any) -> Any:
        """As `__call__`, for calls that Keras prepares first. Calls the template itself while shapes are traced."""
        if any(leaf is not None for leaf in keras.tree.flatten(mask)) and self.template._call_has_mask_arg:
            kwargs["mask"] = mask
        if training is not None and self.template._call_has_training_arg:
            kwargs["training"] = training
        if keras.src.backend.in_stateless_scope() or within_step():
            args, kwargs = prepared_call(self._augmented, (inputs,), kwargs)
            return self.template(*args, **kwargs)
        if is_plain_call((inputs,), kwargs) and not wants_gradient(self.template, (inputs,), kwargs):
            return self._steps.merged_outputs(inputs)
        args, kwargs = prepared_call(self._augmented, (inputs,), kwargs)
        return self._steps.call(_call_layer, args, kwargs)

    def symbolic_call(self, *args: Any, **kwargs: Any) -> Any:
        """Make this model part of another one, with a warning: training the other model is not parallel."""
        warn_user(
            f"The parallel model {self.name!r} is used inside another model. Training that one runs on one device, and "
            "its files cannot be loaded. Build the other model with the template (parallel.template), and wrap it."
        )
        return super().symbolic_call(*args, **kwargs)

    # The engine and its reports.

    @property
    def engine(self) -> DataParallel[CallProgram]:
        """The engine for the model as it is compiled now."""
        return self._steps.engine

    def report(self) -> Report:
        """How training steps run, where their time goes, and where the memory is. Prints as tables.

        As a sequence, the report has one entry per shape of a replica's rows, or a single entry that says why all run
        eagerly. Each entry has `how` ("eager", "traced", "compiled" or "graph"); `why`, where a faster way exists; its
        rows, those of the global batch, and the steps so far. For a captured step it adds the number of operations and
        the seconds spent on tracing, compiling (in the background) and loading. For a recorded step it adds the number
        of `replicas` that recorded it and of its `segments` (one graph each), and the `record_seconds` and
        `graph_nbytes` of all these replicas.

        For a model with steps of its own, `calls` counts each layer's calls on all devices and on one device, and says
        why.
        """
        further = [device for group in self._steps.device_groups or () for device in group[1:]]
        engine, calls = self._steps.made_engine, self._steps.calls_report
        entries = engine.program.steps_report if engine is not None else [{"how": "eager", "why": "no step yet"}]
        return make_report(
            engine,
            entries,
            library_nbytes=peak_nbytes,
            further_devices=further,
            calls=calls,
            inputs=self._latest_fit.inputs,
        )

    def _is_traced(self, program: object) -> bool:
        return isinstance(program, KerasProgram) and program.model is self.template

    @property
    def compiling(self) -> bool:
        """Whether a step is compiling in the background, or is about to be replaced by its compiled form."""
        captures = self._steps.captures
        return captures is not None and captures.compiling

    def wait_compiled(self, timeout: float | None = None) -> None:
        """Wait until no step is compiling, and let compiled steps take over. Meant for benchmarks.

        Raises:
            DeviceTimeoutError: compiling took longer than `timeout` seconds; it continues.
        """
        captures = self._steps.captures
        if captures is not None:
            captures.wait(timeout)


def _call_layer(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    """Call a layer as a script does."""
    return layer(*args, **kwargs)
