"""Writes a run's fingerprint: after each training step, hashes of its batch, losses, gradients and weights."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdp import settings
from fastdp._version import __version__
from fastdp.buffers import FlatBuffers
from fastdp.checkpoint.fingerprints import FORMAT, append, digest
from fastdp.engine.replicas import ReplicaGroup
from fastdp.options import Options
from fastdp.program.base import Totals

FINGERPRINTED = ("train", "backward")  # kinds of steps that have a line
_LIBRARIES = ("numpy", "torch", "keras", "cupy")
_PROCESS = uuid.uuid4().hex  # tells parts of one process, whose models may share a file, from those of several


class FingerprintWriter:
    """Writes the fingerprint of what an engine trains. Called between steps, from the thread that trains.

    Args:
        path: the file, to which lines are appended. Engines of one process may share it.
        weights: the program's own, between steps those of all replicas.
        gradients: the first replica's, after a step that reduces those of the whole batch.
        options: the engine's.
        cores: cores that all replicas may use together.
        replicas: their number.
    """

    def __init__(
        self, path: Path, weights: FlatBuffers, gradients: FlatBuffers, options: Options, cores: int, replicas: int
    ) -> None:
        self._path, self._weights, self._gradients = path.absolute(), weights, gradients
        self._begun = False
        self._facts = {"shards": options.shards, "replicas": replicas, "threads": max(1, cores // replicas)}

    def begin(self) -> None:
        """Write the first line of this engine, unless it is there. Before a step.

        Raises:
            OSError: the file cannot be written.
        """
        if self._begun:
            return
        loaded = [name for name in _LIBRARIES if name in sys.modules]
        versions = {"fastdp": __version__, **{name: _version(name) for name in loaded}}
        weights = digest(self._weights.on_host())
        line = {"format": FORMAT, "process": _PROCESS, "weights": weights, **self._facts, "versions": versions}
        append(self._path, line)
        self._begun = True

    def add(self, kind: str, totals: Totals, batch: Any = None, rows: int | None = None) -> None:
        """Write the line of a step that is over.

        Args:
            kind: "train", "backward", or "update" for one by accumulated gradients.
            totals: its sums, and whether gradients were reduced.
            batch: its arrays, if it has any.
            rows: their number of rows.
        """
        known = isinstance(batch, Sequence) and all(isinstance(array, np.ndarray) for array in batch)
        append(
            self._path,
            {
                "kind": kind,
                "rows": rows,
                "batch": digest(batch) if known else None,
                "losses": digest([totals.sums]),
                "gradients": digest(self._gradients.on_host()) if totals.reduced else None,
                "weights": digest(self._weights.on_host()),
            },
        )


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # CuPy's wheels are called after CUDA's versions
        return str(getattr(sys.modules[library], "__version__", "unknown"))


def writer(options: Options, replicas: ReplicaGroup) -> FingerprintWriter | None:
    """The writer that the option `fingerprint` or FASTDP_FINGERPRINT asks for; None if neither does."""
    asked = options.fingerprint if options.fingerprint is not None else settings.fingerprint()
    if asked is None:
        return None
    values = replicas.home.home.variables, replicas.every[0].gradients
    return FingerprintWriter(Path(os.fspath(asked)), *values, options, replicas.program.cores, len(replicas.every))
