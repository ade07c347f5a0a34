"""The base class of what is captured, a step or a pass: how it is compared, compiled, tried, and recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule

from fastdp.capture.cuda_graphs.recording import Graphs, Recording
from fastdp.capture.faults import Attempt
from fastdp.capture.graph.products import Product
from fastdp.capture.pure_step import ReplicaTensors
from fastdp.comm.context import Context
from fastdp.tensors.threads import one_core

Run = Callable[..., Sequence[torch.Tensor]]


class CapturedForm(ABC):
    """What was traced for replicas with a given number of rows, and is used traced or compiled.

    Attributes:
        checks: how many of the coming steps must also run eagerly, for a comparison.
        disagreed: what was different in one of them; empty if nothing was.
        runs_eagerly: it is not used for now.
        operations: their number.
        seconds: how long tracing took.
        one_core: whether each operation on a CPU is best computed on one core (`fastdp.capture.graph.cores`).
        recordings: CUDA graphs by rank.
        meets: whether replicas meet in the middle of it, so that it is neither compiled nor recorded.
    """

    def __init__(self) -> None:
        self.checks, self.disagreed, self.runs_eagerly = 0, "", False
        self.operations, self.seconds, self.meets, self.one_core = 0, 0.0, False, False
        self.recordings: dict[int, Recording] = {}

    def cores(self, available: int) -> int:
        """How many cores a compiled operation uses, with so many available to a replica."""
        return 1 if self.one_core else max(1, available)

    def on_cores(self) -> AbstractContextManager[None]:
        """Held while a replica runs what was captured: its operations use as many cores as `cores` says."""
        return one_core() if self.one_core else nullcontext()

    def compare(self, difference: Callable[[], str]) -> None:
        """Note what differs from an eager run, or that the comparison has failed.

        Args:
            difference: names what differs; empty if nothing does.
        """
        with Attempt() as attempt:
            why = difference()
            self.disagreed = self.disagreed or why
        if attempt.error is not None:
            self.disagreed = self.disagreed or f"an error ({attempt.why})"

    @abstractmethod
    def to_compile(self, onednn_is_faster: Callable[[Product], bool]) -> list[GraphModule]:
        """The graphs to compile.

        Args:
            onednn_is_faster: which matrix products on a CPU go to oneDNN.

        Raises:
            NotImplementedError: a graph has indices whose range fastdp does not know.
        """

    @abstractmethod
    def checked(self, runs: Sequence[Run]) -> Any:
        """What `use` takes: the compiled graphs of `to_compile`, whose invalid indices and failures are not fatal."""

    @property
    @abstractmethod
    def failed(self) -> str:
        """Why the compiled form is no longer used; empty if it has not failed."""

    @abstractmethod
    def use(self, compiled: Any) -> None:
        """Use a compiled form."""

    @abstractmethod
    def use_traced(self) -> None:
        """Return to the traced form."""

    def record(self, graphs: Graphs, replica: ReplicaTensors, batch: Sequence[Any], context: Context) -> None:
        """Record it for the replica of `context`, on its worker. Later steps use the recording.

        Raises:
            RuntimeError: it does something that cannot be recorded.
        """
        raise RuntimeError("what is captured here is not recorded")
