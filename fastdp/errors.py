"""The errors of fastdp: they name the device and the rows where a step went wrong."""

from __future__ import annotations

import functools


class ReplicaError(RuntimeError):
    """One replica failed; the step was stopped and no replica's weights were changed.

    The original exception is the `__cause__`. `device` is the device's name. `rows` is the half-open range
    of global-batch rows that the replica was processing, or None outside a batch. `verb` is the part of the step:
    "scatter", "run", "reduce", "update" or "merge".
    """

    rows_cut = False  # the rows of the device run in more parts from now on, so that the work may be tried again

    def __init__(self, message: str, *, device: str, rows: tuple[int, int] | None, verb: str = "run") -> None:
        super().__init__(message)
        self.device = device
        self.rows = rows
        self.verb = verb

    def __str__(self) -> str:
        # A subclass may also be a KeyError or a UnicodeError, which format their arguments differently.
        return str(self.args[0])


class StepAborted(RuntimeError):
    """Raised inside a replica whose step was stopped because another replica failed."""


class DeviceTimeoutError(TimeoutError):
    """A wait on a device took longer than its limit."""


class DeviceLostError(RuntimeError):
    """A device is lost: it does not answer any more, or a failure has left it unusable. The message says why."""


class GraphsLostError(DeviceLostError):
    """The graphs of a forward pass lie on a device that is lost, or on replicas that were made anew since."""


class CannotSplitError(RuntimeError):
    """What a device computes from all of its rows cannot be computed from parts of them. The message says what."""


class OthersBusyError(DeviceTimeoutError):
    """A step of another thread goes on for so long that it may hang. What needs all devices is tried again later."""


class ProcessError(RuntimeError):
    """Another process of the same training failed, ended, or did not come. The message names its rank."""


def replica_error_class(cause: type[BaseException]) -> type[ReplicaError]:
    """A subclass of ReplicaError and, if `cause` is built in, of `cause`, so that `except ValueError` works."""
    if cause.__module__ != "builtins" or not issubclass(cause, Exception):
        return ReplicaError
    return _both(cause)  # type: ignore[arg-type]


@functools.cache  # a class costs kilobytes, and a run may survive thousands of errors
def _both(cause: type[BaseException]) -> type[ReplicaError]:
    """A subclass of both, as far as Python allows it."""
    try:
        both = type(f"Replica{cause.__name__}", (ReplicaError, cause), {"__module__": ReplicaError.__module__})
        both("", device="", rows=None)
    except TypeError:  # already a base of ReplicaError, or needs more than a message (ExceptionGroup)
        return ReplicaError
    return both


class NotCapturable(Exception):
    """A step does something that cannot be recorded once and replayed. The message says what."""
