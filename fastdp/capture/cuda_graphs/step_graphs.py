"""Joins the recordings of all replicas and their all-reduces: one CUDA graph per GPU for a whole step.

Each replica's step has been recorded separately (`fastdp.capture.cuda_graphs.recording`), in segments that end where a
bucket of gradients is complete. `fastdp.comm.cuda.step_graph.build` joins them with the collectives. The recordings
stay usable: a step that cannot use the step graphs replays them and reduces eagerly.
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
    """What the replicas of one step launch: `graph` holds the graphs of all ranks
    (`fastdp.comm.cuda.step_graph.graph.StepGraph`), `recordings` their memory for rows, draws and results, by rank."""

    graph: Any
    recordings: list[Recording]

    def begin(self) -> Any:
        """Begin the reduction of one step that launches the step graph."""
        return self.graph.begin()


class StepGraphJoiner:
    """Makes and finds the step graphs of a model.

    Args:
        recorder: records the replicas' parts.
        spans: whether a replica spans several devices; a graph can hold only one.
    """

    def __init__(self, recorder: Recorder, spans: bool) -> None:
        self._recorder = recorder
        self._refused = "a replica spans several devices" if spans else ""

    def consider(self, recordings: Sequence[Recording | None], replicas: Mapping[int, ReplicaTensors]) -> str:
        """Join the recordings of a step's replicas, unless they are joined already or must not be.

        Called on the host thread, between steps. If joining fails, warns once and joins nothing from then on.

        Args:
            recordings: by rank; None for a replica without a recording.
            replicas: all replicas, by rank.

        Returns:
            Why the recordings are not joined; empty if they are.

        Raises:
            DeviceTimeoutError: joining took longer than the recorder's time limit.
        """
        if self._refused:
            return self._refused
        found = [recording for recording in recordings if recording is not None]
        if len(found) < len(replicas):
            few = len(recordings) < len(replicas)
            return "fewer rows than devices" if few else "not all replicas are recorded"
        if len(found) == 1 or self.find(recordings) is not None:  # a single replica's recording is already a whole step
            return ""
        ranked = [replicas[rank] for rank in range(len(replicas))]
        if any(replica.device.unsettled for replica in ranked):
            return "a step has failed"
        devices = [replica.device for replica in ranked]
        targets = [replica.gradient_buffers for replica in ranked]
        buckets = targets[0].buckets()
        with self._recorder.alone(), Attempt() as attempt:
            collectives: Any = communicator(devices)
            self._refused = collectives.why_no_step_graph(buckets)
            if not self._refused:
                parts = [recording.parts for recording in found]
                graph = collectives.step_graph(targets, buckets, parts, self._recorder.timeout)
        if isinstance(attempt.error, DeviceTimeoutError):
            raise attempt.error  # the devices hold work that does not end
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
        """The step graph that the recordings of all replicas are part of; None if there is no such graph."""
        found = [recording for recording in recordings if recording is not None]
        graph = found[0].step_graph if found else None
        if graph is None or graph.broken or graph.size != len(recordings):
            return None
        return RecordedStepGraph(graph, found) if all(recording.step_graph is graph for recording in found) else None
