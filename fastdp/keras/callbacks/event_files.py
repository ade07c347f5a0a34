"""Event files for TensorBoard, by torch's writer (with the package tensorboard) or by tensorboardX."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class EventFile:
    """Writes scalars, histograms, images and the model's graph to one event file in a folder.

    Args:
        folder: where the file is made, with the first thing written.
        caller: what asks for it, for the error.

    Raises:
        ImportError: neither tensorboard nor tensorboardX is installed.
    """

    def __init__(self, folder: str | Path, caller: str) -> None:
        self._library = _library(caller)
        self._folder = str(folder)
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """The `SummaryWriter`; it begins a file if none is open."""
        if self._writer is None:
            self._writer = self._library.writers.SummaryWriter(self._folder)
        return self._writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers by their tags."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, float(value), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> bool:
        """Add a histogram of the finite numbers among these. Returns whether there are any."""
        finite = values[np.isfinite(values)]
        if finite.size:
            self.writer.add_histogram(tag, finite, step)
        return bool(finite.size)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Add an image of bytes, (height, width, channels).

        Raises:
            ImportError: Pillow, which both writers need for images, is not installed.
        """
        if importlib.util.find_spec("PIL") is None:
            raise ImportError(
                "Images in TensorBoard need Pillow, which is not installed. Install it: pip install pillow"
            )
        self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def keras_graph(self, json: str) -> None:
        """Add a Keras model's configuration, from which TensorBoard draws its layers, under Keras's own tag."""
        summary, types = self._library.summary, self._library.types
        plugin = summary.SummaryMetadata.PluginData(plugin_name="graph_keras_model", content=b"1")
        text = self._library.tensor.TensorProto(dtype=types.DT_STRING, string_val=[json.encode()])
        value = summary.Summary.Value(tag="keras", metadata=summary.SummaryMetadata(plugin_data=plugin), tensor=text)
        self.writer.file_writer.add_summary(summary.Summary(value=[value]), 0)

    def flush(self) -> None:
        """Write out everything so far."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """End the file. The next thing written begins another one in the same folder, which TensorBoard reads on."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


class _Library(NamedTuple):
    """A library that writes event files, and the messages in them."""

    writers: Any
    summary: Any
    tensor: Any
    types: Any


def _library(caller: str) -> _Library:
    """torch's writer, which needs tensorboard, or else tensorboardX."""
    if importlib.util.find_spec("tensorboard") is not None:
        return _Library(
            importlib.import_module("torch.utils.tensorboard"),
            importlib.import_module("tensorboard.compat.proto.summary_pb2"),
            importlib.import_module("tensorboard.compat.proto.tensor_pb2"),
            importlib.import_module("tensorboard.compat.proto.types_pb2"),
        )
    if importlib.util.find_spec("tensorboardX") is not None:
        return _Library(
            importlib.import_module("tensorboardX"),
            importlib.import_module("tensorboardX.proto.summary_pb2"),
            importlib.import_module("tensorboardX.proto.tensor_pb2"),
            importlib.import_module("tensorboardX.proto.types_pb2"),
        )
    raise ImportError(
        f"{caller} needs the package tensorboard (or tensorboardX), and neither is installed. Install it with: "
        "pip install 'fastdp[tensorboard]'"
    )
