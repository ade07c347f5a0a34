"""What a replica's thread knows while it runs a module, and backward in the replica's own mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from fastdp.capture.pure_step import Draws
from fastdp.comm.context import Context
from fastdp.shard import Rows
from fastdp.tensors.function_mode import plain


@dataclass(slots=True)
class Normalized:
    """One call of batch normalization: its running statistics, the momentum, and the replica's own moments."""

    mean: torch.Tensor
    variance: torch.Tensor
    momentum: float
    sums: Any


@dataclass(slots=True)
class ReplicaContext:
    """One replica in one step. `rows` are the rows that it works on: the replica's own, or all rows.

    `nested` says that backward has run inside backward. `repeatable` counts the checkpointed parts around forward,
    whose draws backward repeats, and `repeats` says that it does so now. `tried` says that the module runs, whose draws
    a trial may have seen, and not the loss function. The loss is multiplied by `scale` before backward. `told`, shared
    by the whole program, records given warnings. `traced` says that the step is being traced, and what it computes may
    not be read. `keeps_graph` says that backward is a pass of its own, in a loop. `draws_by` makes all random draws of
    the step, if somebody keeps or repeats them. `weighs`: losses in forward are weighed by what counts
    in the whole batch; `has_losses`: forward has called one that may be.
    """

    context: Context
    rows: Rows
    sync_batch_norm: bool = False
    draws: int = 0
    backward: bool = False
    nested: bool = False
    repeatable: int = 0
    repeats: bool = False
    tried: bool = True
    normalized: list[Normalized] = field(default_factory=list)
    scale: float = 1.0
    told: set[str] = field(default_factory=set)
    traced: bool = False
    keeps_graph: bool = False
    draws_by: Draws | None = None
    weighs: bool = False
    has_losses: bool = False

    def draw(self, make: Callable[[ReplicaContext], torch.Tensor]) -> torch.Tensor:
        """The outcome of `make(self)`, a draw on this replica. A captured step makes it for each replica and step."""
        return make(self) if self.draws_by is None else self.draws_by.take(ReplicaDraw(make, self))

    def next_draw(self) -> int:
        """The number of the next random draw in the step.

        Raises:
            NotImplementedError: called in backward by something else than a part that repeats the draws of forward.
        """
        if self.backward and not self.repeats:
            raise NotImplementedError(
                "A random op ran in backward, where each replica would draw numbers of its own: in a hook, in a "
                "backward of an autograd.Function, or in a part that is recomputed there. Use torch.utils.checkpoint "
                "with preserve_rng_state=True, which repeats the draws of forward, or use gpus=[0]."
            )
        self.draws += 1
        return self.draws


class ReplicaDraw:
    """A draw of a step that is captured.

    Args:
        make: makes the draw on a replica.
        running: the replica of the first call.
    """

    def __init__(self, make: Callable[[ReplicaContext], torch.Tensor], running: ReplicaContext) -> None:
        self.make = make
        self._first: ReplicaContext | None = running

    def __call__(self) -> torch.Tensor:
        """Make the draw for the first time. Forgets the replica, and with it the batch."""
        running, self._first = self._first, None
        assert running is not None
        return self.make(running)


def backward(
    running: ReplicaContext, roots: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], *, retain: bool = False
) -> None:
    """Run `torch.autograd.backward` with the replica's mode active, because checkpoints recompute in it.

    If torch gets tensors, it passes `backward` itself to the mode and disables the mode meanwhile. With graph
    edges it does not.
    """
    if not roots:
        return
    with plain():
        edges = [get_gradient_edge(root) for root in roots]
    running.backward = True
    try:
        torch.autograd.backward(edges, list(seeds), retain_graph=retain)
    finally:
        running.backward = False


def gradients_of(
    running: ReplicaContext, loss: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Run `torch.autograd.grad` of the scaled loss as `backward` does. None for inputs that it does not depend on."""
    with plain():
        edges, root = [get_gradient_edge(tensor) for tensor in inputs], get_gradient_edge(loss)
        seed = torch.tensor(running.scale, dtype=torch.float64).to(loss)  # infinite where it is too large
    running.backward = True
    try:
        return torch.autograd.grad([root], edges, [seed], allow_unused=True)
    finally:
        running.backward = False
