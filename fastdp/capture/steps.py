"""Decides for each batch shape when its training steps are traced, compiled and recorded.

The first step of a batch shape runs eagerly, so that training begins at once. Then the step is traced
(`fastdp.capture.trace`) into a graph that later steps replay. Meanwhile TorchInductor compiles the graph in a separate
process (`fastdp.capture.compile.compiler`); the compiled step takes over between two steps. Replicas with the same
number of rows share a graph. The `mode` selects how far this goes:

    "trace"      traced before the second step of a shape
    "inductor"   traced and compiled
    "auto"       traced, and later compiled, once a shape has been trained for about as long as each will take. On the
                 CPU a trial keeps the faster of compiled and traced steps, or eager ones where those are compared
                 too. Steps that contain the user's code run eagerly.

On GPUs a step that has run once, traced or compiled, is recorded as CUDA graphs on each replica
(`fastdp.capture.cuda_graphs.recording`), which later steps replay. At most `MOST_RECORDED` batch shapes per replica are
recorded. `graph="step"` joins the graphs of all replicas with their collectives
(`fastdp.capture.cuda_graphs.step_graphs`).

The host thread traces between steps, while no replica runs. A model that cannot be traced (it reads a value on the
host, or its loss needs the merged outputs) runs eagerly from then on, with one warning that says why, until what it
reads has changed (`capture/second_try.py`). When a Python value that a trace has read changes, the trace is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

import torch

from fastdp.capture import product_times
from fastdp.capture.compile.compiler import BackgroundCompiler, CompileError, missing_compiler
from fastdp.capture.compile.niceness import SHARING, YIELDING
from fastdp.capture.cuda_graphs.recorder import Recorder
from fastdp.capture.cuda_graphs.step_graphs import RecordedStepGraph, StepGraphJoiner
from fastdp.capture.dealing import Dealing
from fastdp.capture.decisions import Decisions
from fastdp.capture.faults import Attempt
from fastdp.capture.graph.sources import Sources
from fastdp.capture.guard import Guard
from fastdp.capture.notices import Notices
from fastdp.capture.patience import compile_is_due, trace_is_due
from fastdp.capture.pure_step import PureFunction
from fastdp.capture.second_try import SecondTry
from fastdp.capture.shapes import CapturedT, Shape, entry_of, key_of, own_rows, recordings_of
from fastdp.capture.speed_trial import SpeedTrial
from fastdp.capture.trace import Captured, NoExchange
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.errors import DeviceTimeoutError, NotCapturable, OthersBusyError
from fastdp.shard import Deal, Rows
from fastdp.tensors.threads import given_cores

MOST_SHAPES = 8
MOST_KNOWN = 200  # further shapes have no entry in the report, and run eagerly
# A model that changes repeatedly within so few steps is taken to change itself.
MOST_CHANGES, STEPS_BETWEEN_CHANGES = 3, 50
_POLL_SECONDS = 0.05
MEETS = "replicas meet in the middle of the step"


class Captures(Dealing, Generic[CapturedT]):
    """What is captured of a model, by batch shape: its steps, or its passes.

    Args:
        step: what is captured.
        mode: "trace", "inductor" or "auto".
        parts: the number of replicas.
        recorder: records captured steps as CUDA graphs; None to record none.
        alone: makes a context manager within which no engine of the process runs a step. Torch traces one function at a
            time and patches its modules for all threads meanwhile.
        checks: how many steps of each captured form also run eagerly, for a comparison that the program makes.
        deterministic: the number of steps, not the clock, decides how a step runs. "auto" traces the second step of a
            shape and compiles none; with "inductor" that step waits for the compiler.
        capture: traces what a replica runs, from `step`, its rows and its context.

    The host thread calls `prepare` before each training step and `note` after it. `report` lists the state of each
    shape. `present` are those of the prepared step. `generation` counts how often a change has ended all traces.
    """

    def __init__(
        self,
        step: PureFunction,
        mode: str,
        parts: int,
        recorder: Recorder | None = None,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
        deterministic: bool = False,
        checks: int = 0,
        capture: Callable[..., Any] = Captured,
    ) -> None:
        self._capture: Callable[..., CapturedT] = capture
        self._deterministic, self._checks, self._alone = deterministic, checks, alone
        self._step, self._mode, self._deal, self._recorder = step, mode, Deal(parts), recorder
        self._shapes: dict[Any, Shape[CapturedT]] = {}
        self.present: list[Shape[CapturedT]] = []
        self._compiler = BackgroundCompiler()
        self._no_compiler = missing_compiler() if mode != "trace" else 'compile="trace"'
        decides = mode == "auto" and not deterministic
        self._decisions = Decisions(step, parts, recorder is not None, self._no_compiler) if decides else None
        joins = recorder is not None and recorder.parts
        self._step_graphs = StepGraphJoiner(recorder, step.spans_devices) if recorder is not None and joins else None
        self._guard = Guard(step)
        self._changes = self.generation = 0
        self._eager_now = False
        self._second_try = SecondTry(step)
        self._notices = Notices(step.name, quiet=mode == "auto" and checks > 0)
        self._refused = step.why_never() or self._own_code()
        if self._refused and mode != "auto":
            self._notices.eager(self._refused)
        elif mode == "inductor" and self._no_compiler:
            self._notices.traced(self._no_compiler)

    def find(self, context: Context) -> CapturedT | None:
        """The captured step for a replica's rows, or None. Called from any thread."""
        if self._eager_now or not self._shapes:
            return None
        shape = self._shapes.get(key_of(context, self._step))
        captured = shape.captured if shape is not None else None
        return captured if captured is not None and not captured.runs_eagerly else None

    def prepare(self, batch: Batch, wants_outputs: bool, *, eager: bool = False) -> None:
        """Capture steps that are due, and switch to compiled steps. Called on the host thread, before the step.

        Args:
            batch: the global batch.
            wants_outputs: whether the caller uses the step's outputs.
            eager: run this step eagerly.
        """
        self.present = []
        replicas: list[Shape[CapturedT]] = []
        # Anomaly detection is a feature of autograd, which captured steps do not use.
        self._eager_now = eager or torch.is_anomaly_enabled()
        if not self._refused:
            self._look_for_changes()
        elif not self._eager_now:
            self._try_again()
        if self._refused or self._eager_now:
            return
        self._step.prepare()
        self._look_for_disagreement()
        self._collect()
        if self._refused:
            return
        nobody, device = NoExchange(2, 0.0), self._step.replicas[0].device
        for rank, rows in enumerate(batch.deal(self._deal.limited(self._step.most_replicas))):
            context = Context(rank, rows, 0, nobody, 2, batch, batch.structure, wants_outputs, device)
            key = key_of(context, self._step)
            shape = self._shapes.get(key)
            if shape is None:
                shape = Shape(rows.count, rows.total)
                if len(self._shapes) >= MOST_KNOWN:  # perhaps a number that is another one in each step
                    replicas.append(shape)
                    continue
                self._shapes[key] = shape
                if self._decisions is not None:
                    self._decisions.begin(shape, context)
                self._begin(shape, context)
            if shape not in self.present:
                self.present.append(shape)
                if shape.captured is None and not self._refused and self._may_trace(shape):
                    self._trace(shape, context)
                if shape.captured is not None and not shape.jobs and self._may_compile(shape):
                    self._submit(shape, shape.captured, rows)
                    if self._deterministic:
                        self.wait()
            self._record(shape, context)
            replicas.append(shape)
        if self._step_graphs is not None:
            why = self._step_graphs.consider(recordings_of(replicas), self._step.replicas)
            for shape in self.present:
                shape.no_step_graph = why
                shape.ran_step_graph = not why and self._deal.parts == 1

    def stays_eager(self, context: Context) -> bool:
        """Whether steps of these rows will go on eagerly, as far as is known: refused, or slower otherwise."""
        shape = self._shapes.get(key_of(context, self._step))
        return bool(self._refused) or (shape is not None and shape.stays_eager)

    def _begin(self, shape: Shape[CapturedT], context: Context) -> None:
        """Called with each new shape."""

    def step_graph(self, contexts: Sequence[Context], why_not: str) -> RecordedStepGraph | None:
        """Find the step graph for these rows, or None, and note in their shapes whether there is one.

        Called on the host thread before the step, with the rows on their devices. `why_not` as in `Program.step_graph`.
        """
        if self._step_graphs is None or self._eager_now:
            return None
        keys = [key_of(context, self._step) for context in contexts]
        shapes = [self._shapes[key] for key in keys if key in self._shapes]
        whole = not why_not and len(shapes) == len(contexts)
        found = self._step_graphs.find(recordings_of(shapes)) if whole else None
        for shape in {id(shape): shape for shape in shapes}.values():
            shape.ran_step_graph = found is not None
            shape.step_graph_steps += found is not None
            shape.no_step_graph = "" if found is not None else why_not or shape.no_step_graph
        return found

    def note(self, seconds: float, shapes: Sequence[Shape[CapturedT]] | None = None) -> None:
        """Add the duration of the prepared step, or of an earlier one, whose `present` shapes these were."""
        for shape in self.present if shapes is None else shapes:
            shape.note(seconds)
            if self._decisions is not None:
                self._decisions.note(shape)

    @property
    def compiling(self) -> bool:
        """Whether a step is being compiled, or a compiled step will take over before the next step."""
        return self._compiler.busy

    def wait(self, timeout: float | None = None) -> None:
        """Wait for compilation to end, and switch to the compiled steps.

        Raises:
            DeviceTimeoutError: compilation took longer than `timeout` seconds. It goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._collect()
        try:
            while self.compiling:
                if deadline is not None and time.monotonic() > deadline:
                    raise DeviceTimeoutError(f"Steps were still being compiled after timeout={timeout} seconds.")
                self._compiler.set_niceness(SHARING)  # nothing trains meanwhile
                time.sleep(_POLL_SECONDS)
                self._collect()
        finally:
            self._compiler.set_niceness(YIELDING)

    def close(self, why: str = "compiling was ended") -> None:
        """Stop compiling. Captured and compiled steps stay in use."""
        self._compiler.close()
        self._no_compiler = self._no_compiler or why
        for shape in self._shapes.values():
            if shape.jobs and not shape.compiled:
                shape.jobs, shape.runs, shape.why = [], [], self._no_compiler

    @property
    def is_refused(self) -> bool:
        """Whether all steps run eagerly from now on."""
        return bool(self._refused)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One entry per shape of a replica's rows, or one that says why all steps run eagerly."""
        if self._refused:
            return [{"how": "eager", "why": self._refused}]
        return [entry_of(shape) for shape in self._shapes.values()]

    def _own_code(self) -> str:
        """Why "auto" runs steps with the user's code eagerly; empty if it does not."""
        own = self._step.own_code() if self._mode == "auto" else ""
        return f'{own} is your own code: pass compile="trace" or "inductor" to capture it' if own else ""

    def _look_for_changes(self) -> None:
        """Drop all traces if a value that they have read has changed; run eagerly if that happens repeatedly."""
        captured = [shape for shape in self._shapes.values() if shape.captured is not None]
        used = any(shape.is_replayed for shape in captured)  # else nothing can be stale
        changed = self._guard.changed() if used else ""
        if not changed:
            return
        self._changes = 1 if sum(shape.steps for shape in captured) > STEPS_BETWEEN_CHANGES else self._changes + 1
        self.close("")
        self._shapes.clear()
        self.generation += 1
        self._refused = self._step.why_never() or self._own_code()
        if self._changes > MOST_CHANGES:
            self._refused = f"{changed}, which changes while the model trains"
            self._notices.eager(self._refused)

    def _try_again(self) -> None:
        """Let a step that was refused be captured if what it reads has changed since."""
        if not self._second_try.is_due(changed=self._changes > MOST_CHANGES):
            return
        self._refused = self._step.why_never() or self._own_code()
        if self._refused:
            self._notices.eager(self._refused)
            return
        self._changes = 0
        self._shapes.clear()
        self._no_compiler = missing_compiler() if self._mode != "trace" else 'compile="trace"'

    def _look_for_disagreement(self) -> None:
        """Run eagerly from now on if a traced step has given other numbers than the eager one."""
        for shape in self._shapes.values():
            if shape.captured is not None and shape.captured.disagreed and not shape.compiled:
                self.refuse(f"{shape.captured.disagreed}, in which the captured step disagrees with the eager one")
                return

    def refuse(self, why: str) -> None:
        """Drop all traces and run eagerly from now on, with one warning."""
        if self._refused:
            return
        self._refused = why
        self.close()
        self._shapes.clear()
        self._notices.eager(self._refused)

    def _may_trace(self, shape: Shape[CapturedT]) -> bool:
        """Whether it is time to trace."""
        if shape.steps == 0:
            return False
        if sum(other.captured is not None for other in self._shapes.values()) >= MOST_SHAPES:
            shape.why = f"{MOST_SHAPES} other shapes are captured"
            return False
        return self._mode != "auto" or self._deterministic or trace_is_due(shape)

    def _may_compile(self, shape: Shape[CapturedT]) -> bool:
        """Whether it is time to compile."""
        assert shape.captured is not None
        if shape.captured.meets or self._no_compiler:
            shape.why = MEETS if shape.captured.meets else str(self._no_compiler)
            return False
        if self._mode == "auto" and self._deterministic:
            shape.why = 'deterministic=True: compiled with compile="inductor" only'
            return False
        return self._mode != "auto" or compile_is_due(shape)

    def _trace(self, shape: Shape[CapturedT], context: Context, *, refuses: bool = True) -> None:
        """Trace one shape. If that fails, warn and trace no shape from then on, or leave it eager for now."""
        with Attempt(OthersBusyError if self._deterministic else ()) as attempt:  # eager, it might have other bits
            self._guard.renew()
            with self._alone(), self._guard.tracing(), Sources() as sources:
                shape.captured = self._capture(self._step, own_rows(context), context)
                sources.belong_to(shape.captured)
                shape.captured.checks = self._checks
        if attempt.error is None:
            shape.since, shape.why = min(shape.steps, 1), ""  # recorded at once if it has trained (see `_collect`)
            lone = self._mode == "auto" and self._no_compiler and self._recorder is None and not self._deterministic
            if lone and self._checks and shape.captured is not None:
                shape.trial = SpeedTrial(shape.captured, None, eager=True)
            return
        shape.captured, said = None, f"an error while it was traced: {attempt.why}"
        if refuses and not isinstance(attempt.error, OthersBusyError):  # of that the next step tries again
            self.refuse(str(attempt.error) if isinstance(attempt.error, NotCapturable) else said)

    def _submit(self, shape: Shape[CapturedT], captured: CapturedT, rows: Rows) -> None:
        """Submit a captured step to the compiler. If that fails, warn and compile nothing from then on."""
        with Attempt() as attempt, Sources():
            cores = captured.cores(given_cores() // min(self._deal.parts, rows.total))  # while the other replicas run
            is_faster = product_times.never if self._deterministic else product_times.measured(cores)
            shape.jobs = [self._compiler.submit(graph, cores) for graph in captured.to_compile(is_faster)]
            shape.why = "being compiled"
        if attempt.error is not None:
            self._give_up_compiling(attempt.why)

    def _record(self, shape: Shape[CapturedT], context: Context) -> None:
        """Record a shape on a replica, once it has run there in its present form."""
        compiling = bool(shape.jobs) and not shape.compiled
        captured, ran = shape.captured, shape.steps > shape.since
        if self._recorder is None or captured is None:
            return
        if captured.meets:
            shape.no_graph = f"no CUDA graph: {MEETS}"
        elif ran and not compiling and not captured.checks:
            replica = self._step.replicas[context.index]
            context.device = replica.device
            shape.no_graph = self._recorder.consider(captured, replica, own_rows(context), context)

    def _collect(self) -> None:
        """Switch to compiled steps that are ready."""
        for shape in self._shapes.values():
            captured = shape.captured
            if captured is None or not shape.jobs or (captured.disagreed and not shape.compiled):
                continue
            if shape.compiled:
                if captured.failed:
                    self._go_back(shape, captured)
                continue
            with Attempt() as attempt:
                if not shape.has_runs(self._compiler):
                    continue
                compiled = captured.checked(shape.runs)
                if self._mode == "auto" and self._recorder is None:
                    shape.trial = SpeedTrial(captured, compiled, eager=self._checks > 0)
                else:
                    captured.use(compiled)
                captured.checks = self._checks
                # If steps are recorded, this one is recorded at once: its first run allocates memory and must not be
                # part of a step in which other replicas wait for a collective.
                shape.compiled, shape.since, shape.why = True, shape.steps - 1, ""
            if attempt.error is not None:
                self._give_up_compiling(str(attempt.error) if type(attempt.error) is CompileError else attempt.why)

    def _go_back(self, shape: Shape[CapturedT], captured: CapturedT) -> None:
        """Return permanently to the traced form of a step whose compiled form has failed."""
        why = captured.failed
        captured.use_traced()
        shape.go_back(why)
        if self._decisions is not None:
            self._decisions.drop(shape)
        self._give_up_compiling(why)

    def _give_up_compiling(self, why: str) -> None:
        """Stop compiling, with one warning."""
        if not self._no_compiler:
            self._notices.traced(why)
        self.close(why)
