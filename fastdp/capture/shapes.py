"""The record of each batch shape: whether its steps are traced, compiled or recorded, and what `report()` tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdp.capture.compile.compiler import Job
from fastdp.capture.cuda_graphs.recording import Recording
from fastdp.capture.speed_trial import SpeedTrial
from fastdp.capture.trace import Captured
from fastdp.comm.context import Context
from fastdp.program.keras.program import KerasProgram
from fastdp.shard import Rows


@dataclass(slots=True, eq=False)
class Shape:
    """What is known of the steps of one shape of a replica's rows."""

    rows: int
    of: int
    steps: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    captured: Captured | None = None
    job: Job | None = None
    compiled: bool = False
    since: int = 0  # steps before the present way of replaying
    no_graph: str = ""
    is_whole: bool = False  # the latest step was one graph for each GPU, with its collectives
    whole_steps: int = 0
    not_whole: str = ""
    trial: SpeedTrial | None = None
    why: str = "seen once so far"


def entry_of(shape: Shape) -> dict[str, Any]:
    """What is to be said about one shape."""
    slower = shape.trial.why if shape.trial is not None else ""
    how = "compiled" if shape.compiled and not slower else "eager" if shape.captured is None else "traced"
    recordings = list(shape.captured.recordings.values()) if shape.captured is not None else []
    if recordings:
        how = "step graph" if shape.is_whole else "graph"
    entry: dict[str, Any] = {"how": how, "rows": shape.rows, "of": shape.of, "steps": shape.steps}
    not_whole = f"no graph of the whole step: {shape.not_whole}" if recordings and shape.not_whole else ""
    if shape.why or shape.no_graph or slower or not_whole:
        entry["why"] = "; ".join(filter(None, (shape.why, shape.no_graph, slower, not_whole)))
    if shape.captured is not None:
        entry |= {"operations": shape.captured.operations, "trace_seconds": shape.captured.seconds}
    if shape.compiled and shape.job is not None:
        entry |= {"compile_seconds": shape.job.seconds, "load_seconds": shape.job.load_seconds}
    if recordings:
        entry |= {"replicas": len(recordings), "segments": recordings[0].segments}
        entry |= {
            "record_seconds": sum(r.seconds for r in recordings),
            "graph_nbytes": sum(r.nbytes for r in recordings),
        }
    if shape.whole_steps:
        entry["whole_steps"] = shape.whole_steps
    return entry


def recordings_of(replicas: Sequence[Shape]) -> list[Recording | None]:
    """What is recorded of each rank's step, of shapes in the order of the ranks."""
    return [
        shape.captured.recordings.get(rank) if shape.captured is not None else None
        for rank, shape in enumerate(replicas)
    ]


def key_of(batch: Sequence[np.ndarray], context: Context, program: KerasProgram) -> Any:
    """What a graph depends on: rows and their share, shapes, dtypes, and whether regularizers are counted."""
    shapes = tuple((array.shape[1:], array.dtype.str) for array in batch)
    first = context.rank == 0 and program.is_regularized
    rows: Rows = context.rows
    return rows.count, rows.total, first, context.wants_outputs, shapes, context.structure.dtypes
