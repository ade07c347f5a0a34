"""Traces one training step into a flat graph of ATen operations, and replays it.

The graph is a function of a replica's variables, its rows, the outcomes of its random draws and its gradient
buffers. The draws themselves stay outside: they are repeated before each replay, from the same seeds and in the
same order as in an eager step, so a captured step gives what the eager one gives. Gradients are written into the
buffers by the graph itself.

Tracing runs the model on fake tensors, which have shapes and no values: no arithmetic is done. It patches torch
for the whole process (torch.nn.Module's call, among others), so no replica may run meanwhile.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import keras
import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastdp.capture.cuda_graphs.recording import Graphs, Recording
from fastdp.capture.faults import Compiled
from fastdp.capture.graph.indices import guarded
from fastdp.capture.graph.passes import in_place, optimized, stored
from fastdp.capture.graph.rewrites import for_compiler
from fastdp.capture.graph.segments import Segments, cut, placed, whole
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import NotCapturable
from fastdp.program.keras.batch import OutputStructure, Structure, pack_like
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.program import KerasProgram
from fastdp.program.keras.replica import keras_device, replica_scope
from fastdp.program.keras.step_sums import EffectsForm, StepSums
from fastdp.program.keras.variables import Mapping, ReplicaScope
from fastdp.tensors.arrays import as_tensor, settle
from fastdp.tensors.indices import CheckedOneHot

_Draw = Callable[[], torch.Tensor]


class Captured:
    """One captured step, for replicas with a given number of rows.

    Args:
        program: whose step.
        batch: a replica's rows.
        context: the replica's place.

    `graph` is what a compiler is given; `run` is what a replay calls, and may be replaced by its equal.

    Raises:
        NotCapturable: the step does something that cannot be recorded or replayed; the message says what, and where.
    """

    def __init__(self, program: KerasProgram, batch: list[np.ndarray], context: Context) -> None:
        began = time.perf_counter()
        self._program = program
        variables = [v.value.detach() for v in program.variables]
        self._home = variables[0].device
        rows = [row.to(self._home) for row in _tensors(batch, context.structure)]
        with replica_aware(), _place_named():
            recorded = _Recorded()
            self._eager(variables, rows, context, recorded)
            self._draws = recorded.draws
            self._outcomes = recorded.outcomes
            self._layout = _Layout()
            arguments = [*variables, *rows, *recorded.outcomes, *(v.value.detach() for v in program.trainable)]
            counts = len(variables), len(rows), len(recorded.outcomes)
            traced = _traced(lambda *flat: self._flat(flat, counts, context), arguments)
        buffers = traced.graph.find_nodes(op="placeholder")[sum(counts) :]
        for node, number in zip(buffers, self._layout.gradients, strict=True):
            if number is None:  # no gradient, no buffer
                traced.graph.erase_node(node)
        found = sum(number is not None for number in self._layout.gradients)
        self.graph: GraphModule = stored(optimized(traced), found)
        self.run: Any = in_place(self.graph)
        self._traced: tuple[Any, Any] | None = None  # what `use` has replaced
        self.operations = sum(node.op == "call_function" for node in self.run.graph.nodes)
        self.recordings: dict[int, Recording] = {}
        self._buckets = list(range(len(program.gradient_buckets)))
        self._steps = self._on_every_device(sum(counts))
        self.seconds = time.perf_counter() - began

    def replay(
        self, mapping: Mapping, gradients: Sequence[torch.Tensor], batch: list[np.ndarray], context: Context
    ) -> StepSums:
        """Run the step on a replica's variables and rows, its gradients into their buffers. On its device's worker."""
        rows = _tensors(batch, context.structure)
        variables, buffers, others = self._memory(mapping, gradients)
        with torch.no_grad():
            for gradient in others:
                gradient.zero_()
            draws, seeds = self._drawn(variables, context) if self._draws else ([], [])
            recording = self.recordings.get(context.rank)
            if context.whole is not None:
                flat = context.whole.recordings[context.rank].replay_whole([*rows, *draws], context.launch)
            elif recording is not None:
                flat = recording.replay([*rows, *draws], context.ready)
            else:
                flat = self._steps[context.torch_device]([*variables, *rows, *draws, *buffers], context.ready)
        return self._layout.unflatten(flat, buffers, seeds)

    def to_compile(self) -> GraphModule:
        """The graph that a compiler is given.

        Raises:
            NotImplementedError: it has indices of which fastdp does not know the range.
        """
        return for_compiler(guarded(self.graph) if self._home.type == "cpu" else self.graph)

    def checked(self, run: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., Sequence[torch.Tensor]]:
        """What `to_compile` gave, compiled, as something to `use`: wrong indices and own failures end nothing."""
        (output,) = self.graph.graph.find_nodes(op="output")
        return Compiled(run, self.run, len(output.args[0])) if self._home.type == "cpu" else run

    @property
    def failed(self) -> str:
        """Why the compiled step is given up; empty where it is not."""
        return self.run.failed if isinstance(self.run, Compiled) else ""

    def use(self, run: Callable[..., Sequence[torch.Tensor]]) -> None:
        """Replay by another function that computes the same, on the device that the step was traced on."""
        step = self._steps[str(self._home)]
        self._traced = self._traced or (step, self.run)
        arguments = len(self.graph.graph.find_nodes(op="placeholder"))
        self._steps[str(self._home)] = whole(run, arguments, len(step.results), self._buckets)
        self.recordings = {}
        self.run = run

    def use_traced(self) -> None:
        """Replay as traced again."""
        if self._traced is not None:
            self._steps[str(self._home)], self.run = self._traced
            self.recordings = {}

    def record(self, graphs: Graphs, state: Any, batch: list[np.ndarray], context: Context) -> None:
        """Record the step for the replica of `context`, whose worker this is; replays are the recording's from now on.

        The replica's gradients are overwritten.

        Raises:
            RuntimeError: the step does something that cannot be recorded.
        """
        where = context.torch_device
        inputs = [row.to(where, copy=True) for row in _tensors(batch, context.structure)]
        inputs += [torch.zeros_like(t, device=_moved(t, self._home, where)).contiguous() for t in self._outcomes]
        variables, buffers, _ = self._memory(state.mapping, state.gradients)
        with torch.no_grad():
            recording = Recording(graphs, self._steps[where], variables, inputs, buffers)
        self.recordings[context.rank] = recording

    def _memory(
        self, mapping: Mapping, gradients: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """A replica's variables, the gradients that the step writes, and those that stay zero."""
        places = list(zip(gradients, self._layout.gradients, strict=True))
        buffers = [gradient for gradient, i in places if i is not None]
        return [tensor.detach() for _, tensor in mapping], buffers, [gradient for gradient, i in places if i is None]

    def _on_every_device(self, before: int) -> dict[str, Segments]:
        """The step in segments for each device that has a replica; behind `before` arguments are the gradients."""
        members = self._program.gradient_buckets
        written = [i for i, number in enumerate(self._layout.gradients) if number is not None]
        bucket_of = {i: bucket for bucket, inside in enumerate(members) for i in inside}
        stores = {before + at: bucket_of[i] for at, i in enumerate(written) if i in bucket_of}
        devices: list[Any] = [state.device for state in self._program.states.values()]
        steps = {}
        for where in {str(self._home), *(str(device.torch_device) for device in devices)}:
            run = self.run if where == str(self._home) else placed(self.run, self._home, torch.device(where))
            # Nobody waits for the buckets of a single replica.
            steps[where] = cut(run, stores if len(devices) > 1 else {}, self._buckets)
            settle([*run.buffers(), *self._outcomes])
        return steps

    def _drawn(
        self, variables: list[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], list[tuple[int, torch.Tensor]]]:
        """The outcomes of the step's random draws, and the seeds that they have moved."""
        mapping = list(zip(self._program.variables, variables, strict=True))
        run = self._program.running_replica(context)
        with keras_device(context.device), replica_scope(run), ReplicaScope(mapping, set()) as scope:
            draws = [draw().contiguous() for draw in self._draws]
        return draws, scope.assigned(mapping)

    def _eager(self, variables: list[torch.Tensor], rows: list[torch.Tensor], context: Context, draws: Any) -> StepSums:
        """The step as it is run eagerly, over given tensors."""
        program = self._program
        run = program.running_replica(context)
        run.draws = draws
        trainable = set(map(id, program.trainable))
        mapping = [
            (v, tensor.detach().requires_grad_() if id(v) in trainable else tensor)
            for v, tensor in zip(program.variables, variables, strict=True)
        ]
        return program.compute(mapping, _pack(context.structure, rows), run)

    def _flat(
        self, tensors: Sequence[torch.Tensor], counts: tuple[int, int, int], context: Context
    ) -> list[torch.Tensor]:
        """The traced function: a step as tensors in, tensors out. The gradient buffers are for later."""
        given = iter(tensors)
        variables, rows, outcomes = ([next(given) for _ in range(count)] for count in counts)
        with torch.enable_grad():
            outcome = self._eager(variables, rows, context, _Given(iter(outcomes)))
        if any(id(self._program.variables[i]) in self._program.effects.seeds for i, _ in outcome.effects.assigned):
            raise NotCapturable("a seed generator that the model reads itself")
        return self._layout.flatten(outcome)


def _traced(function: Callable[..., Any], arguments: list[torch.Tensor]) -> GraphModule:
    """The graph of a function.

    Raises:
        NotCapturable: torch cannot trace it.
    """
    try:
        # Without an environment for symbols, so that reading a value on the host is an error that names the operation.
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=None)
        fakes = [mode.from_tensor(argument) for argument in arguments]
        with CheckedOneHot():
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    # RuntimeError is what torch raises for values read on the host while tracing (of a kind that names the
    # operation, `func`), NotImplementedError for operations without a trace.
    except (RuntimeError, NotImplementedError) as error:
        operation = getattr(error, "func", None)
        said = " ".join(str(error).split()).split(" - ")[0]
        what = f"{operation}, which needs values on the host" if operation is not None else said
        raise NotCapturable(what) from error


@contextmanager
def _place_named() -> Iterator[None]:
    """What cannot be captured says in which layer it is. Meanwhile Keras leaves tracebacks and errors as they are."""
    filtering = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    except NotCapturable as error:
        cause = error.__cause__
        place = _place(error.__traceback__) or (_place(cause.__traceback__) if cause is not None else "")
        raise NotCapturable(f"{error}{place}") from error
    finally:
        if filtering:
            keras.config.enable_traceback_filtering()


def _place(trace: TracebackType | None) -> str:
    """The innermost layer in a traceback, as the end of a sentence."""
    layers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(trace)]
    found = [layer for layer in layers if isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.Model)]
    return f", in the layer {found[-1].name!r} ({type(found[-1]).__name__})" if found else ""


class NoExchange(Rendezvous):
    """Ends a capture in which replicas would have to meet. On one device too: what they meet for (the loss of
    the merged outputs) reads the global batch, which the graph does not have.
    """

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Refuse."""
        raise NotCapturable("values that replicas exchange in the middle of a step")


@dataclass(slots=True)
class _Layout:
    """Where in the flat list of a graph's results the parts of an outcome are."""

    gradients: list[int | None] = field(default_factory=list)
    terms: int = 0
    added: int = 0
    outputs: int = 0
    structure: OutputStructure | None = None
    effects: EffectsForm = field(default_factory=EffectsForm)

    def flatten(self, outcome: StepSums) -> list[torch.Tensor]:
        """An outcome as one list; remembers how."""
        if outcome.structure is not None and any(value is not None for _, value in outcome.structure.plain):
            raise NotCapturable("outputs that are no tensors, which may be others in each call")
        found = [gradient for gradient in outcome.gradients if gradient is not None]
        numbers = iter(range(len(found)))
        self.gradients = [None if gradient is None else next(numbers) for gradient in outcome.gradients]
        self.terms, self.outputs, self.structure = len(outcome.terms), len(outcome.outputs), outcome.structure
        self.added, self.effects = outcome.added, outcome.effects.form()
        return [t.detach() for t in (*found, *outcome.terms, *outcome.outputs, *outcome.effects.tensors())]

    def unflatten(
        self,
        flat: Sequence[torch.Tensor],
        found: Sequence[torch.Tensor],
        seeds: list[tuple[int, torch.Tensor]],
    ) -> StepSums:
        """The outcome again: gradients that are in their buffers, results, the seeds that the draws have moved."""
        rest: Iterator[torch.Tensor] = iter(flat)
        return StepSums(
            [None if i is None else found[i] for i in self.gradients],
            [next(rest) for _ in range(self.terms)],
            [next(rest) for _ in range(self.outputs)],
            self.structure,
            self.effects.filled(rest, seeds),
            self.added,
        )


@dataclass(slots=True)
class _Recorded:
    """Draws that are made, and remembered so that they can be made again."""

    draws: list[_Draw] = field(default_factory=list)
    outcomes: list[torch.Tensor] = field(default_factory=list)

    def take(self, draw: _Draw) -> torch.Tensor:
        """Draw, and remember."""
        self.draws.append(draw)
        self.outcomes.append(draw())
        return self.outcomes[-1]


@dataclass(slots=True)
class _Given:
    """Draws that have been made beforehand."""

    outcomes: Iterator[torch.Tensor]

    def take(self, draw: _Draw) -> torch.Tensor:
        """The next one."""
        return next(self.outcomes)


def _moved(tensor: torch.Tensor, home: torch.device, where: str) -> torch.device:
    """Where what lay here on the first replica's device lies on another's."""
    return torch.device(where) if tensor.device == home else tensor.device


def _dtypes(structure: Structure) -> list[str]:
    """The dtypes of the arrays of a batch."""
    return [dtype for dtype in structure.dtypes if dtype is not None]


def _tensors(batch: Sequence[np.ndarray], structure: Structure) -> list[torch.Tensor]:
    """The arrays of a batch as tensors, in plain layout, as a graph expects them."""
    return [as_tensor(a, dtype).contiguous() for a, dtype in zip(batch, _dtypes(structure), strict=True)]


def _pack(structure: Structure, tensors: Sequence[torch.Tensor]) -> Any:
    """Tensors in the nest of a batch."""
    leaves = iter(tensors)
    return pack_like(structure.nest, [None if dtype is None else next(leaves) for dtype in structure.dtypes])
