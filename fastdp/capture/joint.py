"""Traces a forward pass and its backward pass together, and runs them as two graphs: for the loop of a user's own.

The graph of both is a function of a replica's variables, its rows, the outcomes of its random draws, and the gradients
of the loss by the outputs (tangents). It is split into a forward graph, which also gives what backward needs, and a
backward graph (`fastdp.capture.graph.partition`). The loss lies between them and is never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from fastdp.capture.captured_form import CapturedForm, Run
from fastdp.capture.faults import Compiled
from fastdp.capture.graph.cores import layers_lead
from fastdp.capture.graph.indices import guarded
from fastdp.capture.graph.ownership import separated
from fastdp.capture.graph.partition import partition
from fastdp.capture.graph.passes import optimized
from fastdp.capture.graph.products import Product
from fastdp.capture.graph.rewrites import for_compiler
from fastdp.capture.pure_step import Draws, PureFunction
from fastdp.capture.trace import GivenDraws, RecordedDraws, as_traced, graph_of
from fastdp.comm.context import Context

Tangents = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


@dataclass(slots=True)
class JointOutcome:
    """The result of a forward pass and its backward pass.

    Attributes:
        outputs: what the loss may depend on.
        values: further results of forward.
        gradients: by what has gradients, in its order; None for what nothing depends on.
        form: whatever else describes the result; not traced.
    """

    outputs: list[torch.Tensor]
    values: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    form: Any


class PureJoint(PureFunction, Protocol):
    """A model's forward and backward pass without side effects."""

    def compute(
        self,
        variables: Sequence[torch.Tensor],
        rows: Sequence[torch.Tensor],
        context: Context,
        draws: Draws,
        tangents: Tangents,
    ) -> JointOutcome:
        """Run forward and backward. No side effects.

        Args:
            variables, rows, context, draws: as in `PureStep.compute`.
            tangents: called once between the passes, with the outputs from which backward begins; gives the gradients
                of the loss by them.

        Raises:
            NotCapturable: a pass does something that a graph cannot repeat.
        """


@dataclass(frozen=True, slots=True)
class Passes:
    """A forward and a backward graph that belong together: what one keeps the other takes."""

    forward: Run
    backward: Run


class CapturedJoint(CapturedForm):
    """A captured forward pass and its backward pass, for replicas with a given number of rows.

    Args:
        step: the passes of a model.
        batch: a replica's rows.
        context: the replica's place.

    Attributes:
        given: the numbers of the inputs of forward (variables, rows, draws) that backward takes.
        shared: the numbers of those of whose memory backward takes views.
        form: `JointOutcome.form`.
        passes: the graphs in use.

    Raises:
        NotCapturable: the passes do something that cannot be recorded or replayed; the message says what, and where.
    """

    def __init__(self, step: PureJoint, batch: Sequence[Any], context: Context) -> None:
        super().__init__()
        began = time.perf_counter()
        self._step = step
        variables, rows = step.variables, [row.detach() for row in step.rows(batch, context)]
        with step.tracing():
            recorded, seeds = RecordedDraws(), list[torch.Tensor]()

            def seeds_of(outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
                seeds.extend(torch.ones(y.shape, dtype=y.dtype, device=y.device) for y in outputs)
                return seeds

            step.compute(variables, rows, context, recorded, seeds_of)
            self._draws = recorded.draws
            arguments = [*variables, *rows, *recorded.outcomes, *seeds]
            counts = len(variables), len(rows), len(recorded.outcomes)
            joint = graph_of(lambda *flat: self._flat(flat, counts, context), arguments)
            # The user gets the outputs: none may be a constant of the graph, or share memory with another.
            expected = [f"output {i}" for i in range(self._outputs)]
            given = self._values + sum(self._has_gradient)
            self._split(separated(optimized(joint), [*expected, *([None] * given)]), sum(counts))
        self.seconds = time.perf_counter() - began

    def _split(self, joint: GraphModule, inputs: int) -> None:
        """Make the passes of the graph of both."""
        parts = partition(joint, inputs, self._outputs + self._values)
        self._graphs = [parts.forward, parts.backward]
        self.given, self.shared, self._kept = parts.given, parts.shared, parts.kept
        self.passes = self._traced = Passes(parts.forward, parts.backward)
        self.one_core = layers_lead(parts.forward.graph)
        self.operations = sum(node.op == "call_function" for graph in self._graphs for node in graph.graph.nodes)

    @property
    def drawn(self) -> int:
        """The number of draws of the passes."""
        return len(self._draws)

    def repeat_draws(self, variables: Sequence[torch.Tensor], context: Context) -> list[torch.Tensor]:
        """Make the draws of the passes, before forward runs. On the replica of `context`."""
        with torch.no_grad(), as_traced():
            return self._step.draw(self._draws, variables, context)[0] if self._draws else []

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Run forward.

        Args:
            inputs: variables, rows and outcomes of draws.

        Returns:
            The outputs, the other values, and what backward takes after the inputs `given`.
        """
        with torch.no_grad(), as_traced(), self.on_cores():
            found = list(self.passes.forward(*inputs))
        results = self._outputs + self._values
        return found[: self._outputs], found[self._outputs : results], found[results:]

    def gradients(
        self, passes: Passes, needed: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Run backward.

        Args:
            passes: those in use when forward ran.
            needed: the inputs `given`, then what forward has kept.
            tangents: by the outputs from which backward begins.
        """
        with torch.no_grad(), as_traced(), self.on_cores():
            found = iter(passes.backward(*needed, *(tangent.contiguous() for tangent in tangents)))
        return [next(found) if there else None for there in self._has_gradient]

    def to_compile(self, onednn_is_faster: Callable[[Product], bool]) -> list[GraphModule]:
        """As `CapturedForm.to_compile`: forward and backward."""
        return [for_compiler(guarded(graph), onednn_is_faster) for graph in self._graphs]

    def checked(self, runs: Sequence[Run]) -> Passes:
        """As `CapturedForm.checked`."""
        results = self._outputs + self._values + self._kept, sum(self._has_gradient)
        return Passes(*(Compiled(run, *one) for run, *one in zip(runs, self._graphs, results, strict=True)))

    @property
    def failed(self) -> str:
        """As `CapturedForm.failed`."""
        if self.disagreed:
            return f"the compiled passes disagree with the eager ones in {self.disagreed}"
        runs = (self.passes.forward, self.passes.backward)
        return next((run.failed for run in runs if isinstance(run, Compiled) and run.failed), "")

    def use(self, compiled: Passes) -> None:
        """As `CapturedForm.use`."""
        self.passes = compiled

    def use_traced(self) -> None:
        """As `CapturedForm.use_traced`."""
        self.runs_eagerly = False
        if self.passes is not self._traced:
            self.passes, self.disagreed, self.checks = self._traced, "", 0

    def _flat(
        self, tensors: Sequence[torch.Tensor], counts: tuple[int, int, int], context: Context
    ) -> list[torch.Tensor]:
        """The function to trace: both passes, from tensors to tensors."""
        given = iter(tensors)
        variables, rows, drawn = ([next(given) for _ in range(count)] for count in counts)
        outcome = self._step.compute(variables, rows, context, GivenDraws(iter(drawn)), lambda outputs: list(given))
        self.form = outcome.form
        self._outputs, self._values = len(outcome.outputs), len(outcome.values)
        self._has_gradient = [gradient is not None for gradient in outcome.gradients]
        gradients = [gradient for gradient in outcome.gradients if gradient is not None]
        return [tensor.detach() for tensor in (*outcome.outputs, *outcome.values, *gradients)]
