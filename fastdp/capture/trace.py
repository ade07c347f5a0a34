"""Traces one training step into a flat graph of ATen operations, and replays it.

The graph is a function of a replica's variables, its rows, the outcomes of its random draws and its gradient
buffers. It writes the gradients into the buffers. The draws stay outside the graph: they are repeated before each
replay, from the same seeds and in the same order as in an eager step, so that both steps give the same results.

Tracing runs the model on fake tensors, which have shapes but no values, and does no arithmetic. It patches torch for
the whole process, so no replica may run meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Generic

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastdp.capture.captured_form import CapturedForm, Run
from fastdp.capture.cuda_graphs.recording import Graphs, Recording
from fastdp.capture.faults import Compiled
from fastdp.capture.graph.cores import layers_lead
from fastdp.capture.graph.functional import without_writes
from fastdp.capture.graph.indices import guarded
from fastdp.capture.graph.passes import in_place, optimized, refuse_writes, stored, writes
from fastdp.capture.graph.products import Product
from fastdp.capture.graph.rewrites import for_compiler
from fastdp.capture.graph.segments import Segments, cut, placed, whole
from fastdp.capture.pure_step import Draw, OutcomeForm, OutcomeT, PureStep, ReplicaTensors
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import NotCapturable
from fastdp.tensors.arrays import settle
from fastdp.tensors.indices import CheckedOneHot
from fastdp.tensors.replica_sums import exchanging, meets


class Captured(CapturedForm, Generic[OutcomeT]):
    """A captured step, for replicas with a given number of rows.

    Args:
        step: the step of a model.
        batch: a replica's rows.
        context: the replica's place.

    `graph` is the input of a compiler. `run` is the function that a replay calls; `use` replaces it by an equivalent.

    Raises:
        NotCapturable: the step does something that cannot be recorded or replayed; the message says what, and where.
    """

    def __init__(self, step: PureStep[OutcomeT], batch: Sequence[Any], context: Context) -> None:
        super().__init__()
        began = time.perf_counter()
        self._step = step
        variables = step.variables
        self._home = variables[0].device
        rows = [row.to(self._home) for row in step.rows(batch, context)]
        with step.tracing():
            recorded = RecordedDraws()
            step.compute(self._leaves(variables), rows, context, recorded)
            self._draws, self._drawn = recorded.draws, recorded.outcomes
            self._has_gradient: list[bool] = []
            self._form: OutcomeForm[OutcomeT]
            arguments = [*variables, *rows, *self._drawn, *(variables[i].detach() for i in step.trained)]
            counts = len(variables), len(rows), len(self._drawn)
            traced = graph_of(lambda *flat: self._flat(flat, counts, context), arguments)
        buffers = traced.graph.find_nodes(op="placeholder")[sum(counts) :]
        self._unused = [i for i, has_gradient in enumerate(self._has_gradient) if not has_gradient]
        for i in self._unused:  # no gradient, no buffer
            traced.graph.erase_node(buffers[i])
        self.graph: GraphModule = stored(self._optimized(traced), sum(self._has_gradient))
        self.run: Any = in_place(self.graph)
        self._traced: tuple[Any, Any] | None = None  # the traced form, if `use` has replaced it
        self.operations = sum(node.op == "call_function" for node in self.run.graph.nodes)
        self.meets, self.one_core = meets(self.graph.graph), layers_lead(self.graph.graph)
        self._buckets = [bucket.arrays for bucket in step.replicas[0].gradient_buffers.buckets()]
        self._steps = self._on_every_device(sum(counts))
        self.seconds = time.perf_counter() - began

    def replay(self, replica: ReplicaTensors, batch: Sequence[Any], context: Context) -> OutcomeT:
        """Run the step on a replica's variables and rows, and write its gradients. Called on its device's worker."""
        step, variables = self._step, replica.variables
        rows = step.rows(batch, context)
        gradients: list[torch.Tensor | None] = [*replica.gradients]
        with torch.no_grad(), as_traced():
            for i in self._unused:
                replica.gradients[i].zero_()
                gradients[i] = None
            draws, moved = step.draw(self._draws, variables, context) if self._draws else ([], [])
            recording = self.recordings.get(context.index)
            if context.step_graph is not None:
                found = context.step_graph.recordings[context.index].replay_in_step_graph(
                    [*rows, *draws], context.launch
                )
            elif recording is not None:
                found = recording.replay([*rows, *draws], context.ready)
            else:
                buffers = compress(replica.gradients, self._has_gradient)
                given = [*variables, *rows, *draws, *buffers]
                with exchanging(context.exchange) if self.meets else nullcontext(), self.on_cores():
                    found = self._steps[context.torch_device](given, context.ready)
        return self._form.filled(gradients, iter(found), moved)

    def repeat(
        self, variables: Sequence[torch.Tensor], batch: Sequence[Any], context: Context, draws: Sequence[torch.Tensor]
    ) -> OutcomeT:
        """Run the step apart from any replica's memory, as a comparison with a step that has run eagerly.

        Args:
            variables: on the device of `context`, with their values before that step.
            batch, context: the replica's rows and place.
            draws: the outcomes of that step's draws; those of `repeat_draws`.
        """
        step = self._step
        with torch.no_grad(), as_traced():
            rows = step.rows(batch, context)
            buffers = [torch.empty_like(variables[i]) for i in step.trained]
            given = [*variables, *rows, *draws, *compress(buffers, self._has_gradient)]
            with self.on_cores():
                values = self._steps[context.torch_device](given, lambda bucket: None)
        gradients = [buffer if there else None for buffer, there in zip(buffers, self._has_gradient, strict=True)]
        return self._form.filled(gradients, iter(values), [])

    def repeat_draws(self, variables: Sequence[torch.Tensor], context: Context) -> list[torch.Tensor]:
        """Make the draws of a step, as a replay does."""
        with torch.no_grad():
            return self._step.draw(self._draws, variables, context)[0] if self._draws else []

    @property
    def drawn(self) -> int:
        """The number of draws of a step."""
        return len(self._draws)

    def to_compile(self, onednn_is_faster: Callable[[Product], bool]) -> list[GraphModule]:
        """The graph to compile: as `CapturedForm.to_compile`."""
        graph = guarded(self.graph) if self._home.type == "cpu" else self.graph
        return [for_compiler(graph, onednn_is_faster)]

    def checked(self, runs: Sequence[Run]) -> Run:
        """As `CapturedForm.checked`."""
        (run,) = runs
        (output,) = self.graph.graph.find_nodes(op="output")
        return Compiled(run, self.run, len(output.args[0])) if self._home.type == "cpu" else run

    @property
    def failed(self) -> str:
        """As `CapturedForm.failed`."""
        if self.disagreed:
            return f"the compiled step disagrees with the eager one in {self.disagreed}"
        return self.run.failed if isinstance(self.run, Compiled) else ""

    def use(self, run: Run) -> None:
        """Replay through an equivalent function, on the device that the step was traced on."""
        step = self._steps[str(self._home)]
        self._traced = self._traced or (step, self.run)
        arguments = len(self.graph.graph.find_nodes(op="placeholder"))
        self._steps[str(self._home)] = whole(run, arguments, len(step.results), range(len(self._buckets)))
        self.recordings = {}
        self.run = run

    def use_traced(self) -> None:
        """Return to the traced form of the step."""
        self.runs_eagerly = False
        if self._traced is not None:
            self._steps[str(self._home)], self.run = self._traced
            self.recordings, self.disagreed, self.checks = {}, "", 0

    def record(self, graphs: Graphs, replica: ReplicaTensors, batch: Sequence[Any], context: Context) -> None:
        """Record the step for the replica of `context`, on its worker. Later replays use the recording.

        Overwrites the replica's gradients.

        Raises:
            RuntimeError: the step does something that cannot be recorded.
        """
        where = context.torch_device
        inputs = [row.to(where, copy=True) for row in self._step.rows(batch, context)]
        inputs += [torch.zeros_like(t, device=_moved(t, self._home, where)).contiguous() for t in self._drawn]
        buffers = list(compress(replica.gradients, self._has_gradient))
        with torch.no_grad():
            recording = Recording(graphs, self._steps[where], list(replica.variables), inputs, buffers)
        self.recordings[context.index] = recording

    def _optimized(self, traced: GraphModule) -> GraphModule:
        """The graph without what a replay need not do."""
        return optimized(traced)

    @property
    def form(self) -> OutcomeForm[OutcomeT]:
        """The form of an outcome."""
        return self._form

    def _on_every_device(self, before: int) -> dict[str, Segments]:
        """The step in segments for each device with a replica. The gradients follow after `before` arguments."""
        written = list(compress(range(len(self._has_gradient)), self._has_gradient))
        bucket_of = {i: bucket for bucket, inside in enumerate(self._buckets) for i in inside}
        stores = {before + at: bucket_of[i] for at, i in enumerate(written) if i in bucket_of}
        devices: list[Any] = [replica.device for replica in self._step.replicas.values()]
        steps = {}
        for where in {str(self._home), *(str(device.torch_device) for device in devices)}:
            run = self.run if where == str(self._home) else placed(self.run, self._home, torch.device(where))
            # A single replica has no all-reduce to overlap.
            steps[where] = cut(run, stores if len(devices) > 1 else {}, range(len(self._buckets)))
            settle([*run.buffers(), *self._drawn])
        return steps

    def _leaves(self, variables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The variables, with the trained ones as leaves of autograd."""
        trained = set(self._step.trained)
        return [v.detach().requires_grad_() if i in trained else v for i, v in enumerate(variables)]

    def _flat(
        self, tensors: Sequence[torch.Tensor], counts: tuple[int, int, int], context: Context
    ) -> list[torch.Tensor]:
        """The function to trace: a step from tensors to tensors. The gradient buffers are unused: see `stored`."""
        given = iter(tensors)
        variables, rows, drawn = ([next(given) for _ in range(count)] for count in counts)
        with torch.enable_grad():
            outcome = self._step.compute(self._leaves(variables), rows, context, GivenDraws(iter(drawn)))
        values, self._form = self._step.flatten(outcome)
        self._has_gradient = [gradient is not None for gradient in outcome.gradients]
        gradients = [gradient for gradient in outcome.gradients if gradient is not None]
        return [tensor.detach() for tensor in (*gradients, *values)]


def as_traced() -> AbstractContextManager[Any]:
    """Keeps the calling thread's autocast from casting again: a graph has its casts in it."""
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else nullcontext()


def graph_of(function: Callable[..., Any], arguments: list[torch.Tensor]) -> GraphModule:
    """The graph of a function, without writes.

    Raises:
        NotCapturable: torch cannot trace it, or it writes to what it is given.
    """
    found = _traced(function, arguments)
    refuse_writes(found.graph)
    # Passes take equal operations for one, which writes would make untrue.
    if writes(found.graph) and not without_writes(found):
        with as_traced():
            found = _traced(torch.func.functionalize(found, remove="mutations"), arguments)
    return found


def _traced(function: Callable[..., Any], arguments: list[torch.Tensor]) -> GraphModule:
    """The graph of a function.

    Raises:
        NotCapturable: torch cannot trace it.
    """
    try:
        # Without a ShapeEnv, so that reading a value on the host is an error that names the operation.
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=None)
        fakes = [mode.from_tensor(argument) for argument in arguments]
        with CheckedOneHot():
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    # Torch raises a RuntimeError (of a class that has the operation as `func`) for values read on the host while
    # tracing, and NotImplementedError for operations that it cannot trace.
    except (RuntimeError, NotImplementedError) as error:
        operation = getattr(error, "func", None)
        said = " ".join(str(error).split()).split(" - ")[0]
        what = f"{operation}, which needs values on the host" if operation is not None else said
        raise NotCapturable(what) from error


class NoExchange(Rendezvous):
    """Refuses to capture steps in which replicas exchange values. One device too: what they exchange for (the loss of
    the merged outputs) reads the global batch, which the graph does not have.
    """

    def exchange(self, rank: int, value: Any, place: object) -> list[Any]:
        """Raise NotCapturable."""
        raise NotCapturable("values that replicas exchange in the middle of a step")


@dataclass(slots=True)
class RecordedDraws:
    """Makes draws and records them, so that they can be repeated."""

    draws: list[Draw] = field(default_factory=list)
    outcomes: list[torch.Tensor] = field(default_factory=list)

    def take(self, draw: Draw) -> torch.Tensor:
        """Make the draw and record it."""
        self.draws.append(draw)
        self.outcomes.append(draw())
        return self.outcomes[-1]


@dataclass(slots=True)
class GivenDraws:
    """Replaces draws by outcomes that were made beforehand."""

    outcomes: Iterator[torch.Tensor]

    def take(self, draw: Draw) -> torch.Tensor:
        """The next outcome."""
        return next(self.outcomes)


def _moved(tensor: torch.Tensor, home: torch.device, where: str) -> torch.device:
    """The device for a copy of a tensor on a replica at `where`. A tensor that is not at `home` keeps its device."""
    return torch.device(where) if tensor.device == home else tensor.device
