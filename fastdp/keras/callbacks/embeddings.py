"""The weights of Embedding layers for TensorBoard's projector, with labels from the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from fastdp.keras.callbacks.event_files import EventFile


class Embeddings:
    """The Embedding layers of a model, and the labels of their rows.

    Args:
        model: the template.
        metadata: a file for all of them, or a dict of files by the layers' names, or None.
        log_dir: where files are looked for.

    Raises:
        ValueError: `metadata` names layers that are no Embedding.
    """

    def __init__(self, model: keras.Model, metadata: Any, log_dir: str) -> None:
        self._layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)]
        self._log_dir = Path(log_dir)
        names = [layer.name for layer in self._layers]
        files = dict(metadata) if isinstance(metadata, Mapping) else dict.fromkeys(names, metadata)
        unknown = sorted(set(files) - set(names))
        if unknown:
            raise ValueError(
                f"`embeddings_metadata` must name Embedding layers of the model. Received: {unknown}. It has: {names}."
            )
        self._files = {name: file for name, file in files.items() if file is not None}

    def write(self, events: EventFile, epoch: int) -> None:
        """Write all rows of each layer.

        Raises:
            ValueError: a file has another number of labels than its layer has rows.
            OSError: a file cannot be read.
        """
        for layer in self._layers:
            rows = keras.ops.convert_to_numpy(layer.embeddings)
            labels, header = self._labels(layer.name, len(rows))
            events.writer.add_embedding(rows, labels, global_step=epoch, tag=layer.name, metadata_header=header)

    def _labels(self, name: str, rows: int) -> tuple[Any, Any]:
        """The labels of a layer's rows, and the names of their columns if there are several; None without a file."""
        if name not in self._files:
            return None, None
        lines = (self._log_dir / self._files[name]).read_text("utf-8").splitlines()
        cells = [line.split("\t") for line in lines]
        if len(cells[0]) > 1 and len(cells) == rows + 1:  # as TensorBoard reads it: columns have a line of names
            return cells[1:], cells[0]
        if len(lines) != rows:
            raise ValueError(
                f"`embeddings_metadata` must be a file with one line for each row of the layer {name!r}: {rows}. "
                f"Received: {len(lines)} lines in {self._log_dir / self._files[name]}."
            )
        return lines, None
