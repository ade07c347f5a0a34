"""Decides which batch shapes of a replica are recorded as CUDA graphs, and keeps the recordings."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.capture.captured_form import CapturedForm
from fastdp.capture.cuda_graphs.recording import Graphs, Recording, TorchGraphs
from fastdp.capture.faults import Attempt
from fastdp.capture.pure_step import ReplicaTensors
from fastdp.comm.context import Context
from fastdp.options import Options
from fastdp.runtime.queue import QueueDevice
from fastdp.warn import warn_user

# Limit per replica. Each recording owns memory for everything that a step computes.
MOST_RECORDED = 4


def chosen_graphs(options: Options, devices: Sequence[QueueDevice]) -> str:
    """How captured steps are recorded on these devices: "auto", "step", or "" for not at all."""
    if options.graph is None or not devices[0].on_gpu:
        return ""
    return "step" if options.graph == "step" else "auto"


def warn_of_graphs(options: Options, devices: Sequence[QueueDevice]) -> None:
    """Warn if the options request graphs but there is nothing to record."""
    if options.graph in ("auto", None):
        return
    if not devices[0].on_gpu:
        warn_user(
            f'graph="{options.graph}" has nothing to record on virtual devices in host memory: steps run without CUDA '
            'graphs. Leave it "auto", or use GPUs.'
        )
    elif options.compile is None:
        warn_user(
            f'graph="{options.graph}" records captured steps, and compile=None captures none: steps run eagerly '
            'unless you call compile(jit_compile=True). Pass compile="trace".'
        )


class Recorder:
    """Records captured steps on a program's replicas, between steps.

    Args:
        name: the model's name, for warnings.
        alone: makes a context manager within which no engine runs a step; held while a replica records.
        parts: recordings will become parts of step graphs (`fastdp.capture.cuda_graphs.step_graphs`).
        timeout: time limit of one recording in seconds.
    """

    def __init__(self, name: str, alone: Callable[[], Any], *, parts: bool = False, timeout: float = 600.0) -> None:
        self.name, self.alone, self.parts, self.timeout = name, alone, parts, timeout
        self._graphs: dict[int, Graphs] = {}
        self._recorded: defaultdict[int, weakref.WeakSet[Recording]] = defaultdict(weakref.WeakSet)
        self._refused = ""

    def consider(self, captured: CapturedForm, replica: ReplicaTensors, batch: Sequence[Any], context: Context) -> str:
        """Record a captured step on the replica of `context`, unless it is recorded already or must not be.

        Called on the host thread, between steps. If recording fails, warns once and records nothing from then on.

        Returns:
            Why the step is not recorded; empty if it is.

        Raises:
            DeviceTimeoutError: recording took longer than the time limit.
        """
        rank = context.rank
        if rank in captured.recordings:
            return ""
        if self._refused or replica.device.unsettled:  # a failed step may have left work behind: the next one cleans up
            return self._refused
        if len(self._recorded[rank]) >= MOST_RECORDED:
            return f"no CUDA graph: {MOST_RECORDED} other shapes are recorded"
        failure = self._record(captured, replica, batch, context)
        if failure:
            captured.recordings = {}
            self._refused = f"no CUDA graph: {failure}"
            message = f"fastdp runs {self.name!r} without CUDA graphs: recording one failed with {failure}"
            warn_user(message)
        else:
            self._recorded[rank].add(captured.recordings[rank])
        return self._refused

    def _record(self, captured: CapturedForm, replica: ReplicaTensors, batch: Sequence[Any], context: Context) -> str:
        """Record on the replica's worker and wait. Returns the error in words, or an empty string."""
        attempt = Attempt()
        device, rank = replica.device, context.rank

        def work() -> None:
            with attempt:
                if rank not in self._graphs:
                    self._graphs[rank] = TorchGraphs(device, self.parts)
                captured.record(self._graphs[rank], replica, batch, context)

        with self.alone():
            device.compute.enqueue(work)
            device.compute.record().synchronize(self.timeout)
        return attempt.why
