"""Scatter a batch to replicas, and merge their outputs back in row order.

On virtual devices all memory is host memory: a replica's rows are a view of the batch, and merging means
that each replica writes its rows to their place in the merged array, from its own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fastdp.shard import Rows

Arrays = list[np.ndarray]


def count_rows(arrays: Sequence[np.ndarray], names: Sequence[str] | None = None) -> int:
    """The number of rows that all arrays of a batch have.

    Raises:
        ValueError: no array, an array without a first axis, arrays of unequal length, or no rows.
    """
    labels = names or [f"array {i}" for i in range(len(arrays))]
    if not arrays:
        raise ValueError("A batch needs at least one array. Received an empty batch.")
    scalars = [label for label, array in zip(labels, arrays, strict=True) if array.ndim == 0]
    if scalars:
        raise ValueError(
            f"Every array of a batch needs rows along its first axis, but {scalars} have no axis. Pass one "
            "value per row (for one constant, np.full(rows, value))."
        )
    rows = {label: array.shape[0] for label, array in zip(labels, arrays, strict=True)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"All arrays of a batch must have the same number of rows. Received: {rows}")
    (total,) = set(rows.values())
    if total == 0:
        raise ValueError(f"A batch must have at least one row. Received: {rows}")
    return total


def scatter(arrays: Sequence[np.ndarray], shards: Sequence[Rows]) -> list[Arrays]:
    """Each replica's rows of every array: views, no copies; valid as long as the batch is."""
    return [[array[rows.start : rows.stop] for array in arrays] for rows in shards]


class Merger:
    """Collects the outputs of the replicas of one step.

    The first replica to arrive fixes number, shapes and dtypes, and allocates the merged arrays (fresh ones:
    they are the caller's to keep). `write` may be called from any thread, once per replica.
    """

    def __init__(self, shards: Sequence[Rows]) -> None:
        self._shards = shards
        self._lock = threading.Lock()
        self._merged: Arrays | None = None
        self._scalars: list[list[np.ndarray]] = []

    def write(self, rank: int, outputs: Sequence[np.ndarray]) -> None:
        """Copy one replica's outputs to their rows.

        An output holds `k` entries along its first axis for each row, `k >= 1`, the same for all replicas.
        An output without axes is averaged over the global batch, weighted by rows (integers are rounded).

        Raises:
            ValueError: an output whose first axis is not a multiple of the replica's rows, or outputs that
                differ from another replica's in number, dtype or the shape of a row.
        """
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
        for i, (merged, output) in enumerate(zip(self._merged, outputs, strict=True)):
            if output.ndim != merged.ndim or output.shape[1:] != merged.shape[1:] or output.dtype != merged.dtype:
                raise ValueError(
                    f"Output {i} must have the same dtype and the same shape of a row on all replicas. Received: "
                    f"{output.dtype} of shape {output.shape} from one, {merged.dtype} that would be merged to "
                    f"{merged.shape} from another."
                )
            if output.ndim == 0:
                self._scalars[i][rank] = output
                continue
            per_row = merged.shape[0] // rows.total
            if output.shape[0] != per_row * rows.count:
                raise ValueError(self._mismatch(i, output, rows))
            merged[per_row * rows.start : per_row * rows.stop] = output

    def result(self) -> Arrays:
        """The merged arrays. Only after every replica has written."""
        assert self._merged is not None, "no replica has written its outputs"
        for merged, parts in zip(self._merged, self._scalars, strict=True):
            if merged.ndim == 0:
                merged[...] = self._mean(parts)
        return self._merged

    def _mean(self, parts: Sequence[np.ndarray]) -> object:
        """The mean of the replicas' scalars over the global batch. A value that all share stays as it is."""
        total = self._shards[0].total
        weighted = sum(part.item() * rows.count for part, rows in zip(parts, self._shards, strict=True))
        return round(Fraction(weighted, total)) if isinstance(weighted, int) else weighted / total

    def _allocate(self, output: np.ndarray, rows: Rows, index: int) -> np.ndarray:
        """Room for one merged output."""
        if output.ndim == 0:
            return np.empty((), output.dtype)
        if output.shape[0] == 0 or output.shape[0] % rows.count:
            raise ValueError(self._mismatch(index, output, rows))
        return np.empty((output.shape[0] // rows.count * rows.total, *output.shape[1:]), output.dtype)

    @staticmethod
    def _mismatch(index: int, output: np.ndarray, rows: Rows) -> str:
        """The message for an output that cannot be merged by rows."""
        return (
            f"Output {index} of a replica must have its rows along the first axis (a multiple of {rows.count} "
            f"for {rows.count} rows), so that the replicas' outputs can be merged. Received: shape "
            f"{tuple(output.shape)}."
        )
