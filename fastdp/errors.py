"""The errors of a step, which say where and on which rows it went wrong."""

from __future__ import annotations


class ReplicaError(RuntimeError):
    """One replica failed; the step was stopped and no replica's weights were changed.

    The original exception is the `__cause__`. `device` is the device's name; `rows` the half-open range
    of rows of the global batch that the replica was working on, or None outside a batch.
    """

    def __init__(self, message: str, *, device: str, rows: tuple[int, int] | None) -> None:
        super().__init__(message)
        self.device = device
        self.rows = rows


class StepAborted(RuntimeError):
    """Raised inside a replica whose step was stopped because another replica failed."""


class DeviceTimeoutError(TimeoutError):
    """A wait on a device took longer than its limit."""
