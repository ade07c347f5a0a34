"""The compile settings of a Keras model, copied and lent between a template and its parallel model.

The parallel model is compiled, but the template is saved, and a file written from the template must hold the optimizer.
So an uncompiled template shares the parallel model's settings. A template that the user compiled keeps its own settings
and borrows the parallel model's only while it is saved through the parallel model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.utils.tracking import DotNotTrackScope

_ATTRIBUTES = (
    "optimizer",
    "loss",
    "compiled",
    "steps_per_execution",
    "stop_training",
    "_compile_config",
    "_compile_loss",
    "_compile_metrics",
    "_compiled_trainable_state",
    "_jit_compile",
    "_loss_tracker",
    "_run_eagerly",
)
_missing = object()
# Templates that share a parallel model's settings, and the loss tracker that they got with them. If the user compiles a
# template later, it has another loss tracker.
_followers: weakref.WeakKeyDictionary[keras.Model, keras.metrics.Metric] = weakref.WeakKeyDictionary()


def _read(model: keras.Model) -> dict[str, Any]:
    """Read a model's settings."""
    return {name: model.__dict__.get(name, _missing) for name in _ATTRIBUTES}


def _write(model: keras.Model, settings: dict[str, Any]) -> None:
    """Give a model these settings. They are not tracked, because they belong to the other model."""
    with DotNotTrackScope():
        for name, value in settings.items():
            if value is not _missing:
                setattr(model, name, value)
            elif name in model.__dict__:
                delattr(model, name)


def follow(template: keras.Model, parallel: keras.Model) -> None:
    """Let a template that the user has not compiled share the parallel model's settings."""
    if template.compiled and not follows(template, _followers.get(template, _missing)):
        return
    settings = _read(parallel)
    # Its keys are layers, including the parallel model, which would keep the replicas' memory alive.
    state = settings["_compiled_trainable_state"]
    if state is not _missing:
        own = set(map(id, template._flatten_layers()))
        settings["_compiled_trainable_state"] = {layer: value for layer, value in state.items() if id(layer) in own}
    _write(template, settings)
    template.train_function = template.test_function = template.predict_function = None
    _followers[template] = parallel._loss_tracker


def follows(template: keras.Model, loss_tracker: keras.metrics.Metric | None) -> bool:
    """Whether the template's settings belong to `loss_tracker`."""
    return getattr(template, "_loss_tracker", None) is loss_tracker


def take_over(parallel: keras.Model, template: keras.Model) -> None:
    """Give the parallel model the settings of a newly compiled template."""
    _write(parallel, _read(template))
    parallel._compiled_trainable_state = {layer: layer.trainable for layer in parallel._flatten_layers()}
    parallel.train_function = parallel.test_function = parallel.predict_function = None


@contextmanager
def borrowed(template: keras.Model, parallel: keras.Model) -> Iterator[None]:
    """Give the template the parallel model's settings for the duration of a `with`."""
    own = _read(template)
    _write(template, _read(parallel))
    try:
        yield
    finally:
        _write(template, own)
