"""Unmodified Keras scripts on all devices: `fastdp.install` and `fastdp.uninstall`.

Keras's `fit`, `evaluate`, `predict` and their `_on_batch` forms ask the model for a function that runs one batch.
`install` makes Keras's trainer answer with one that runs it on all devices. The loops, callbacks, data adapters,
metrics and files stay those of the user's own model. Where a model or a batch cannot be split, Keras's own function
runs, and one warning says why.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.torch.trainer import TorchTrainer

from fastdp.device import resolve
from fastdp.keras.checks import check_backend, check_template
from fastdp.keras.custom_steps import has_own
from fastdp.keras.steps import Steps
from fastdp.program.capture_record import chosen_graphs
from fastdp.program.keras_effects import NotByRowsError
from fastdp.program.torch_deterministic import check_deterministic, deterministic_algorithms

_KINDS = ("train", "test", "predict")
_STEPS = "_fastdp_steps"  # in a model's __dict__: so it lives as long as the model, and Keras does not track it


@dataclass(slots=True)
class _Installed:
    """What `install` was asked for, and what `uninstall` has to undo."""

    devices: list[Any]
    options: dict[str, Any]
    originals: dict[str, Callable[..., Any]] = field(default_factory=dict)
    models: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_installed: list[_Installed] = []


def install(
    gpus: Any = None,
    *,
    sync_batch_norm: bool = True,
    compile: str | None = "auto",
    graph: str | None = "auto",
    deterministic: bool = False,
    **options: Any,
) -> None:
    """Run every Keras model of this process on several devices, from the next `fit`, `evaluate` or `predict` on.

    Nothing of a script changes: callbacks see the user's own model, and files are plain Keras files. A model or a
    batch that cannot be split runs on one device, as plain Keras runs it, and one warning says why. A second call
    replaces the first.

    Args:
        gpus: how many devices, a list of their ordinals, or None for all.
        sync_batch_norm: BatchNormalization by the global batch, as plain Keras does; False: by each device's rows.
        compile: how steps run, "auto", None, "trace" or "inductor"; see `fastdp.wrap`.
        graph: whether captured steps become CUDA graphs, "auto", "bucket", "step" or None; see `fastdp.wrap`.
        deterministic: results repeat bit for bit; see `fastdp.wrap`.
        options: `update`, `timeout` and `check_replicas` of `fastdp.wrap`.

    Raises:
        ValueError: anything wrong with `gpus`; an unknown `graph`.
        TypeError: an unknown option.
        RuntimeError: Keras runs on another backend than torch.

    Example:
        >>> fastdp.install(gpus=8)  # doctest: +SKIP
        >>> model.fit(x, y)  # doctest: +SKIP
    """
    check_backend("fastdp.install")
    unknown = set(options) - {"update", "timeout", "check_replicas"}
    if unknown:
        raise TypeError(f"`fastdp.install` knows no option {sorted(unknown)}.")
    devices = resolve(gpus, caller="fastdp.install")
    graphs = chosen_graphs(graph, devices, compile)
    if deterministic:
        check_deterministic(devices)
    uninstall()
    settings = {
        "sync_batch_norm": sync_batch_norm,
        "capture_mode": compile,
        "graphs": graphs,
        "deterministic": deterministic,
        "engine_options": options,
    }
    installed = _Installed(devices, settings)
    for kind in _KINDS:
        name = f"make_{kind}_function"
        installed.originals[name] = getattr(TorchTrainer, name)
        setattr(TorchTrainer, name, _maker(kind, installed.originals[name]))
    _installed.append(installed)


def uninstall() -> None:
    """Undo `install`: models run as plain Keras runs them. Nothing happens where nothing is installed."""
    while _installed:
        installed = _installed.pop()
        for name, original in installed.originals.items():
            setattr(TorchTrainer, name, original)
        for model in installed.models:
            model.__dict__.pop(_STEPS, None)
            for kind in _KINDS:
                if isinstance(getattr(model, f"{kind}_function", None), _ParallelFunction):
                    setattr(model, f"{kind}_function", None)


def _maker(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's `make_..._function` that gives a parallel function."""
    name = f"{kind}_function"

    def make_function(self: Any, force: bool = False) -> Any:
        present = getattr(self, name)
        if present is not None and not force and not _made_by_keras(present):
            if isinstance(present, _ParallelFunction):
                present.look_again()
            return present  # or the script's own
        setattr(self, name, None)
        original(self, force=force)
        parallel = _ParallelFunction(kind, weakref.ref(self), getattr(self, name), _installed[-1])
        setattr(self, name, parallel)
        return parallel

    return make_function


def _made_by_keras(function: Any) -> bool:
    """Whether a step function is one that Keras made, before fastdp was installed."""
    return getattr(function, "__qualname__", "").startswith("TorchTrainer.make_")


class _ParallelFunction:
    """What Keras's loops call with a list of one batch: a step on all devices, or Keras's own where that cannot be.

    Args:
        kind: "train", "test" or "predict".
        model: the user's model, weakly: the model holds this function.
        plain: Keras's own function.
        installed: devices and options.
    """

    def __init__(self, kind: str, model: weakref.ref[Any], plain: Callable[..., Any], installed: _Installed) -> None:
        self._kind, self._model, self._plain, self._installed = kind, model, plain, installed
        self._model_fits = False
        self._refused: str | None = None

    def look_again(self) -> None:
        """The model may have changed: check it before the next step."""
        self._model_fits = False
        self._refused = None

    def __call__(self, data: Any) -> Any:
        """Run one step."""
        model = self._model()
        reason = self._refused if self._model_fits else _why_not(model)
        self._model_fits = reason is None or reason is self._refused
        if reason is None and not has_own(model, f"{self._kind}_step"):
            reason = _why_not_split(data[0])
        if reason is None:
            steps = _steps_of(model, self._installed)
            try:
                return getattr(steps, self._kind)(steps.engine, data[0])
            except NotByRowsError as error:  # found out before the step: nothing has changed
                reason = self._refused = str(error)
        _warn_once(model, self._kind, reason)
        with deterministic_algorithms() if self._installed.options["deterministic"] else nullcontext():
            return self._plain(data)


def _steps_of(model: Any, installed: _Installed) -> Steps:
    """The steps of a model as it is compiled now."""
    known = model.__dict__.get(_STEPS)
    compiled = model._loss_tracker
    if known is None or known[0] is not compiled:
        known = (compiled, Steps(model, model, installed.devices, strict=False, **installed.options))
        model.__dict__[_STEPS] = known
        installed.models.add(model)
    return known[1]


def _why_not(model: Any) -> str | None:
    """Why a step of this model cannot run on several devices; None where it can."""
    if not model.built or not all(layer.built for layer in model._flatten_layers()):
        return "it is not built before its first batch"
    try:
        check_template(model, any_batch_size=isinstance(model, keras.Sequential))
    except ValueError as error:
        return str(error)
    return None


def _why_not_split(data: Any) -> str | None:
    """Why a batch cannot be dealt out by rows; None where it can."""
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    for leaf in leaves:
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


def _warn_once(model: Any, kind: str, reason: str) -> None:
    """Say once per model, kind of step and reason that plain Keras runs it."""
    said = model.__dict__.setdefault("_fastdp_said", set())
    if (kind, reason) in said:
        return
    said.add((kind, reason))
    if "not built" in reason:  # plain Keras builds it by running it: nothing else is lost
        return
    warnings.warn(
        f"fastdp: {kind} steps of the model {model.name!r} run on one device, as plain Keras: {reason}", stacklevel=3
    )
