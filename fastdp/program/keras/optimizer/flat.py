"""Applies a Keras optimizer to flat buffers: one update instead of one per variable.

Keras still does the math. A *stand-in* for the user's optimizer, of the same class and with the same settings, gets
variables that are pieces of the flat buffers. Keras applies everything around an update (loss scaling, clipping,
gradient accumulation, weight averages) to the pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import keras
import torch

from fastdp.buffers import FlatBuffers, Memory
from fastdp.program.keras.optimizer.fused import fused_step
from fastdp.program.keras.optimizer.slots import Slots, chain
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.tensors.arrays import as_tensor, dtype_name

# Elements per piece on a CPU. An update passes over its operands several times, and a piece stays in the caches
# meanwhile. bench/optimizers.py has the measurements.
PIECE = 1 << 18
# With several threads: pieces per core, so that all threads end at about the same time, and the smallest piece.
SHARED_PIECES, SMALLEST_PIECE = 3, 1 << 14
_REMEMBERED = 8


class FlatVariable(keras.Variable):
    """A Keras variable over memory that it does not own. An assignment writes to that memory.

    `tensor` is that memory; reading it skips the checks that Keras makes when a variable's value is read.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        super().__init__(
            torch.nn.Parameter(tensor, requires_grad=False),
            dtype=dtype_name(tensor),
            trainable=False,
            autocast=False,
            name="flat",
        )

    def _convert_to_tensor(self, value: Any, dtype: Any = None) -> torch.Tensor:
        """Keep a tensor on its device. Keras would move it to the calling thread's device."""
        if isinstance(value, torch.Tensor) and (dtype is None or dtype_name(value) == dtype):
            return value
        return super()._convert_to_tensor(value, dtype)


@dataclass(slots=True)
class _Region:
    """All trainable variables of one dtype: the memory of the variables, the gradients and each kind of slots.

    `members` are the numbers of the variables, `starts` their offsets. The gaps between them stay zero.
    """

    variables: torch.Tensor
    gradients: torch.Tensor
    kinds: list[torch.Tensor]
    members: list[int]
    starts: list[int]
    gaps: torch.Tensor

    def first(self) -> _Region:
        """A region with copies of the first element of each buffer."""
        variables, gradients, *kinds = (t[:1].clone() for t in (self.variables, self.gradients, *self.kinds))
        return _Region(variables, gradients, kinds, self.members[:1], [0], self.gaps[:0])


@dataclass(slots=True)
class _Pieces:
    """The flat buffers split into pieces whose variables are treated alike."""

    variables: list[FlatVariable]
    kinds: list[list[FlatVariable]]
    indices: dict[int, int]
    decays: dict[int, bool]
    used: list[FlatVariable]
    gradients: list[torch.Tensor]


class FlatUpdate:
    """The update of one replica.

    Args:
        optimizer: the user's built optimizer. Each update reads its settings; its own variables stay unchanged.
        slots: its slots, laid out for flat buffers.
        trainable: the variables to train, the first ones in `memory.variables`.
        memory: the replica's buffers, written in place.
    """

    def __init__(self, optimizer: Any, slots: Slots, trainable: Sequence[keras.Variable], memory: Memory) -> None:
        self._optimizer = optimizer
        self._slots = slots
        self._trainable = list(trainable)
        self._regions = _regions(slots, memory)
        at = {id(v): view for v, view in zip(slots.order, _tensors(memory.slots), strict=True)}
        self._scalars = [FlatVariable(at[id(slot.variables[0])]) for slot in slots.scalars]
        self._pieces: dict[tuple[frozenset[int], tuple[bool, ...], bool], _Pieces] = {}

    def apply(self, unused: frozenset[int], reduced: bool = True, share: WorkStealing | None = None) -> None:
        """Update variables and slots from the gradients.

        Args:
            unused: numbers of the variables without a gradient.
            reduced: whether the gradients are those of the whole batch. If not, Keras does not accumulate them.
            share: distributes the pieces to several threads.

        Raises:
            ValueError: no variable has a gradient; Keras's own message.
        """
        innermost = chain(self._optimizer)[-1]
        if unused:  # Keras warns about them, or raises if there are no others
            gradients = [None if i in unused else True for i in range(len(self._trainable))]
            innermost._filter_empty_gradients(gradients, self._trainable)
        has_decay = innermost.weight_decay is not None
        decays = tuple(has_decay and innermost._use_weight_decay(v) for v in self._trainable)
        key = unused, decays, share is not None
        pieces = self._pieces.get(key)
        if pieces is None:
            while len(self._pieces) >= _REMEMBERED:
                self._pieces.pop(next(iter(self._pieces)))
            pieces = self._pieces[key] = self._cut(unused, decays, share is not None)
        stand_in = self._stand_in(pieces, share)
        if not reduced:
            vars(stand_in)["_backend_increment_gradient_accumulators"] = lambda gradients, accumulated: None
        if len(self._regions) == 1 and not unused and _is_bare(stand_in):
            # The core of `apply`. Its surrounding calls took as long as the update of a small network.
            stand_in._backend_update_step(pieces.gradients, pieces.used, stand_in.learning_rate)
            stand_in._iterations.tensor.add_(1)
        else:
            stand_in.apply(pieces.gradients, pieces.used)
        for region in self._regions:
            if region.gaps.numel():  # 0 / 0 is not zero
                for tensor in (region.variables, *region.kinds):
                    tensor.index_fill_(0, region.gaps, 0)

    def rehearse(self) -> None:
        """Update copies of one element per dtype, to raise any error of the settings before a real update."""
        rehearsal = copy.copy(self)
        rehearsal._regions = [region.first() for region in self._regions]
        rehearsal._scalars = [FlatVariable(scalar.value.detach().clone()) for scalar in self._scalars]
        rehearsal._pieces = {}
        with torch.no_grad():
            rehearsal.apply(frozenset())

    def _stand_in(self, pieces: _Pieces, share: WorkStealing | None) -> Any:
        """An optimizer with the user's settings whose variables are the pieces."""
        inner = None
        for owner in reversed(chain(self._optimizer)):
            stand_in = object.__new__(type(owner))
            own = vars(stand_in)
            own.update(vars(owner))
            own["_trainable_variables"] = pieces.variables
            own["_trainable_variables_indices"] = pieces.indices
            own["_exclude_from_weight_decay_cache"] = pieces.decays
            for slot, flat in zip(self._slots.kinds, pieces.kinds, strict=True):
                if slot.owner is owner:
                    own[slot.attribute] = flat
            for slot, scalar in zip(self._slots.scalars, self._scalars, strict=True):
                if slot.owner is owner and own[slot.attribute] is slot.variables[0]:
                    own[slot.attribute] = scalar
            if inner is not None:
                own["inner_optimizer"] = inner
            elif len(self._regions) == 1:
                # With several dtypes Keras computes all of them with the scalars of the first dtype, so they need one
                # common call.
                own["_backend_update_step"] = _piece_by_piece(stand_in, share)
                own["_apply_weight_decay"] = lambda variables: None  # `_piece_by_piece` does it
            inner = stand_in
        return inner

    def _cut(self, unused: frozenset[int], decays: Sequence[bool], shared: bool) -> _Pieces:
        """Split the buffers into pieces of adjacent variables that are treated alike; if `shared`, a few per core."""
        pieces = _Pieces([], [[] for _ in self._slots.kinds], {}, {}, [], [])
        for region in sorted(self._regions, key=lambda region: _first_used(region, unused)):
            length = region.variables.numel()
            # On a GPU one large kernel is faster.
            size = PIECE if region.variables.device.type == "cpu" else length
            if shared:
                size = min(size, max(SMALLEST_PIECE, -(-length // (SHARED_PIECES * CORES))))
            alike = [(i in unused, decays[i]) for i in region.members]
            spans = zip(region.starts, [*region.starts[1:], length], alike, strict=True)
            for (is_unused, decay), group in groupby(spans, key=lambda span: span[2]):
                neighbours = list(group)
                begin, end = neighbours[0][0], neighbours[-1][1]
                for start in range(begin, end, size):
                    part = slice(start, min(start + size, end))
                    variable = FlatVariable(region.variables[part])
                    pieces.indices[id(variable)] = len(pieces.variables)
                    pieces.decays[id(variable)] = decay
                    pieces.variables.append(variable)
                    for kind, tensor in zip(pieces.kinds, region.kinds, strict=True):
                        kind.append(FlatVariable(tensor[part]))
                    if not is_unused:
                        pieces.used.append(variable)
                        pieces.gradients.append(region.gradients[part])
        return pieces


def _is_bare(optimizer: Any) -> bool:
    """Whether Keras's `apply` only decays the weights, runs the update step and counts."""
    around = (
        *(optimizer.gradient_accumulation_steps, optimizer.use_ema, optimizer.loss_scale_factor),
        *(optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm),
    )
    return not hasattr(optimizer, "inner_optimizer") and not any(around)


def _piece_by_piece(
    optimizer: Any, share: WorkStealing | None
) -> Callable[[Sequence[torch.Tensor], Sequence[Any], Any], None]:
    """An update step that decays and updates one piece after the other, so that a piece stays in the caches."""
    kind = type(optimizer)

    def step(gradients: Sequence[torch.Tensor], variables: Sequence[Any], learning_rate: Any) -> None:
        fused = fused_step(optimizer, variables[0].tensor, learning_rate)
        # Nadam's product of momentums changes with each call, but should change once per step.
        product = getattr(optimizer, "_u_product", None)
        before = None if product is None else product.value.clone()

        @torch.no_grad()
        def update(gradient: torch.Tensor, variable: Any) -> None:
            if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
                kind._apply_weight_decay(optimizer, [variable])
            if product is not None:
                product.assign(before)
            if fused is not None:
                fused(gradient, variable)
            else:
                kind._backend_update_step(optimizer, [gradient], [variable], learning_rate)

        parts = [partial(update, *one) for one in zip(gradients, variables, strict=True)]
        if share is not None and product is None:
            share(parts)
        else:
            for part in parts:
                part()

    return step


def _first_used(region: _Region, unused: frozenset[int]) -> int:
    """The number of the first variable that has a gradient."""
    return min((i for i in region.members if i not in unused), default=len(unused) + region.members[-1])


def _regions(slots: Slots, memory: Memory) -> list[_Region]:
    """The flat buffers by dtype, in the order in which dtypes first appear."""
    gradients = _tensors(memory.gradients)
    variables = _tensors(memory.variables)[: len(gradients)]
    by_slot = _tensors(memory.slots)
    kinds = [by_slot[i * len(gradients) : (i + 1) * len(gradients)] for i in range(len(slots.kinds))]
    regions = []
    for dtype, buffer in memory.gradients.buffers.items():
        numbers = [i for i, g in enumerate(gradients) if dtype_name(g) == dtype and g.numel()]
        if not numbers:
            continue
        flat = as_tensor(buffer, dtype)
        starts = _starts(flat, [gradients[i] for i in numbers])
        parts = []
        for memory_of_part, views in ((memory.variables, variables), *((memory.slots, views) for views in kinds)):
            whole = as_tensor(memory_of_part.buffers[dtype], dtype)
            found = _starts(whole, [views[i] for i in numbers])
            if [start - found[0] for start in found] != [start - starts[0] for start in starts]:
                raise RuntimeError("Variables, gradients and slots are laid out differently. This is a bug in fastdp.")
            parts.append(whole[found[0] : found[0] + flat.numel()])
        ends = [start + gradients[i].numel() for start, i in zip(starts, numbers, strict=True)]
        gaps = [g for end, start in zip(ends, [*starts[1:], flat.numel()], strict=True) for g in range(end, start)]
        index = torch.tensor(gaps, dtype=torch.int64, device=flat.device)
        regions.append(_Region(parts[0], flat, parts[1:], numbers, starts, index))
    return regions


def _starts(flat: torch.Tensor, views: Sequence[torch.Tensor]) -> list[int]:
    """The offsets of views in their flat buffer, in elements."""
    return [(view.data_ptr() - flat.data_ptr()) // flat.itemsize for view in views]


def _tensors(flat: FlatBuffers) -> list[torch.Tensor]:
    return [as_tensor(view, spec.dtype) for view, spec in zip(flat.views, flat.specs, strict=True)]
