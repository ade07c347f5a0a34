"""NVTX ranges of the names of spans, for Nsight Systems and other tools that show them (package `nvtx`)."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from fastdp.tracing import spans

VARIABLE = "FASTDP_NVTX"


class NvtxRanges:
    """Ranges in NVTX's domain "fastdp".

    Raises:
        ImportError: the package `nvtx` is not installed.
    """

    def __init__(self) -> None:
        try:
            nvtx: Any = importlib.import_module("nvtx")
        except ModuleNotFoundError as error:
            raise ImportError(
                "NVTX ranges need the package `nvtx`. Install it with: pip install 'fastdp[nvtx]', or leave them out "
                f"(nvtx=False, and no {VARIABLE})."
            ) from error
        self._domain = nvtx.get_domain("fastdp")

    def push(self, name: str) -> None:
        """Begin a range inside those that are open on this thread."""
        self._domain.push_range(self._domain.get_event_attributes(message=name))

    def pop(self) -> None:
        """End the innermost range of this thread."""
        self._domain.pop_range()


@functools.cache
def ranges() -> NvtxRanges:
    """The ranges of this process.

    Raises:
        ImportError: as in `NvtxRanges`.
    """
    return NvtxRanges()


def follow_environment() -> None:
    """Mark ranges from now on if FASTDP_NVTX=1 asks for it. Called when an engine is made.

    Raises:
        ImportError: as in `NvtxRanges`.
        ValueError: the variable is neither 0 nor 1.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", "0"):
        return
    if text != "1":
        raise ValueError(f"The environment variable {VARIABLE} must be 0 or 1. Received: {text!r}")
    _always()


@functools.cache
def _always() -> None:
    """Mark ranges until the process ends."""
    spans.start(ranges=ranges())
