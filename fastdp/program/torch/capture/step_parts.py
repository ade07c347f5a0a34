"""Parts of a torch module's step that is traced: functions, gradients, and what forward leaves in buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch._subclasses import FakeTensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from fastdp.errors import NotCapturable
from fastdp.program.torch import batch_axis, embeddings, fast_paths, weighed_losses
from fastdp.program.torch import gradients as torch_gradients
from fastdp.program.torch.capture.batch_norm import traced_batch_norm
from fastdp.program.torch.capture.lent_tensors import LentTensors
from fastdp.program.torch.capture.outcome import OutcomeForm, TorchOutcome
from fastdp.program.torch.losses import Reported
from fastdp.program.torch.module import Slot
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.random import handlers as random_handlers
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.judged import is_exact
from fastdp.shard import Rows
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.row_effects import Effect, Layout
from fastdp.tensors.sums import wide

# The functions of a replica that has all rows, and of one among several.
ALONE: dict[Any, Handler] = {
    **random_handlers.HANDLERS,
    **torch_gradients.HANDLERS,
    F.batch_norm: traced_batch_norm,
}
TOGETHER: dict[Any, Handler] = {
    **ALONE,
    **batch_axis.HANDLERS,
    **embeddings.HANDLERS,
    **fast_paths.HANDLERS,
    **weighed_losses.HANDLERS,
}


class NoTracedPeers:
    """Refuses what `fastdp.replica` offers in a trace: replicas share it, and cannot meet in its middle."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotCapturable("fastdp.replica: replicas meet in the middle of the step, or differ")

    all_reduce = all_gather = _refuse
    rank: int = property(_refuse)  # type: ignore[assignment]
    count: int = property(_refuse)  # type: ignore[assignment]
    rows: Rows = property(_refuse)  # type: ignore[assignment]


@dataclass(slots=True)
class FoundInBuffers:
    """What forward has left in buffers: numbers to be summed over replicas, and values, as `OutcomeForm` names them.

    `has_sums` says that there are such numbers, and `replaced` which buffers of `constant` are other tensors now.
    """

    moved: list[int] = field(default_factory=list)
    normalized: list[tuple[int, int, float]] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    constant: dict[int, torch.Tensor] = field(default_factory=dict)
    unjudged: dict[int, str] = field(default_factory=dict)
    replaced: frozenset[int] = frozenset()
    has_sums: bool = False

    def without_values(self) -> FoundInBuffers:
        """The same without tensors: `constant` has its keys alone."""
        return replace(self, sums=[], constant=dict.fromkeys(self.constant), has_sums=bool(self.sums))


@dataclass(slots=True)
class TracedLoss:
    """A replica's contribution to the loss, and what else forward gives.

    `value` is the contribution in float64, if it is not computed from `contribution`. Other attributes as in
    `OutcomeForm` and `TorchOutcome`; `nest` goes with `outputs`.
    """

    contribution: torch.Tensor
    dtype: torch.dtype
    reported: Reported | None = None
    weight: float = 1.0
    value: torch.Tensor | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)
    nest: tuple[Nest, list[Layout]] | None = None

    def outcome(self, gradients: Sequence[torch.Tensor | None], buffers: FoundInBuffers) -> TorchOutcome:
        """The outcome of the step."""
        value = self.contribution.detach().double() if self.value is None else self.value
        form = OutcomeForm(
            self.dtype,
            tuple(buffers.moved),
            tuple(buffers.normalized),
            tuple(buffers.constant),
            buffers.unjudged,
            self.reported,
            self.weight,
            self.nest,
        )
        sums = torch.cat([value.reshape(1), *buffers.sums])
        outputs = [tensor.detach() for tensor in self.outputs]
        return TorchOutcome(gradients, sums, list(buffers.constant.values()), self.reported, outputs, form)


def is_fake(variables: Sequence[torch.Tensor]) -> bool:
    """Whether the step is being traced, and not run with its values before that."""
    return isinstance(variables[0], FakeTensor)


def gradients_of_leaves(
    running: ReplicaContext,
    roots: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
    seeds_of: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
) -> list[torch.Tensor | None]:
    """The gradients by the leaves that require one; None for the others, and where nothing depends on one.

    Args:
        roots: where backward begins: the loss, or outputs.
        seeds_of: gives the gradients by the roots.

    Raises:
        NotCapturable: nothing has a gradient, or one is sparse.
    """
    wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    if not wanted or not any(root.requires_grad for root in roots):
        raise NotCapturable("a result without a gradient")
    seeds = list(seeds_of(roots))
    running.backward = True
    # By edges, so that the mode is active in backward too: see `fastdp.program.torch.replica.backward`.
    edges = [get_gradient_edge(leaves[i]) for i in wanted]
    found = torch.autograd.grad([get_gradient_edge(root) for root in roots], edges, seeds, allow_unused=True)
    if any(gradient is not None and gradient.layout != torch.strided for gradient in found):
        raise NotCapturable("sparse gradients")
    gradients: list[torch.Tensor | None] = [None] * len(leaves)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def found_in_buffers(
    slots: Sequence[Slot],
    values: Sequence[torch.Tensor],
    variables: Sequence[torch.Tensor],
    lent: LentTensors,
    written: Sequence[int],
    running: ReplicaContext,
) -> FoundInBuffers:
    """Gather what forward has left in buffers, by the rules of `fastdp.program.torch.module_buffers`.

    Args:
        slots: the module's parameters and buffers.
        values: the tensors that forward has had in their places, `lent` to the module.
        variables: their values before.
        written: the numbers of those that forward has changed.
        running: the replica.

    Raises:
        NotCapturable: replicas exchange a buffer's values.
    """
    alone = running.rows.count == running.rows.total
    judged = running.context.structure.judged
    declared = running.context.structure.declared
    said = declared.buffers if declared is not None and not alone else {}
    effects: dict[int, Effect] = dict(judged.states) if judged is not None and not alone else {}
    effects |= {i: said[slot.name] for i, slot in enumerate(slots) if slot.name in said}
    found = FoundInBuffers(replaced=lent.replaced)
    for i in sorted({*written, *effects}):
        effect = effects.get(i)
        if not alone and judged is None and effect is None and not is_exact(variables[i]):
            effect = Effect.MEAN
        if effect in (Effect.LARGEST, Effect.SMALLEST):
            raise NotCapturable(f"the buffer `{slots[i].name}`, which is {effect.value}")
        if effect in (Effect.MEAN, Effect.SUM):
            weight = 1.0 if effect is Effect.SUM else running.rows.share
            found.moved.append(i)
            found.sums.append(((wide(lent.value(i)) - wide(variables[i])).double() * weight).reshape(-1))
            continue
        found.constant[i] = lent.value(i)
        if not alone and ((effect is None and judged is not None) or said.get(slots[i].name) is Effect.SAME):
            found.unjudged[i] = slots[i].name
    numbers = {id(value): i for i, value in enumerate(values)}
    for call in running.normalized:
        if id(call.mean) not in numbers or id(call.variance) not in numbers:
            raise NotCapturable("running statistics of batch normalization that are no buffers of the module")
        found.normalized.append((numbers[id(call.mean)], numbers[id(call.variance)], call.momentum))
        found.sums.append(call.sums)
    return found
