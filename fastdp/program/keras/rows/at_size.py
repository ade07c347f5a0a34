"""Compares what a model gives for all rows of a batch with what it gives for the rows of each device.

Other trials have three rows. A layer may do something else for many: `if x.shape[0] > 32`, an expert that takes the
first hundred rows. So what they have found is checked once for each number of rows that steps really have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastdp.program.keras.batch import Structure
from fastdp.program.keras.replica import ReplicaContext
from fastdp.program.keras.rows.probe import Effects, seed_generators
from fastdp.program.keras.rows.trials import FAILURES
from fastdp.program.keras.rows.units import Recorder
from fastdp.shard import Rows
from fastdp.tensors.row_effects import MIXED_TOLERANCE, Layout

MOST_SIZES = 64  # numbers of rows that are looked at
_MOST = 1 / 500  # of the entries of an output may differ: rounding decides between equal ones


class _Forgetful(Recorder):
    """Records nothing: the tensors of all rows would fill the memory."""

    def call(self, run: Callable[..., Any], operation: Any, args: Any, kwargs: Any, state: ReplicaContext) -> Any:
        """Run a unit."""
        return run(operation, *args, **kwargs)


def model_at_size(
    effects: Effects, batch: Sequence[np.ndarray], structure: Structure
) -> Callable[[int, int], list[torch.Tensor]]:
    """A function that gives the outputs of a model for some rows of a batch, by the first and the last."""

    def outputs(start: int, stop: int) -> list[torch.Tensor]:
        return effects._try_rows(batch, structure, start, stop, recorder=_Forgetful()).outputs

    return outputs


def differs_at_size(
    outputs: Callable[[int, int], Sequence[Any]], layouts: Sequence[Layout] | None, parts: Sequence[Rows]
) -> bool:
    """Whether an output for all rows differs from those for the devices' rows, put together.

    What fails here, or needs more memory than there is, is left to the step.

    Args:
        outputs: gives outputs for some rows: `outputs(start, stop)`.
        layouts: how they depend on the rows; None where they lie first.
        parts: the rows of each device.
    """

    def tried(start: int, stop: int) -> Sequence[Any]:
        seed_generators()
        return outputs(start, stop)

    try:
        whole = tried(0, parts[0].total)
        every = [tried(rows.start, rows.stop) for rows in parts]
    except (*FAILURES, torch.OutOfMemoryError, MemoryError):
        return False
    if any(len(one) != len(whole) for one in every):
        return False
    for i, output in enumerate(whole):
        axis = 0 if layouts is None else layouts[i].axis
        if not isinstance(output, torch.Tensor) or axis is None or axis >= output.ndim:
            continue
        if not _are_near(output, [one[i] for one in every], axis):
            return True
    return False


def _are_near(whole: torch.Tensor, pieces: Sequence[torch.Tensor], axis: int) -> bool:
    """Whether the pieces, put together, are the whole, but for rounding."""
    shapes = {(*piece.shape[:axis], *piece.shape[axis + 1 :]) for piece in pieces}
    if shapes != {(*whole.shape[:axis], *whole.shape[axis + 1 :])}:
        return False
    other = torch.cat(list(pieces), axis)
    if other.shape != whole.shape or not whole.numel():
        return other.shape == whole.shape
    one, other = whole.double(), other.double()
    finite = one[torch.isfinite(one)].abs()
    tolerance = MIXED_TOLERANCE * max(float(finite.max()) if finite.numel() else 0.0, 1e-6)
    tolerance *= 1.0 if whole.dtype.itemsize >= 4 else 20.0
    near = ((one - other).abs() <= tolerance) | (one == other) | (torch.isnan(one) & torch.isnan(other))
    return float((~near).double().mean()) <= _MOST
