"""Keras's own loops on a `DeviceDataset`, for plain models that `fastdp.install` runs on all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from fastdp.comm.batch import ResidentArray
from fastdp.data.device_dataset import DeviceDataset
from fastdp.data.row_batch import ResidentBatch
from fastdp.keras.fit.arguments import arguments_by_name
from fastdp.keras.fit.device_dataset import resident_batch, resident_fit, resident_forward
from fastdp.tensors.arrays import as_tensor

LOOPS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")


def with_data_sets(name: str, installed: Callable[[], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """One of the trainer's methods `LOOPS` that also takes a `DeviceDataset`, or a batch of one.

    Args:
        name: of the method.
        installed: what is installed, with its `devices`; None if nothing is.
        original: the method.
    """

    @functools.wraps(original)
    def method(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        now, x = installed(), args[0] if args else kwargs.get("x")
        validates = name == "fit" and isinstance(kwargs.get("validation_data"), DeviceDataset)
        if now is None or not (validates or isinstance(x, (DeviceDataset, ResidentBatch))):
            return original(self, *args, **kwargs)
        arguments = arguments_by_name(original, args, kwargs)
        if name == "fit":
            return original(self, **resident_fit(arguments, now.devices))
        if name in ("evaluate", "predict"):
            return original(self, **resident_forward(arguments, now.devices))
        found = resident_batch(arguments, now.devices)
        return original(self, found["x"]) if name == "predict_on_batch" else original(self, **found)

    return method


def on_host(data: Any) -> Any:
    """A batch with tensors in host memory in place of arrays of a `DeviceDataset`."""
    if not any(isinstance(leaf, ResidentArray) for leaf in keras.tree.flatten(data)):
        return data
    return keras.tree.map_structure(lambda leaf: as_tensor(leaf) if isinstance(leaf, ResidentArray) else leaf, data)
