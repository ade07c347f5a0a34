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
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.collectives import NoPeers, peers_scope
from fastdp.tensors.function_mode import ReplicaMode
from fastdp.tensors.moments import Moments

_replica = threading.local()
_NO_PEERS = NoPeers(
    "fastdp.replica works in torch modules. In a layer of a Keras model write what one device computes: fastdp finds "
    'out that it mixes rows, and rows="merge" runs it on the whole batch.'
)


@dataclass(slots=True)
class ReplicaContext:
    """The state of a replica's thread while it runs the model.

    `made_up` says that a draw in a trial had to invent the rows that the trial leaves out.

    `generators` are the replica's copies of the random generators that the model does not hold. `drawing` is set during
    a draw of Keras, which handles rows itself: the torch functions that it calls are not intercepted.

    `watches_torch` makes torch's own random functions, called by this thread, draw by rows. It is off if the model is
    known to call none, since intercepting costs a microsecond per call of any torch function.

    `parts` are the parts of the forward pass that backward recomputes (`fastdp.program.keras.recompute`).

    `by_loss` holds the ids of variables that the loss of the merged outputs has assigned.

    `added_by` maps the id of each `add_loss` term to its layer.

    `units` records the calls of layers and operations, or runs some of them on merged inputs
    (`Units`).

    `placed` holds the graph of a model whose layers run on several devices of the replica, and its runner.

    `branches` are the answers of tensors that the code of the forward pass has asked (`fastdp.program.keras.branches`).

    `waited_for` says that all other replicas wait for this one, which computes the loss of the merged outputs.

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
    waited_for: bool = False
    branches: list[bool] = field(default_factory=list)

    @property
    def is_among_others(self) -> bool:
        """Whether other replicas run at the same time, or a trial asks for them."""
        return self.frozen_moments or (self.context.here > 1 and not self.waited_for)

    def entries_per_row(self, shape: Any, seed: Any = None) -> int:
        """The number of entries of a draw's first axis per row of the replica; 0 if the draw is not by rows.

        Args:
            shape: the shape of the draw.
            seed: the seed of the draw.
        """
        rows = self.context.rows
        if not len(shape) or 3 < rows.count == rows.total:  # a trial has at most three rows
            return 0
        sizes = tuple(int(size) for size in shape)
        per_row = self.sites.per_row(sizes, rows.count, seed, self.met, trial=self.frozen_moments)
        return per_row if rows.count < rows.total else 0

    def not_captured(self, what: str) -> None:
        """Refuse a capture, because `what` cannot be repeated outside the graph.

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
        alone = state.context.size == 1 and not state.frozen_moments
        with (
            peers_scope(None if alone else _NO_PEERS),
            mode(state, torch_draws.HANDLERS) if state.watches_torch else nullcontext(),
        ):
            yield state
    finally:
        _replica.running = before


def keras_device(device: QueueDevice | None) -> Any:
    """A context that makes Keras create tensors on the replica's own GPU; without a GPU it changes nothing."""
    return keras.device(device.torch_device) if device is not None and device.on_gpu else nullcontext()
