"""A model of two formulas as captured steps know it: plain tensors and a function, no Keras and no torch.nn.Module.

It has what makes a step hard to capture: weights, one that nothing depends on, a random mask by global row whose seed
is a variable, a running total that each step assigns, and settings in Python that it reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastdp.buffers import FlatBuffers
from fastdp.capture.pure_step import Draw, Draws, Moved, PureStep
from fastdp.capture.reach import Reach, Rules
from fastdp.capture.steps import Captures
from fastdp.capture.watch import Watch
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.runtime.host.device import HostDevice
from fastdp.shard import split_rows
from fastdp.tensors.arrays import as_tensor, spec_of
from fastdp.tensors.random import uniform_rows

KERNEL, BIAS, UNUSED, SEED, TOTAL = range(5)
TRAINED = [KERNEL, BIAS, UNUSED]


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A sum over rows."""
    return ((outputs - targets) ** 2).sum()


@dataclass
class Settings:
    """What the step reads of Python."""

    scale: float = 1.0
    factors: list[float] = field(default_factory=lambda: [1.0, 2.0])
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = squares


@dataclass
class LinearOutcome:
    """What a step gives."""

    gradients: Sequence[torch.Tensor | None]
    loss: torch.Tensor
    outputs: torch.Tensor
    total: torch.Tensor
    moved: Moved


class LinearForm:
    """The same without tensors: there is nothing to remember."""

    def filled(
        self, gradients: Sequence[torch.Tensor | None], values: Iterator[torch.Tensor], moved: Moved
    ) -> LinearOutcome:
        return LinearOutcome(gradients, next(values), next(values), next(values), moved)


class LinearReplica:
    """A replica's memory, all in flat buffers."""

    def __init__(self, index: int, variables: Sequence[torch.Tensor]) -> None:
        self.device = HostDevice(index)
        specs = [spec_of(str(i), variable) for i, variable in enumerate(variables)]
        flat = FlatBuffers(specs, self.device)
        self.variables = [as_tensor(view, spec.dtype) for view, spec in zip(flat.views, specs, strict=True)]
        for mine, value in zip(self.variables, variables, strict=True):
            mine.copy_(value)
        self.gradient_buffers = FlatBuffers([specs[i] for i in TRAINED], self.device)
        self.gradients = [as_tensor(view) for view in self.gradient_buffers.views]


class AtOnce:
    """Draws of an eager step."""

    def take(self, draw: Draw) -> torch.Tensor:
        return draw()


@dataclass
class _Run:
    """What a draw goes by."""

    seed: torch.Tensor
    context: Context


class LinearStep:
    """As `fastdp.capture.pure_step.PureStep`."""

    name = "linear"
    spans_devices = False
    trained = TRAINED

    def __init__(self, parts: int, never: str = "", own: str = "", reads: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        kernel, bias = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
        first = [kernel, bias, torch.zeros(2), torch.tensor(7), torch.zeros(())]
        self.replicas = {rank: LinearReplica(rank, first) for rank in range(parts)}
        self.most_replicas = parts
        self.settings = Settings()
        self._never, self._own, self._reads = never, own, reads
        self._run = threading.local()
        self.prepared = 0

    @property
    def variables(self) -> list[torch.Tensor]:
        return [variable.detach() for variable in self.replicas[0].variables]

    def why_never(self) -> str:
        return self._never

    def own_code(self) -> str:
        return self._own

    def prepare(self) -> None:
        self.prepared += 1

    def key(self, context: Context) -> str:
        return context.structure

    def shape_name(self, context: Context) -> str:
        return repr((context.rows, context.batch.shapes, context.structure))

    def structure(self) -> str:
        return self.name

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        return [as_tensor(array).contiguous() for array in batch]

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> LinearOutcome:
        kernel, bias, _, seed, total = variables
        x, y = rows
        with self._running(seed, context) as run:
            mask = draws.take(self._mask)
        settings = self.settings
        outputs = torch.tanh(x @ kernel + bias) * mask * settings.scale * settings.factors[0]
        if self._reads and float(outputs.detach().sum()) > 1e9:
            outputs = outputs * 2.0
        loss = settings.loss(outputs, y) / context.rows.total
        found = torch.autograd.grad(loss, [variables[i] for i in TRAINED], allow_unused=True)
        moved = [] if run.seed is seed else [(SEED, run.seed)]
        return LinearOutcome(found, loss.detach(), outputs.detach(), total + x.sum(), moved)

    def flatten(self, outcome: LinearOutcome) -> tuple[list[torch.Tensor], LinearForm]:
        return [outcome.loss, outcome.outputs, outcome.total], LinearForm()

    def draw(
        self, draws: Sequence[Draw], variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], Moved]:
        with self._running(variables[SEED], context) as run:
            drawn = [draw().contiguous() for draw in draws]
        return drawn, [(SEED, run.seed)]

    @contextmanager
    def tracing(self) -> Iterator[None]:
        try:
            yield
        except NotCapturable as error:
            raise NotCapturable(f"{error}, in the formula") from error

    def watch(self, watch: Watch) -> None:
        Reach(watch, self.replicas[0].variables, Rules()).walk(self.settings, "settings")

    @contextmanager
    def _running(self, seed: torch.Tensor, context: Context) -> Iterator[_Run]:
        self._run.now = _Run(seed, context)
        yield self._run.now

    def _mask(self) -> torch.Tensor:
        """For the replica's rows of the global batch, by the seed, which it moves."""
        run = self._run.now
        drawn = uniform_rows((int(run.seed), 0), run.context.rows.start, run.context.rows.count, 3)
        run.seed = run.seed + 1
        return torch.from_numpy(drawn.copy()).gt(0.25).float()


def step_of(parts: int, **options: Any) -> PureStep[LinearOutcome]:
    """A step, as whoever captures it knows it."""
    return LinearStep(parts, **options)


@dataclass
class Trained:
    """What a training has left."""

    step: LinearStep
    losses: list[float]
    outputs: list[np.ndarray]
    variables: list[list[np.ndarray]]
    captures: Captures[LinearOutcome] | None
    ready: list[list[int]]
    latest: list[LinearOutcome] = field(default_factory=list)


def train(
    mode: str | None, parts: int, change: Callable[[LinearStep], None] = lambda step: None, **options: Any
) -> Trained:
    """Ten steps on batches of 6 and 5 rows by gradient descent, with a `change` before the sixth one."""
    step: Any = step_of(parts, **options)
    captures = None if mode is None else Captures(step, mode, parts)
    generator = np.random.default_rng(1)
    trained = Trained(step, [], [], [], captures, [])
    for number in range(10):
        if number == 5:
            change(step)
        total = (6, 6, 5, 5)[number % 4]
        batch = Batch.of([generator.normal(size=(total, n)).astype("float32") for n in (4, 3)], "a batch")
        if captures is not None:
            captures.prepare(batch, True)
        found = []
        for rank, rows in enumerate(split_rows(total, parts)):
            context = Context.alone(batch, "a batch", rows.start, rows.stop, total)
            context.rank, context.device = rank, step.replicas[rank].device
            trained.ready.append(mine := [])
            context.ready = mine.append
            own = [array[rows.start : rows.stop] for array in batch]
            captured = captures.find(context) if captures is not None else None
            if captured is not None:
                found.append(captured.replay(step.replicas[rank], own, context))
            else:
                own_variables = enumerate(step.replicas[rank].variables)
                variables = [variable.clone().requires_grad_(i in TRAINED) for i, variable in own_variables]
                found.append(step.compute(variables, step.rows(own, context), context, AtOnce()))
        _update(step, found)
        trained.latest = found
        trained.losses.append(sum(float(outcome.loss) for outcome in found))
        trained.outputs.append(np.concatenate([outcome.outputs.numpy() for outcome in found]))
        if captures is not None:
            captures.note(0.01)
    trained.variables = [[v.numpy().copy() for v in replica.variables] for replica in step.replicas.values()]
    return trained


def _update(step: LinearStep, found: Sequence[LinearOutcome]) -> None:
    """Add the replicas' gradients and totals up, and let all have the same variables."""
    before = [variable.clone() for variable in step.replicas[0].variables]
    (seed,) = {int(value) for outcome in found for number, value in outcome.moved if number == SEED}
    total = before[TOTAL] + sum(outcome.total - before[TOTAL] for outcome in found)
    sums = []
    for i in range(len(TRAINED)):
        given = [outcome.gradients[i] for outcome in found if outcome.gradients[i] is not None]
        sums.append(torch.stack(given).sum(0) if given else None)
    for replica in step.replicas.values():
        for number, gradient in zip(TRAINED, sums, strict=True):
            if gradient is not None:
                replica.variables[number].sub_(0.1 * gradient)
        replica.variables[SEED].fill_(seed)
        replica.variables[TOTAL].copy_(total)
