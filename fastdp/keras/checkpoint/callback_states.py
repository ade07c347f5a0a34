"""What callbacks have found out in a run: best values, patience, history. It goes on after a restart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from fastdp.checkpoint import nest

# What says how a callback is set up, or what belongs to this process. Keras flips the sign of `min_delta` when it finds
# out whether a metric is to rise, in each run anew.
_NOT_STATE = ("_model", "params", "validation_data", "min_delta")


class CallbackStates:
    """The states of the callbacks of one `fit`.

    Of Keras's own callbacks, and of classes made of them, a state is the attributes of plain data that are not what
    they were when `fit` began. Others have one if they have `state_dict` and `load_state_dict`.

    Args:
        callbacks: all of them, after `on_train_begin`.
        own: the one that makes checkpoints.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback], own: keras.callbacks.Callback) -> None:
        self._named: dict[str, keras.callbacks.Callback] = {}
        for callback in callbacks:
            kind = type(callback).__name__
            count = sum(name.startswith(f"{kind} ") for name in self._named)
            if callback is not own and not isinstance(callback, keras.callbacks.ProgbarLogger):
                self._named[f"{kind} {count}"] = callback
        self._first = {name: _attributes(callback) for name, callback in self._named.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state of each callback that has one."""
        states: dict[str, Any] = {}
        for name, callback in self._named.items():
            if _has_own(callback):
                states[name] = callback.state_dict()
            elif changed := _changed(self._first[name], _attributes(callback)):
                states[name] = changed
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give the callbacks that are still there their states."""
        for name, callback in self._named.items():
            if name in states and _has_own(callback):
                callback.load_state_dict(states[name])
            elif name in states:
                vars(callback).update(states[name])


def _has_own(callback: keras.callbacks.Callback) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def _attributes(callback: keras.callbacks.Callback) -> dict[str, nest.Packed]:
    """Copies of the attributes of plain data of one of Keras's callbacks."""
    kinds = type(callback).__mro__
    if not any(one.__module__.startswith("keras.") and one is not keras.callbacks.Callback for one in kinds):
        return {}
    found = {}
    for name, value in vars(callback).items():
        if name in _NOT_STATE:
            continue
        try:
            found[name] = nest.pack(value)
        except TypeError:  # a file, a function, a model
            continue
    return found


def _changed(first: Mapping[str, nest.Packed], now: Mapping[str, nest.Packed]) -> dict[str, Any]:
    """The values of the attributes that are not as they were."""
    return {name: nest.unpack(one) for name, one in now.items() if name not in first or not _same(first[name], one)}


def _same(one: nest.Packed, other: nest.Packed) -> bool:
    return json.dumps(one.structure) == json.dumps(other.structure) and all(
        np.array_equal(a, b) for a, b in zip(one.arrays, other.arrays, strict=True)
    )
