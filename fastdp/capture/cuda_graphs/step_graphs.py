"""Joins the recordings of all replicas and their all-reduces: one CUDA graph per GPU for a whole step.

Each replica's step has been recorded by itself (`fastdp.capture.cuda_graphs.recording`), in segments that end where a
bucket of gradients is complete. `fastdp.comm.cuda.step_graph.build` puts them together with the collectives. The
recordings stay as they are: a step that is not one for the step graphs replays them, and reduces eagerly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.capture.cuda_graphs.recorder import Recorder
from fastdp.capture.cuda_graphs.recording import Recording
from fastdp.capture.faults import Attempt
from fastdp.capture.pure_step import ReplicaTensors
from fastdp.comm.select import communicator
from fastdp.errors import DeviceTimeoutError
from fastdp.warn import warn_user


@dataclass(slots=True)
class RecordedStepGraph:
    """What the replicas of one step launch: `graph` has all ranks' (`fastdp.comm.cuda.step_graph.graph.StepGraph`), and
    `recordings` the memory in which they find rows and draws and leave results, in the order of the ranks."""

    graph: Any
    recordings: list[Recording]

    def begin(self) -> Any:
        """The reduction of one step that runs so."""
        return self.graph.begin()


class StepGraphJoiner:
    """The step graphs of a model.

    Args:
        recorder: who has recorded, or is going to record, the replicas' parts.
        spans: whether a replica spans several devices, of which a graph has one.
    """

    def __init__(self, recorder: Recorder, spans: bool) -> None:
        self._recorder = recorder
        self._refused = "a replica spans several devices" if spans else ""

    def consider(self, recordings: Sequence[Recording | None], replicas: Mapping[int, ReplicaTensors]) -> str:
        """Join the recordings of a step's replicas if they are not yet, and may be.

        On the host thread, between steps. What cannot be joined is told by a warning, and nothing is from then on.

        Args:
            recordings: in the order of the ranks; None where a replica has none.
            replicas: all of them, by rank.

        Returns:
            Why they are not joined; empty where they are.

        Raises:
            DeviceTimeoutError: it took longer than the recorder's time limit.
        """
        if self._refused:
            return self._refused
        found = [recording for recording in recordings if recording is not None]
        if len(found) < len(replicas):
            few = len(recordings) < len(replicas)
            return "fewer rows than devices" if few else "not all replicas are recorded"
        if len(found) == 1 or self.find(recordings) is not None:  # a single replica's graph has all of its step
            return ""
        ranked = [replicas[rank] for rank in range(len(replicas))]
        if any(replica.device.unsettled for replica in ranked):
            return "a step has failed"
        devices = [replica.device for replica in ranked]
        targets = [replica.gradient_buffers for replica in ranked]
        buckets = targets[0].buckets()
        with self._recorder.alone(), Attempt() as attempt:
            collectives: Any = communicator(devices)
            self._refused = collectives.why_not_whole(buckets)
            if not self._refused:
                parts = [recording.parts for recording in found]
                graph = collectives.whole_step(targets, buckets, parts, self._recorder.timeout)
        if isinstance(attempt.error, DeviceTimeoutError):
            raise attempt.error  # work that does not end is on the devices
        self._refused = self._refused or attempt.why
        if self._refused:
            warn_user(
                f'fastdp runs {self._recorder.name!r} as one graph for each bucket of gradients, not as graph="step": '
                f"{self._refused}"
            )
            return self._refused
        for recording in found:
            recording.step_graph = graph
        return ""

    @staticmethod
    def find(recordings: Sequence[Recording | None]) -> RecordedStepGraph | None:
        """The graphs that these recordings, of all replicas, are parts of; None where they are not."""
        found = [recording for recording in recordings if recording is not None]
        graph = found[0].step_graph if found else None
        if graph is None or graph.broken or graph.size != len(recordings):
            return None
        return RecordedStepGraph(graph, found) if all(recording.step_graph is graph for recording in found) else None
