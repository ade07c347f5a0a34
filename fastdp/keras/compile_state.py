"""The compile settings of a Keras model, copied and lent between a template and its parallel model.

The parallel model is compiled; the template is the model that is saved. So that a file written from the
template holds the optimizer, an uncompiled template takes over the parallel model's settings, and one that
its owner compiled keeps its own and merely borrows the other's while it is saved through the parallel model.
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
# Templates that share a parallel model's settings, and the loss tracker they were given: compiled since by its
# owner, a template has another one.
_followers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _read(model: keras.Model) -> dict[str, Any]:
    """The settings that a model has."""
    return {name: model.__dict__.get(name, _missing) for name in _ATTRIBUTES}


def _write(model: keras.Model, settings: dict[str, Any]) -> None:
    """Give a model these settings, untracked: they stay the other model's."""
    with DotNotTrackScope():
        for name, value in settings.items():
            if value is not _missing:
                setattr(model, name, value)
            elif name in model.__dict__:
                delattr(model, name)


def follow(template: keras.Model, parallel: keras.Model) -> None:
    """Let an uncompiled template share the parallel model's settings; its owner's own stay untouched."""
    if template.compiled and not follows(template, _followers.get(template, _missing)):
        return
    settings = _read(parallel)
    # Keyed by layers, the parallel model among them: kept, it would keep the replicas' memory alive.
    state = settings["_compiled_trainable_state"]
    if state is not _missing:
        own = set(map(id, template._flatten_layers()))
        settings["_compiled_trainable_state"] = {layer: value for layer, value in state.items() if id(layer) in own}
    _write(template, settings)
    template.train_function = template.test_function = template.predict_function = None
    _followers[template] = parallel._loss_tracker


def follows(template: keras.Model, loss_tracker: Any) -> bool:
    """Whether the template's settings are those that `loss_tracker` came with."""
    return getattr(template, "_loss_tracker", None) is loss_tracker


def take_over(parallel: keras.Model, template: keras.Model) -> None:
    """Give the parallel model the settings of a template that has just been compiled."""
    _write(parallel, _read(template))
    parallel._compiled_trainable_state = {layer: layer.trainable for layer in parallel._flatten_layers()}
    parallel.train_function = parallel.test_function = parallel.predict_function = None


@contextmanager
def borrowed(template: keras.Model, parallel: keras.Model) -> Iterator[None]:
    """The template with the parallel model's settings, for the time of a `with`."""
    own = _read(template)
    _write(template, _read(parallel))
    try:
        yield
    finally:
        _write(template, own)
