"""Switches torch's deterministic algorithms on while a step runs.

Nothing goes by the clock then (`fastdp.capture.steps`). Everything else of a step repeats anyway: sums are taken in
the order of the replicas, whoever comes first, random draws are indexed by row, and each operation uses the same number
of cores in each step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch

from fastdp.runtime.queue import QueueDevice

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
_REFUSED = "does not have a deterministic implementation"


class _Counted:
    """How many steps that want deterministic algorithms are under way: the last one gives the settings back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = 0
        self._before: tuple[bool, bool, bool, bool] = (False, False, False, False)

    def begin(self) -> None:
        """One more."""
        with self._lock:
            self._steps += 1
            if self._steps == 1:
                warns = torch.is_deterministic_algorithms_warn_only_enabled()
                cudnn = torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()
                self._before = torch.are_deterministic_algorithms_enabled(), warns, *cudnn
                _use(True, False, False, True)

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._steps -= 1
            if self._steps == 0:
                _use(*self._before)


_counted = _Counted()


def _use(deterministic: bool, warn_only: bool, benchmark: bool, cudnn_deterministic: bool) -> None:
    """Torch's settings, which are the whole process's; not by `torch.use_deterministic_algorithms`, which loads the
    compiler."""
    torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch._C._set_cudnn_benchmark(benchmark)
    torch._C._set_cudnn_deterministic(cudnn_deterministic)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Around a step: torch's deterministic algorithms, and no trial of cuDNN's kernels; as before afterwards.

    Raises:
        RuntimeError: an operation has no deterministic form. It is torch's error (or a ReplicaError of it), with a note
            of the layer and of what to do.
    """
    _counted.begin()
    try:
        yield
    except RuntimeError as error:
        if _REFUSED in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on, which Keras 3.15 needs anyway
            error.add_note(
                f"fastdp: {_place(error)}Replace the operation, or wrap the model without deterministic=True."
            )
        raise
    finally:
        _counted.end()


def check_deterministic(devices: Sequence[QueueDevice]) -> None:
    """On GPUs have cuBLAS use a workspace of its own for each stream, without which its results differ.

    Raises:
        RuntimeError: CUDA has started without that, too late to ask for it.
    """
    if not any(device.on_gpu for device in devices) or os.environ.get(_WORKSPACE) in _WORKSPACES:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"`deterministic=True` needs {_WORKSPACE}={_WORKSPACES[0]} in the environment before torch first uses a "
            f"GPU, which it has done already. Received: {_WORKSPACE}={os.environ.get(_WORKSPACE)!r}. "
            "Set it before Python starts."
        )
    os.environ[_WORKSPACE] = _WORKSPACES[0]


def _place(error: BaseException) -> str:
    """The innermost module in the traceback of an error, or of one that it comes from, as a sentence."""
    seen: BaseException | None = error
    while seen is not None:
        found = _innermost(seen.__traceback__)
        if found is not None:
            name = getattr(found, "name", None)
            return f"It is used by {type(found).__name__}{f' ({name!r})' if isinstance(name, str) else ''}. "
        seen = seen.__cause__ or seen.__context__
    return ""


def _innermost(trace: TracebackType | None) -> torch.nn.Module | None:
    """The module whose code comes last in a traceback, containers aside."""
    found = None
    while trace is not None:
        one = trace.tb_frame.f_locals.get("self")
        if isinstance(one, torch.nn.Module) and not hasattr(one, "layers"):
            found = one
        trace = trace.tb_next
    return found
