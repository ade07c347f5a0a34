"""What the thread of a replica knows while it runs a Keras model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import torch

from fastdp.capture.pure_step import Draws
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.keras.random import torch_draws
from fastdp.program.keras.random.draw_sites import DrawSites, Site
from fastdp.program.keras.random.generators import Generators
from fastdp.tensors.function_mode import ReplicaMode
from fastdp.tensors.moments import Moments

_replica = threading.local()


@dataclass(slots=True)
class ReplicaContext:
    """What a replica's thread knows while it runs the model.

    `made_up` says that a draw of a trial had to invent the rows that the trial leaves out.

    `generators` are its copies of the random generators that the model does not hold. `drawing` says that a draw of
    Keras's is being made, which knows about rows: what it draws by is not looked at again.

    `watches_torch` says that torch's own random functions, called by this thread, draw by rows: not where the model is
    known to call none, since watching costs a microsecond for each function of torch's that is called.

    `parts` are those of the forward pass that backward runs again (`fastdp.program.keras.recompute`).

    `by_loss` has the ids of variables that the loss of the merged outputs has assigned.

    `added_by` has the layer of each `add_loss` term, by the term's identity.

    `units` records the calls of layers and operations, or runs some of them on merged inputs
    (`Units`).

    `placed` holds the graph of a model whose layers run on several devices of the replica, and what runs it.

    `frozen_moments` makes BatchNormalization use its moving statistics (for probing, where rows must not
    influence each other).
    """

    context: Context
    sync_batch_norm: bool = False
    frozen_moments: bool = False
    seed: int = 0
    moments: list[tuple[keras.layers.Layer, Moments]] = field(default_factory=list)
    terms: list[torch.Tensor] = field(default_factory=list)
    masks: dict[tuple[int, str], Any] = field(default_factory=dict)
    draws: Draws | None = None
    made_up: bool = False
    sites: DrawSites = field(default_factory=DrawSites)
    met: Counter[Site] = field(default_factory=Counter)
    generators: Generators = field(default_factory=Generators)
    drawing: bool = False
    watches_torch: bool = True
    placed: Any = None
    units: Units | None = None
    added_by: dict[int, Any] = field(default_factory=dict)
    by_loss: frozenset[int] = frozenset()
    parts: list[Any] = field(default_factory=list)

    def entries_per_row(self, shape: Any, seed: Any = None) -> int:
        """How many entries of the first axis of a draw belong to each of the replica's rows; 0: it is not by rows.

        Args:
            shape: of the draw.
            seed: what it is seeded with.
        """
        rows = self.context.rows
        if not len(shape) or 3 < rows.count == rows.total:  # a model is tried on three rows at the most
            return 0
        sizes = tuple(int(size) for size in shape)
        per_row = self.sites.per_row(sizes, rows.count, seed, self.met, trial=self.frozen_moments)
        return per_row if rows.count < rows.total else 0

    def not_captured(self, what: str) -> None:
        """End a capture: `what` cannot be repeated outside the graph.

        Raises:
            NotCapturable: the step is being captured.
        """
        if self.draws is not None:
            raise NotCapturable(what)


class Units(Protocol):
    """Controls how the units of a forward pass run."""

    def call(self, run: Callable[..., Any], operation: Any, args: Any, kwargs: Any, state: ReplicaContext) -> Any:
        """The result of `run(operation, *args, **kwargs)`, or a replacement for it."""

    def added(self, layer: Any) -> None:
        """Called when a layer adds a loss."""


def running() -> ReplicaContext | None:
    """The replica that this thread is running, if any."""
    return getattr(_replica, "running", None)


@contextmanager
def replica_scope(state: ReplicaContext) -> Iterator[ReplicaContext]:
    """Mark this thread as running a replica."""
    before = running()
    _replica.running = state
    try:
        mode: Any = ReplicaMode
        with mode(state, torch_draws.HANDLERS) if state.watches_torch else nullcontext():
            yield state
    finally:
        _replica.running = before


def keras_device(device: Any) -> Any:
    """Where Keras puts the tensors that a layer makes: on the replica's own GPU. None: where it always does."""
    return keras.device(device.torch_device) if device is not None and device.on_gpu else nullcontext()
