"""What the ways of fastdp share: devices, options by mode, and the check that steps run in the form asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastdp.benchmark.fastdp_report import report_of
from fastdp.benchmark.request import Request
from fastdp.runtime.select import set_virtual_devices
from fastdp.tracing.trace import trace

# The arguments of `fastdp.wrap` for each mode. "graph" is compiled steps that are recorded as CUDA graphs.
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"compile": "auto", "graph": "auto"},
    "eager": {"compile": None, "graph": None},
    "traced": {"compile": "trace", "graph": None},
    "compiled": {"compile": "inductor", "graph": None},
    "graph": {"compile": "inductor", "graph": "auto"},
}
# The words of the report for each mode; "auto" may be any of them.
FORMS = {"eager": ("eager",), "traced": ("traced",), "compiled": ("compiled",), "graph": ("graph", "step graph")}
SETTLING_STEPS = 8  # a torch module's captured steps are compared with eager ones for some steps
COMPILE_SECONDS = 900.0
FINISH_SECONDS = 600.0
TRACED_STEPS = 5


def choose_devices(request: Request) -> None:
    """Make virtual devices where the request is not about GPUs.

    Raises:
        NotImplementedError: graphs, which only GPUs have.
    """
    if request.kind != "gpu":
        if request.mode == "graph":
            raise NotImplementedError(
                "CUDA graphs need GPUs; virtual devices in host memory have none. Use --mode compiled or traced."
            )
        set_virtual_devices(request.devices, kind="host")


def free_devices(request: Request) -> None:
    """Close the virtual devices that `choose_devices` has made."""
    if request.kind != "gpu":
        set_virtual_devices(0)


def settle(request: Request, parallel: Any, train: Callable[[int], Any]) -> None:
    """Train until steps run in the form that the mode asks for.

    Raises:
        RuntimeError: they do not; the message has the reason that fastdp gives.
        DeviceTimeoutError: the compiler took too long.
    """
    train(1 if request.mode == "eager" else SETTLING_STEPS)
    if request.mode == "auto":
        return  # what the clock decides later, the warm-up waits for
    parallel.wait_compiled(COMPILE_SECONDS)
    train(2)
    told = report_of(parallel)
    if told["how"] not in FORMS[request.mode]:
        raise RuntimeError(f"asked for {request.mode} steps, but they run as {told['how']} ones: {told['why']}")


def recorder(train: Callable[[int], Any]) -> Callable[[str], None]:
    """A function that trains a few steps and writes their Chrome trace to a path."""

    def record(path: str) -> None:
        with trace(path):
            train(TRACED_STEPS)

    return record


def finish(parallel: Any) -> None:
    """Wait until the devices of a parallel model are done.

    Raises:
        DeviceTimeoutError: they were not within ten minutes.
    """
    began = time.monotonic()
    for device in parallel.devices:
        device.synchronize(max(0.0, FINISH_SECONDS - (time.monotonic() - began)))


class AutoSettled:
    """Whether "auto" has decided how steps run, as far as the report tells."""

    def __init__(self, request: Request, parallel: Any) -> None:
        self._auto, self._parallel = request.mode == "auto", parallel

    def __call__(self) -> bool:
        """True where no compiler is at work, and no form is being timed."""
        if self._parallel.compiling:
            return False
        return not self._auto or not _undecided(report_of(self._parallel)["why"])


def _undecided(why: str) -> bool:
    return any(
        words in why for words in ("not trained for long enough", "being compiled", "being compared", "being timed")
    )
