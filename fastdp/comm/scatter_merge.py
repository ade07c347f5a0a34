"""Scatters a batch to the replicas by rows, and merges their outputs in row order.

The devices move the rows. On virtual devices in host memory a replica's rows are a view of the batch. A GPU pulls its
rows over its own link. To merge, each replica writes its rows to their place in the merged array from its own thread;
nothing is concatenated.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeGuard

import numpy as np

from fastdp.comm.batch import Resident
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows
from fastdp.tracing.spans import now, span

Arrays = list[np.ndarray]


def scatter(
    arrays: Sequence[Any], shards: Sequence[Rows], devices: Sequence[QueueDevice], into: list[list[Any]] | None = None
) -> list[list[Any]]:
    """Each replica's rows of every array, on its device. The batch must not change until the step is over.

    Args:
        into: a list that gets them one by one: after a failure its length tells which device has failed.
    """
    taken = [] if into is None else into
    resident = type(arrays) is not list and _are_resident(arrays)
    for device, rows in zip(devices, shards, strict=False):
        taken.append(arrays.rows_on(device, rows) if resident else device.take_rows(arrays, rows))  # type: ignore[attr-defined]
    return taken


def stage(arrays: Sequence[Any], shards: Sequence[Rows], devices: Sequence[QueueDevice]) -> bool:
    """Start to prefetch each replica's rows of the next batch; whether all of them are being copied."""
    if type(arrays) is not list and _are_resident(arrays):
        return True
    return all([device.stage_rows(arrays, rows) for device, rows in zip(devices, shards, strict=False)])  # noqa: C419


def _are_resident(arrays: Any) -> TypeGuard[Resident]:
    """Whether the rows of a batch are on the devices already. Lists skip the protocol check, which takes 15 us."""
    return not isinstance(arrays, (list, tuple)) and isinstance(arrays, Resident)


class Merger:
    """Collects the outputs of the replicas of one step.

    The first replica to arrive fixes the number, shapes and dtypes of outputs, and allocates the merged arrays. They
    are new, and belong to the caller. Each replica's worker calls `write` once.

    Args:
        shards: the replicas' rows.
        devices: the replicas' devices, in the same order.
        target: the device that allocates the merged arrays.
        on_host: merge in host memory instead of the target's own.
    """

    def __init__(
        self, shards: Sequence[Rows], devices: Sequence[QueueDevice], target: QueueDevice, *, on_host: bool = True
    ) -> None:
        self._shards = shards
        self._devices = devices
        self._target = target
        self._on_host = on_host
        self._kept: list[Any] = []
        self._lock = threading.Lock()
        self._merged: Arrays | None = None
        self._scalars: list[list[np.ndarray]] = []

    def write(self, rank: int, outputs: Sequence[np.ndarray]) -> None:
        """Copy one replica's outputs to their rows.

        The first axis of an output holds `k >= 1` entries per row; `k` is the same for all replicas. An output without
        axes is averaged over the global batch, weighted by rows (integers are rounded).

        Raises:
            ValueError: an output whose first axis is not a multiple of the replica's rows, or outputs that
                differ from another replica's in number, dtype or the shape of a row.
        """
        if now.recorder is None:
            self._write(rank, outputs)
        else:
            with span("merge", self._devices[rank].compute):
                self._write(rank, outputs)

    def _write(self, rank: int, outputs: Sequence[np.ndarray]) -> None:
        rows = self._shards[rank]
        with self._lock:
            if self._merged is None:
                self._merged = [self._allocate(output, rows, i) for i, output in enumerate(outputs)]
                self._scalars = [[np.zeros(0)] * len(self._shards) for _ in outputs]
        if len(outputs) != len(self._merged):
            raise ValueError(
                f"All replicas must return the same number of outputs. Received: {len(outputs)} from one, "
                f"{len(self._merged)} from another."
            )
        places, placed = [], []
        for i, (merged, output) in enumerate(zip(self._merged, outputs, strict=True)):
            if output.ndim != merged.ndim or output.shape[1:] != merged.shape[1:] or output.dtype != merged.dtype:
                raise ValueError(
                    f"Output {i} must have the same dtype and row shape on all replicas. Received: {output.dtype} of "
                    f"shape {output.shape} from one, but the merged output is {merged.dtype} of shape {merged.shape}."
                )
            if output.ndim == 0:
                self._scalars[i][rank] = output
                continue
            per_row = merged.shape[0] // rows.total
            if output.shape[0] != per_row * rows.count:
                raise ValueError(self._mismatch(i, output, rows))
            places.append(merged[per_row * rows.start : per_row * rows.stop])
            placed.append(output)
        if placed:
            self._devices[rank].put_rows(places, placed)
        self._kept.append(outputs)  # a GPU may still have to read them

    def result(self) -> Arrays:
        """The merged arrays. Only after every replica has written."""
        assert self._merged is not None, "no replica has written its outputs"
        for merged, parts in zip(self._merged, self._scalars, strict=True):
            if merged.ndim == 0:
                merged[...] = self._mean(parts, self._shards)
        return self._merged

    @staticmethod
    def _mean(parts: Sequence[np.ndarray], shards: Sequence[Rows]) -> object:
        """The mean of the replicas' scalars over the global batch. A value equal on all replicas is kept exactly."""
        total = shards[0].total
        weighted = sum(part.item() * rows.count for part, rows in zip(parts, shards, strict=True))
        return round(Fraction(weighted, total)) if isinstance(weighted, int) else weighted / total

    def _allocate(self, output: np.ndarray, rows: Rows, index: int) -> np.ndarray:
        """Allocate one merged output."""
        if output.ndim == 0:
            return np.empty((), output.dtype)
        if output.shape[0] == 0 or output.shape[0] % rows.count:
            raise ValueError(self._mismatch(index, output, rows))
        shape = (output.shape[0] // rows.count * rows.total, *output.shape[1:])
        return self._target.merged(shape, output.dtype, on_host=self._on_host)

    @staticmethod
    def _mismatch(index: int, output: np.ndarray, rows: Rows) -> str:
        """The message for an output that cannot be merged by rows."""
        return (
            f"Output {index} of a replica must have its rows along the first axis (a multiple of {rows.count} "
            f"for {rows.count} rows), so that the replicas' outputs can be merged. Received: shape "
            f"{tuple(output.shape)}."
        )
