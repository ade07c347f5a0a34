"""Keras's own loops for plain models that `fastdp.install` runs: on a `DeviceDataset`, or with batches read ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.torch.core import get_device

from fastdp.comm.batch import ResidentArray
from fastdp.data.device_dataset import DeviceDataset
from fastdp.data.row_batch import ResidentBatch
from fastdp.keras.fit.arguments import arguments_by_name, stream_fit, stream_forward
from fastdp.keras.fit.device_dataset import resident_batch, resident_fit, resident_forward
from fastdp.keras.fit.feeding import feeding, input_report, moved_by_keras
from fastdp.keras.template_view import TemplateView
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


def fed(name: str, installed: Callable[[], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`fit`, `evaluate` or `predict` of the trainer, whose batches a thread reads ahead.

    Args:
        name: of the method.
        installed: what is installed, with its `options` and `prefetch`; None if nothing is. Its `inputs` tell how the
            batches of a `fit` came.
        original: the method.
    """

    @functools.wraps(original)
    def method(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        now = installed()
        if now is None or isinstance(self, TemplateView):  # which is fed by its own methods
            return original(self, *args, **kwargs)
        arguments = arguments_by_name(original, args, kwargs)
        with feeding(now.options.timeout, now.prefetch, arguments.get("callbacks"), waits=True) as feeds:
            arguments = (stream_fit if name == "fit" else stream_forward)(arguments, now.prefetch)
            try:
                return original(self, **arguments)
            finally:
                if name == "fit":
                    now.inputs = input_report(arguments.get("x"), feeds)

    return method


def on_keras_device(data: Any) -> Any:
    """A batch for a step of plain Keras, where Keras's own loop would have put it: fed batches are in host memory."""
    device = get_device()
    if device == "cpu" or not moved_by_keras():
        return data
    return keras.tree.map_structure(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, data)


def on_host(data: Any) -> Any:
    """A batch with tensors in host memory in place of arrays of a `DeviceDataset`."""
    if not any(isinstance(leaf, ResidentArray) for leaf in keras.tree.flatten(data)):
        return data
    return keras.tree.map_structure(lambda leaf: as_tensor(leaf) if isinstance(leaf, ResidentArray) else leaf, data)
