"""Finds NaN and Inf in the loss and the gradient of a step before its update, and whose rows they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastdp.buffers import FlatBuffers, storage_dtype
from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.step import Operation, Step
from fastdp.warn import warn_user

_MOST_NAMES = 3


class FiniteCheck:
    """What an engine does about numbers that are not finite: `on_nonfinite` of `fastdp.wrap`.

    Args:
        how: "raise" or "skip".
        replicas: the engine's replicas.

    Attributes:
        skipped: the number of updates that were skipped.
    """

    def __init__(self, how: str, replicas: ReplicaGroup) -> None:
        self._how, self._replicas = how, replicas
        self.skipped = 0

    @property
    def applies(self) -> bool:
        """Whether the next step is checked. Infinite gradients are a part of loss scaling."""
        return not self._replicas.program.scales_loss

    def passes(self, operation: Operation, replica: Replica) -> bool:
        """Whether a replica may make the update. On its device's worker, with the reduced gradient in its buffers.

        All replicas have the same bits, so all decide the same.

        Raises:
            FloatingPointError: it may not, and that is to be an error.
        """
        totals = operation.totals
        assert totals is not None
        loss = self._replicas.program.loss_of(totals)
        if not totals.reduced:
            # A window that is skipped is skipped whole, when it is reduced. One with an error goes on without the step.
            own = are_finite(replica.gradients)
            if self._how == "raise" and not (own and math.isfinite(loss)):
                operation.blamed = self._culprit(operation) if own else replica.rank
                raise FloatingPointError(_what(loss, replica.gradients))
            return True
        if math.isfinite(loss) and are_finite(replica.gradients):
            return True
        if self._how == "skip":
            operation.skipped = True
            replica.skip(totals)
            return False
        self.fail(operation, loss, replica.gradients)
        return False

    def fail(self, operation: Operation, loss: float, gradients: FlatBuffers) -> None:
        """Raise the error of an operation, in the name of the replica whose rows it comes from, if that can be told."""
        rank = self._culprit(operation)
        operation.blamed = rank
        raise FloatingPointError(f"{_what(loss, gradients)}{'' if rank is not None else _OF_ALL}")

    def check_sum(self, step: Step, first: Replica) -> None:
        """As `passes`, for a backward pass whose gradient somebody else uses. On the first device's worker.

        Raises:
            FloatingPointError: it has a NaN or an infinite number, and that is to be an error.
        """
        if are_finite(first.gradients):
            return
        step.skipped = True
        if self._how == "raise":
            try:
                self.fail(step, 0.0, first.gradients)
            except FloatingPointError as error:
                step.fail(first.rank, error, "reduce")
                raise

    def note(self, operation: Operation) -> None:
        """Count an operation that was skipped. The first one is a warning. On the host thread."""
        self.skipped += 1
        if self.skipped > 1:
            return
        rank = self._culprit(operation)
        gradients = self._replicas.every[0].gradients
        where = "the global batch"
        if rank is not None:
            where = f"the rows on {self._replicas.devices[rank].name}{operation.rows_of(rank)[0]}"
        loss = self._replicas.program.loss_of(operation.totals) if operation.trains and operation.totals else 0.0
        warn_user(
            f'fastdp: a step changed nothing, as on_nonfinite="skip" asks: {_what(loss, gradients)} This came from '
            f"{where}. Further ones are counted in `engine.skipped_steps` alone."
        )

    def _culprit(self, operation: Operation) -> int | None:
        """The replica whose loss or gradient is not finite; None where the sums alone show it."""
        if not isinstance(operation, Step):
            return None
        program = self._replicas.program
        for rank, result in enumerate(operation.results):
            if result is not None and result.sums.size and not math.isfinite(program.loss_of_one(result.sums)):
                return rank
        if operation.across is not None:  # the gradient may be another process's
            return None
        if len(operation.shards) == 1:
            return 0
        if len(self._replicas.ends(1)[1]) > 1:  # all of them hold the sum by now
            return None
        active = self._replicas.every[1 : len(operation.shards)]
        return next((replica.rank for replica in active if not are_finite(replica.gradients)), 0)


_OF_ALL = " The devices' own gradients are no more: which of them it came from is unknown."


def are_finite(flat: FlatBuffers) -> bool:
    """Whether all numbers are finite. Waits for them, where a GPU holds them."""
    return all(_is_finite(buffer, dtype) for dtype, buffer in flat.buffers.items())


def _is_finite(buffer: np.ndarray, dtype: str) -> bool:
    """Whether all numbers of an array of NumPy or CuPy are finite."""
    if not buffer.size:
        return True
    if dtype == "bfloat16":  # which lies in memory as uint16
        return bool(((buffer & 0x7F80) != 0x7F80).all())
    if storage_dtype(dtype).kind not in "fc" or storage_dtype(dtype).name != dtype:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(buffer.sum()):  # one pass without memory; a sum may overflow where its terms do not
            return True
        return bool(np.isfinite(buffer).all())


def _what(loss: float, gradients: FlatBuffers) -> str:
    """What is not finite, in words."""
    if not math.isfinite(loss):
        return f"The loss is {loss}."
    return f"The gradient of {_names(gradients)} has NaN or infinite numbers."


def _names(flat: FlatBuffers) -> str:
    """The names of the first parameters whose gradient is not finite."""
    pairs = zip(flat.specs, flat.views, strict=True)
    names: Sequence[str] = [spec.name for spec, view in pairs if not _is_finite(view, spec.dtype)]
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    return f"{shown} and {len(names) - _MOST_NAMES} others" if len(names) > _MOST_NAMES else shown
