"""The record of each batch shape: whether its steps are traced, compiled or recorded, and what `report()` tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from fastdp.capture.captured_form import CapturedForm, Run
from fastdp.capture.compile.compiler import BackgroundCompiler, Job
from fastdp.capture.cuda_graphs.recording import Recording
from fastdp.capture.pure_step import PureFunction
from fastdp.capture.speed_trial import Decision, SpeedTrial
from fastdp.comm.context import Context

CapturedT = TypeVar("CapturedT", bound=CapturedForm)


@dataclass(slots=True, eq=False)
class Shape(Generic[CapturedT]):
    """The record of the steps of one shape of a replica's rows. `name` tells shapes apart in other processes too.

    `remembered` is what an earlier run decided, and `key` the name of that decision (`fastdp.capture.decisions`).
    """

    rows: int
    of: int
    name: str = ""
    steps: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    captured: CapturedT | None = None
    jobs: list[Job] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # their results so far
    compiled: bool = False
    since: int = 0  # steps before the present form (traced or compiled) was in use
    no_graph: str = ""
    ran_step_graph: bool = False  # the latest step launched one graph per GPU, including its collectives
    step_graph_steps: int = 0
    no_step_graph: str = ""
    trial: SpeedTrial | None = None
    why: str = "seen once so far"
    key: str = ""
    remembered: Decision | None = None

    @property
    def is_replayed(self) -> bool:
        """Whether steps run as captured now."""
        return self.captured is not None and not self.captured.runs_eagerly

    @property
    def stays_eager(self) -> bool:
        """Whether a trial has found eager steps to be the fastest, in this run or in an earlier one."""
        if self.remembered is not None and self.remembered.form == "eager":
            return True
        return self.trial is not None and self.trial.is_over and self.trial.chosen == "eager"

    def go_back(self, why: str) -> None:
        """Note that the compiled form has failed, and the traced one stays."""
        self.jobs, self.runs, self.trial, self.compiled, self.why = [], [], None, False, why

    @property
    def is_settled(self) -> bool:
        """Whether further steps run as compiled, without anything to decide or to compare."""
        captured = self.captured
        return (
            captured is not None
            and self.compiled
            and (self.trial is None or self.trial.is_over)
            and not (captured.checks or captured.runs_eagerly or captured.failed or captured.disagreed)
        )

    def note(self, seconds: float) -> None:
        """Add the duration of a step."""
        self.steps += 1
        self.seconds += seconds
        self.recent = [*self.recent[-4:], seconds]
        checked = self.captured is not None and self.captured.checks > 0
        if self.trial is not None and not checked:
            self.trial.note(seconds)
        if self.captured is not None and checked:
            self.captured.checks -= 1

    def has_runs(self, compiler: BackgroundCompiler) -> bool:
        """Take the results of jobs that have ended, in their order. Whether these are all.

        Raises:
            CompileError: a job has failed.
        """
        while len(self.runs) < len(self.jobs) and compiler.done(self.jobs[len(self.runs)]):
            self.runs.append(compiler.result(self.jobs[len(self.runs)]))
        return len(self.runs) == len(self.jobs)


def entry_of(shape: Shape[Any]) -> dict[str, Any]:
    """The entry of one shape in `report()`."""
    slower = shape.trial.why if shape.trial is not None else ""
    how = "eager" if shape.captured is None else "compiled" if shape.compiled else "traced"
    how = how if shape.trial is None else shape.trial.chosen
    recordings = list(shape.captured.recordings.values()) if shape.captured is not None else []
    if recordings:
        how = "step graph" if shape.ran_step_graph else "graph"
    entry: dict[str, Any] = {"how": how, "rows": shape.rows, "of": shape.of, "steps": shape.steps}
    joined = f"no graph of the whole step: {shape.no_step_graph}" if recordings and shape.no_step_graph else ""
    compared = "being compared with eager steps" if shape.captured is not None and shape.captured.checks else ""
    whys = [why for why in (shape.why, compared, shape.no_graph, slower, joined) if why]
    if whys:
        entry["why"] = "; ".join(whys)
    if shape.captured is not None:
        entry |= {"operations": shape.captured.operations, "trace_seconds": shape.captured.seconds}
    if shape.compiled and shape.jobs:
        entry["compile_seconds"] = sum(job.seconds for job in shape.jobs)
        entry["load_seconds"] = sum(job.load_seconds for job in shape.jobs)
    if shape.remembered is not None:
        entry["remembered"] = shape.remembered.form
    if recordings:
        entry |= {"replicas": len(recordings), "segments": recordings[0].segments}
        entry |= {
            "record_seconds": sum(r.seconds for r in recordings),
            "graph_nbytes": sum(r.nbytes for r in recordings),
        }
    if shape.step_graph_steps:
        entry["whole_steps"] = shape.step_graph_steps
    return entry


def recordings_of(replicas: Sequence[Shape[Any]]) -> list[Recording | None]:
    """The recording of each rank's step, for shapes in the order of the ranks; None without a recording."""
    return [
        shape.captured.recordings.get(rank) if shape.captured is not None else None
        for rank, shape in enumerate(replicas)
    ]


def key_of(context: Context, step: PureFunction) -> Any:
    """What a graph depends on: the number and share of rows, shapes, dtypes, and the model's own key."""
    rows = context.rows
    return rows.count, rows.total, context.wants_outputs, context.batch.shapes, step.key(context)


def own_rows(context: Context) -> list[np.ndarray]:
    """A replica's rows of the arrays of the global batch, as views."""
    rows = context.rows
    return [array[rows.start : rows.stop] for array in context.batch]


def are_recorded(find: Callable[[Context], Any], contexts: Sequence[Context]) -> bool:
    """Whether the next steps of these replicas are recorded, so that to run them is to launch graphs.

    Args:
        find: `Captures.find`. Its results are noted in the contexts.
    """
    for context in contexts:
        context.found = found = find(context)
        if found is None or found.checks or found.disagreed or context.index not in found.recordings:
            return False
    return True
