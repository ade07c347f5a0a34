"""Captured steps: the pure part of a training step, traced once and run without Keras's Python.

The first step of a batch shape runs eagerly. Before the second one the step is traced with
`torch.fx.experimental.proxy_tensor.make_fx` into a flat graph of ATen operations over the replica's
variables, its rows, and the outcomes of its random draws. The draws themselves stay outside: they are
repeated before each replay, from the same seeds and in the same order as in an eager step, so a captured
step gives what the eager one gives. Replicas with the same number of rows share a graph.

The graph runs as the Python that torch generates from it ("trace"), or as the C++ that TorchInductor makes of
it ("inductor"). Tracing and compiling patch torch for the whole process (torch.nn.Module's call, among others),
so they happen on the host thread while no replica runs: the second step of a shape waits for them.

What cannot be traced (a value that the model reads on the host, an exchange between replicas in the middle
of a step) runs eagerly for good, with one warning that says why. A trace is of the model as compiled: what a
layer reads from plain Python attributes is fixed until the next `compile`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor import compile as inductor_compile
from torch.fx.experimental.proxy_tensor import make_fx

from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.base import Context
from fastdp.program.keras import KerasProgram, Outcome
from fastdp.program.keras_batch import OutputStructure, Structure
from fastdp.program.keras_memory import Mapping, ReplicaScope
from fastdp.program.keras_moments import Moments
from fastdp.program.keras_replica import NotCapturable, replica_scope
from fastdp.program.keras_scope import replica_aware
from fastdp.program.torch_tensors import as_tensor
from fastdp.shard import CORES, Rows, split_rows

MOST_SHAPES = 8
MODES = (None, "trace", "inductor")
_Draw = Callable[[], torch.Tensor]


class Captures:
    """The captured steps of a program, by batch shape.

    Args:
        program: whose steps to capture.
        mode: "trace" or "inductor".
        parts: the number of replicas.

    `report` tells what became of each shape.
    """

    def __init__(self, program: KerasProgram, mode: str, parts: int) -> None:
        self._program, self._mode, self._parts = program, mode, parts
        self._seen: set[Any] = set()
        self._captured: dict[Any, Captured] = {}
        self._refused: str | None = _refusal(program)
        if self._refused:
            self._warn()

    def find(self, batch: Sequence[np.ndarray], context: Context) -> Captured | None:
        """The captured step for a replica's rows, if there is one. From any thread."""
        return self._captured.get(_key(batch, context, self._program)) if self._captured else None

    def prepare(self, batch: Sequence[np.ndarray], structure: Structure, wants_outputs: bool) -> None:
        """Capture the steps of a global batch that has been seen before. On the host thread, before the step."""
        if self._refused:
            return
        self._program.prepare_loss()
        shapes: dict[Any, tuple[list[np.ndarray], Context]] = {}
        for rank, rows in enumerate(split_rows(len(batch[0]), self._parts)):
            context = Context.alone(batch, structure, rows.start, rows.stop, rows.total)
            context.rank, context.wants_outputs = rank, wants_outputs
            context.size, context.rendezvous = 2, _NoExchange(2, 0.0)
            own = [array[rows.start : rows.stop] for array in batch]
            shapes[_key(own, context, self._program)] = own, context
        for key, (own, context) in shapes.items():
            if key in self._seen and key not in self._captured and len(self._captured) < MOST_SHAPES:
                self._capture(key, own, context)
        self._seen.update(shapes)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One entry per captured shape, or one that says why steps run eagerly."""
        if self._refused:
            return [{"how": "eager", "why": self._refused}]
        return [captured.report for captured in self._captured.values()]

    def _capture(self, key: Any, batch: list[np.ndarray], context: Context) -> None:
        """Capture one shape; a warning, and no more attempts, if that cannot be done."""
        if self._refused:
            return
        try:
            captured = Captured(self._program, batch, context)
        # RuntimeError is what torch raises for values read on the host while tracing, NotImplementedError
        # for operations without a trace.
        except (NotCapturable, RuntimeError, NotImplementedError) as error:
            self._refused = " ".join(str(error).split()).split(" - ")[0]
            self._captured.clear()
            self._warn()
            return
        if self._mode == "inductor":
            captured.compile(max(1, CORES // min(self._parts, context.rows.total)))
        self._captured[key] = captured

    def _warn(self) -> None:
        """Say once why steps run eagerly."""
        warnings.warn(
            f"fastdp runs {self._program.model.name!r} eagerly: it cannot be captured because of {self._refused}",
            stacklevel=4,
        )


class Captured:
    """One captured step, for replicas with a given number of rows.

    Args:
        program: whose step.
        batch: a replica's rows.
        context: the replica's place.

    Raises:
        NotCapturable: the step does something that cannot be replayed.
        RuntimeError: torch cannot trace it.
    """

    def __init__(self, program: KerasProgram, batch: list[np.ndarray], context: Context) -> None:
        began = time.perf_counter()
        self._program = program
        variables = [v.value.detach() for v in program.variables]
        rows = [as_tensor(array, dtype) for array, dtype in zip(batch, _dtypes(context.structure), strict=True)]
        with replica_aware():
            recorded = _Recorded()
            self._eager(variables, rows, context, recorded)
            self._draws = recorded.draws
            outcomes = [torch.empty_like(outcome) for outcome in recorded.outcomes]
            self._layout = _Layout()
            self._arguments = [*variables, *rows, *outcomes]
            graph = make_fx(lambda *flat: self._flat(list(flat), len(variables), len(rows), context))(*self._arguments)
        self._run: Any = _cleaned(graph)
        self.report: dict[str, Any] = {
            "how": "traced",
            "rows": context.rows.count,
            "operations": sum(node.op == "call_function" for node in self._run.graph.nodes),
            "trace_seconds": time.perf_counter() - began,
        }

    def replay(self, mapping: Mapping, batch: list[np.ndarray], context: Context) -> Outcome:
        """Run the step on a replica's variables and rows. On its device's worker."""
        rows = [as_tensor(array, dtype) for array, dtype in zip(batch, _dtypes(context.structure), strict=True)]
        run = self._program.running_replica(context)
        variables = [tensor.detach() for _, tensor in mapping]
        with torch.no_grad():
            with (
                replica_scope(run),
                ReplicaScope(list(zip(self._program.variables, variables, strict=True)), set()) as s,
            ):
                draws = [draw() for draw in self._draws]
            seeds = s.assigned(list(zip(self._program.variables, variables, strict=True)))
            flat = self._run(*variables, *rows, *draws)
        return self._layout.unflatten(flat, seeds)

    def compile(self, threads: int) -> None:
        """Let TorchInductor take over, with `threads` cores for one replica."""
        began = time.perf_counter()
        with torch._inductor.config.patch({"cpp.threads": threads, "compile_threads": 1}):
            run = inductor_compile(self._run, self._arguments)
        self._run = run
        self.report |= {"how": "compiled", "compile_seconds": time.perf_counter() - began}

    def _eager(self, variables: list[torch.Tensor], rows: list[torch.Tensor], context: Context, draws: Any) -> Outcome:
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

    def _flat(self, tensors: list[torch.Tensor], variables: int, rows: int, context: Context) -> list[torch.Tensor]:
        """The traced function: a step as tensors in, tensors out."""
        with torch.enable_grad():
            draws = _Given(iter(tensors[variables + rows :]))
            outcome = self._eager(tensors[:variables], tensors[variables : variables + rows], context, draws)
        if any(id(self._program.variables[i]) in self._program.effects.seeds for i, _ in outcome.assigned):
            raise NotCapturable("a seed generator that the model reads itself")
        return self._layout.flatten(outcome)


class _NoExchange(Rendezvous):
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
    outputs: int = 0
    structure: OutputStructure | None = None
    assigned: list[int] = field(default_factory=list)
    moments: list[tuple[Any, float]] = field(default_factory=list)

    def flatten(self, outcome: Outcome) -> list[torch.Tensor]:
        """An outcome as one list; remembers how."""
        found = [gradient for gradient in outcome.gradients if gradient is not None]
        numbers = iter(range(len(found)))
        self.gradients = [None if gradient is None else next(numbers) for gradient in outcome.gradients]
        self.terms, self.outputs, self.structure = len(outcome.terms), len(outcome.outputs), outcome.structure
        self.assigned = [i for i, _ in outcome.assigned]
        self.moments = [(layer, moments.count) for layer, moments in outcome.moments]
        statistics = [t for _, moments in outcome.moments for t in (moments.mean, moments.variance)]
        values = [value for _, value in outcome.assigned]
        return [t.detach() for t in (*found, *outcome.terms, *outcome.outputs, *values, *statistics)]

    def unflatten(self, flat: Sequence[torch.Tensor], seeds: list[tuple[int, torch.Tensor]]) -> Outcome:
        """The outcome again, with the seeds that the draws have moved."""
        rest: Iterator[torch.Tensor] = iter(flat)
        found = [next(rest) for i in self.gradients if i is not None]
        return Outcome(
            [None if i is None else found[i] for i in self.gradients],
            [next(rest) for _ in range(self.terms)],
            [next(rest) for _ in range(self.outputs)],
            self.structure,
            [*seeds, *((i, next(rest)) for i in self.assigned)],
            [(layer, Moments(next(rest), next(rest), count)) for layer, count in self.moments],
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


def _key(batch: Sequence[np.ndarray], context: Context, program: KerasProgram) -> Any:
    """What a graph depends on: rows and their share, shapes, dtypes, and whether regularizers are counted."""
    shapes = tuple((array.shape[1:], array.dtype.str) for array in batch)
    first = context.rank == 0 and program.is_regularized
    rows: Rows = context.rows
    return rows.count, rows.total, first, context.wants_outputs, shapes, context.structure.dtypes


def _refusal(program: KerasProgram) -> str | None:
    """Why no step of a program can be captured, known beforehand."""
    if program.sync_batch_norm:
        return "sync_batch_norm: replicas exchange moments in the middle of a step"
    if isinstance(program.optimizer, keras.optimizers.LossScaleOptimizer):
        return "loss scaling: the scale changes from step to step"
    return None


def _dtypes(structure: Structure) -> list[str]:
    """The dtypes of the arrays of a batch."""
    return [dtype for dtype in structure.dtypes if dtype is not None]


def _pack(structure: Structure, tensors: Sequence[torch.Tensor]) -> Any:
    """Tensors in the nest of a batch."""
    leaves = iter(tensors)
    return keras.tree.pack_sequence_as(
        structure.nest, [None if dtype is None else next(leaves) for dtype in structure.dtypes]
    )


def _cleaned(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Without detaches, dead code and operations that are there twice."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return torch.fx.GraphModule(module, fx_graph_cse(graph))
