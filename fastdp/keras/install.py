"""`fastdp.install`: runs unmodified Keras scripts on all devices.

Keras's `fit`, `evaluate`, `predict` and their `_on_batch` forms get a function from the model that runs one batch.
`install` patches Keras's trainer to return one that runs the batch on all devices. The loops, callbacks, data adapters,
metrics and files stay those of the user's own model. Where a model or a batch cannot be split, Keras's own function
runs, and one warning says why.

A call of a whole model from the script's own code runs on all devices too (`fastdp.keras.steps.own_loops`).
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import torch
from keras.src.backend.torch.trainer import TorchEpochIterator, TorchTrainer

from fastdp.comm.batch import ResidentArray
from fastdp.comm.processes import launched, several
from fastdp.errors import ReplicaError
from fastdp.keras.checks import check_backend, check_options, check_template, is_built, unbuilt_layers
from fastdp.keras.fit.callbacks import quiet_elsewhere
from fastdp.keras.fit.device_dataset import as_fed
from fastdp.keras.fit.feeding import begin_here, begun_iterator
from fastdp.keras.fit.resident_loops import LOOPS, fed, on_host, on_keras_device, with_data_sets
from fastdp.keras.steps.custom import has_own
from fastdp.keras.steps.device_trial import DeviceTrial, first_rows, wait_for_gpu
from fastdp.keras.steps.own_loops import inside_step, is_own_call, say_once
from fastdp.keras.steps.standard import Steps
from fastdp.keras.template_view import TemplateView
from fastdp.options import Options
from fastdp.patching import Patch
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.shards import resolve_devices
from fastdp.tensors.deterministic import deterministic_algorithms
from fastdp.tensors.row_effects import NotByRowsError, refusal
from fastdp.warn import warn_user

_KINDS = ("train", "test", "predict")
_FURTHER = {
    *("update", "timeout", "check_replicas", "shards", "on_nonfinite", "grad_dtype", "shard_optimizer"),
    *("on_oom", "on_device_loss"),
}
NOT_BUILT = "it is not built: it makes its variables when it is called"
_STEPS = "_fastdp_steps"  # kept in a model's __dict__: it lives as long as the model, and Keras does not track it


@dataclass(slots=True)
class Installed:
    """The devices and options given to `install`, and the models that have run with them.

    `fastdp.data.DeviceDataset(arrays, installed)` takes it.

    Attributes:
        prefetch: how many batches of `fit`, `evaluate` and `predict` a thread may read ahead, as in a parallel model.
            None: two, where making a batch takes long enough for that.
        inputs: how the batches of the latest `fit` came, as `report().inputs` of a parallel model tells.
    """

    devices: list[QueueDevice]
    options: Options
    always: bool
    models: weakref.WeakSet[keras.Model] = field(default_factory=weakref.WeakSet)
    prefetch: int | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)

    as_fed = staticmethod(as_fed)


_installed: list[Installed] = []  # one, or none


def install(
    gpus: Any = None,
    *,
    sync_batch_norm: bool = True,
    compile: str | None = "auto",
    graph: str | None = "auto",
    rows: str | None = "merge",
    deterministic: bool = False,
    always: bool = True,
    **options: Any,
) -> Installed:
    """Run every Keras model of this process on several devices, from the next `fit`, `evaluate`, `predict` or call on.

    A call is one from the script's own code of a whole model (`model(x, training=True)`) on two rows or more. Its
    outputs have the gradient of one device. The script does not change: callbacks see the user's own model, and files
    are plain Keras files. A model or a batch that cannot be split runs on one device, as in plain Keras, and one
    warning says why. A second `install` replaces the first.

    Args:
        gpus: the number of devices, a list of their ordinals, None for all, or "auto" as in `fastdp.wrap`.
        sync_batch_norm: whether BatchNormalization uses the global batch, as in plain Keras; False: each device's rows.
        rows: how to treat layers that mix the rows of a batch. "merge" runs such layers on the whole batch on each
            device, which gives plain Keras's numbers; a model whose own `call` mixes rows runs in plain Keras.
            "replica" lets each device use only its own rows. None: models that mix rows run in plain Keras, except
            where merging their outputs is enough.
        compile, graph, deterministic: as in `fastdp.wrap`.
        always: run all steps on all devices that can be split. False: steps of a model that are not captured (a
            `train_step` or layers of its own, `predict`) are timed on all devices and on one, within the first 24 of
            a kind, and run on one device from then on, as plain Keras, where that is faster; a line on the error
            stream says so. Results are the same. With `deterministic`, `shards` or `on_nonfinite` all devices stay.
        options: `update`, `timeout`, `check_replicas`, `shards`, `on_nonfinite`, `grad_dtype`, `shard_optimizer`,
            `on_oom` and `on_device_loss`, as in `fastdp.wrap`. Lost devices that answer again join at the next `fit`.

    Returns:
        What `fastdp.data.DeviceDataset(arrays, installed)` takes to put data on these devices: `fit`, `evaluate`,
        `predict` and their `_on_batch` forms of all models then take that data set as `x`.

    Raises:
        ValueError: invalid `gpus`, or an unknown `compile`, `graph`, `rows` or `update`.
        TypeError: an unknown option.
        RuntimeError: Keras runs on another backend than torch.

    Example:
        >>> fastdp.install(gpus=8)  # doctest: +SKIP
        >>> model.fit(x, y)  # doctest: +SKIP
    """
    check_backend("fastdp.install")
    unknown = set(options) - _FURTHER
    if unknown:
        raise TypeError(f"`fastdp.install` has no option {sorted(unknown)}.")
    chosen = Options(
        sync_batch_norm=sync_batch_norm,
        compile=compile,
        graph=graph,
        rows=rows,
        deterministic=deterministic,
        **options,
    )
    devices, chosen = resolve_devices(gpus, chosen, "fastdp.install", launched())
    check_options(chosen, devices)
    quiet_elsewhere()
    uninstall()
    _patch.enter()
    _installed.append(Installed(devices, chosen, always))
    return _installed[-1]


def uninstall() -> None:
    """Undo `install`: models run as in plain Keras. Does nothing if nothing is installed."""
    while _installed:
        installed = _installed.pop()
        _patch.leave()
        for model in installed.models:
            model.__dict__.pop(_STEPS, None)
            for kind in _KINDS:
                if isinstance(getattr(model, f"{kind}_function", None), _ParallelFunction):
                    setattr(model, f"{kind}_function", None)


def _maker(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's `make_..._function` that returns a parallel function while fastdp is installed."""
    name = f"{kind}_function"

    def make_function(self: keras.Model, force: bool = False) -> Any:
        installed = _now()
        if installed is None:
            return original(self, force=force)
        present = getattr(self, name)
        if present is not None and not force and not _made_by_keras(present):
            if isinstance(present, _ParallelFunction):
                present.look_again()
                begin_here()
                known = _known(self)
                if known is not None and known.steps.roster.lost:
                    known.steps.roster.rejoin()
            return present  # a parallel function, or the script's own
        setattr(self, name, None)
        original(self, force=force)
        parallel = _ParallelFunction(kind, weakref.ref(self), getattr(self, name), installed)
        setattr(self, name, parallel)
        begin_here()
        return parallel

    return make_function


def _made_by_keras(function: Callable[..., Any]) -> bool:
    """Whether Keras made a step function before fastdp was installed."""
    return getattr(function, "__qualname__", "").startswith("TorchTrainer.make_")


class _ParallelFunction:
    """The step function for Keras's loops: runs a batch on all devices, or Keras's own step where that is impossible.

    The loops call it with a list of one batch.

    Args:
        kind: "train", "test" or "predict".
        model: a weak reference to the user's model, since the model holds this function.
        plain: Keras's own function.
        installed: the devices and options.
    """

    def __init__(
        self, kind: str, model: weakref.ref[keras.Model], plain: Callable[..., Any], installed: Installed
    ) -> None:
        self._kind, self._model, self._installed = kind, model, installed
        self._plain = partial(_as_plain_keras, plain)
        self._model_fits = False
        self._refused: str | None = None
        options = installed.options
        stays = installed.always or options.deterministic or options.on_nonfinite is not None
        self._trial = None if stays or several() or len(installed.devices) == 1 else DeviceTrial()

    def look_again(self) -> None:
        """Check the model again before the next step, since it may have changed."""
        self._model_fits = False
        self._refused = None

    def __call__(self, data: Any) -> Any:
        """Run one step; calls of models inside it are part of it."""
        with inside_step():
            return self._step(self._model(), data)

    def _step(self, model: keras.Model, data: Any) -> Any:
        """Run one step on all devices, or as plain Keras."""
        reason = self._refused if self._model_fits else _why_not(model)
        self._model_fits = reason is None or reason is self._refused
        if reason is None and not has_own(model, f"{self._kind}_step"):
            if _is_first(model, self._kind) and unbuilt_layers(model):
                return self._plain(data)  # builds the layers that these steps call
            reason = _why_not_split(data[0])
        if reason is None:
            steps = _steps_of(model, self._installed)
            try:
                if self._trial is not None:
                    return self._timed(self._trial, steps, data)
                return self._on_all(steps, data)
            except (NotByRowsError, ReplicaError) as error:  # weights and everything else are unchanged
                reason = self._refused = refusal(error)
        _warn_once(model, self._kind, reason)
        with deterministic_algorithms() if self._installed.options.deterministic else nullcontext():
            return self._plain(data)

    def _on_all(self, steps: Steps, data: Any) -> Any:
        """Run one step on all devices."""
        engine = steps.engine if self._kind == "train" else steps.engine_of_model
        return getattr(steps, self._kind)(engine, data[0])

    def _timed(self, trial: DeviceTrial, steps: Steps, data: Any) -> Any:
        """Run one step on all devices or on one, as the trial of both says."""
        if trial.is_over or self._may_be_captured(steps):
            return self._on_all(steps, data) if trial.on_all else self._plain(data)
        began = time.perf_counter()
        if trial.on_all:
            found = self._on_all(steps, data)
        else:
            if steps.made_engine is not None:
                steps.made_engine.program.doubt()
            found = self._plain(data)
            wait_for_gpu()
        said = trial.note(time.perf_counter() - began, first_rows(data[0]))
        if said and sys.stderr is not None:
            name, kind = steps.template.name, {"train": "training", "test": "test", "predict": "predict"}[self._kind]
            sys.stderr.write(
                f"fastdp: {kind} steps of {name!r} {said} on {len(steps.devices)}, so they run on one from now on "
                "(`fastdp run --always` keeps all).\n"
            )
        return found

    def _may_be_captured(self, steps: Steps) -> bool:
        """Whether these steps may get faster on all devices later, or leave gradients there between two of them."""
        engine = steps.made_engine
        if self._kind != "train" or engine is None:
            return False
        program = engine.program
        return program.accumulation.defers(engine) or (program.captures is not None and not program.captures.is_refused)


def _as_plain_keras(plain: Callable[..., Any], data: Any) -> Any:
    """Run Keras's own step function."""
    return plain([on_keras_device(on_host(one)) for one in data])


def _calling(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Layer.__call__` that runs calls of whole models from a script's own code on all devices."""

    def __call__(self: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, keras.Model) or isinstance(self, TemplateView) or not is_own_call(args, kwargs):
            return original(self, *args, **kwargs)
        installed = _now()
        if installed is None:
            return original(self, *args, **kwargs)
        known = _known(self)
        if known is None and self.built and not self.weights:  # too little to compute
            return original(self, *args, **kwargs)
        reason = None if known is not None and known.steps.is_unchanged() else _why_not(self)
        if reason is None:
            return _steps_of(self, installed).call(original, args, kwargs)
        if reason != NOT_BUILT or not _is_first(self, "call"):
            say_once(self, reason)
        with inside_step():
            return original(self, *args, **kwargs)

    return __call__


def _now() -> Installed | None:
    """The current installation, or None."""
    return next(iter(_installed), None)


_patch = Patch(
    [
        *((TorchTrainer, name, partial(fed, name, _now)) for name in ("fit", "evaluate", "predict")),
        *((TorchTrainer, name, partial(with_data_sets, name, _now)) for name in LOOPS),
        (TorchEpochIterator, "_get_iterator", begun_iterator),
        *((TorchTrainer, f"make_{kind}_function", partial(_maker, kind)) for kind in _KINDS),
        (keras.Layer, "__call__", _calling),
    ]
)


class _Known(NamedTuple):
    """The steps of a model, and its loss tracker when they were made, which each `compile` replaces."""

    loss_tracker: keras.metrics.Metric | None
    steps: Steps


def _known(model: keras.Model) -> _Known | None:
    """The steps that were made for a model, or None."""
    return model.__dict__.get(_STEPS)


def made_steps(model: keras.Model) -> Steps | None:
    """The steps that `install` has made for a model; None if it has none."""
    known = _known(model)
    return known.steps if known is not None else None


def _steps_of(model: keras.Model, installed: Installed) -> Steps:
    """The steps of a model as it is compiled now."""
    known = _known(model)
    if known is None or known.loss_tracker is not model._loss_tracker:
        steps = Steps(model, model, installed.devices, installed.options, falls_back=True)
        known = model.__dict__[_STEPS] = _Known(model._loss_tracker, steps)
        installed.models.add(model)
    return known.steps


def _why_not(model: keras.Model) -> str | None:
    """Why a step of this model cannot run on several devices; None where it can."""
    if not is_built(model):
        return NOT_BUILT
    try:
        check_template(model, any_batch_size=isinstance(model, keras.Sequential))
    except ValueError as error:
        return str(error)
    return None


def _why_not_split(data: Any) -> str | None:
    """Why a batch cannot be split by rows; None where it can."""
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    for leaf in leaves:
        if isinstance(leaf, ResidentArray):
            continue
        if not isinstance(leaf, (torch.Tensor, np.ndarray)):
            return f"its batches hold {type(leaf).__name__} values, which have no rows"
        if isinstance(leaf, torch.Tensor) and leaf.layout != torch.strided:
            return "its batches are sparse"
        if leaf.ndim == 0:
            return "its batches hold arrays without rows"
    rows = {leaf.shape[0] for leaf in leaves}
    if len(rows) != 1:
        return f"the arrays of its batches have unequal numbers of rows: {sorted(rows)}"
    return "its batch has no rows" if 0 in rows else None


def _is_first(model: keras.Model, kind: str) -> bool:
    """Whether this is the model's first step (or call) of this kind, which may build it. True once per kind."""
    begun = model.__dict__.setdefault("_fastdp_begun", set())
    first = kind not in begun
    begun.add(kind)
    return first


def _warn_once(model: keras.Model, kind: str, reason: str) -> None:
    """Warn once per model, kind of step and reason that plain Keras runs the step."""
    said = model.__dict__.setdefault("_fastdp_said", set())
    if (kind, reason) in said or (reason == NOT_BUILT and _is_first(model, kind)):
        return  # a first step that only builds the model needs no warning
    said.add((kind, reason))
    warn_user(f"fastdp: {kind} steps of the model {model.name!r} run on one device, as plain Keras: {reason}")
