"""Applies a Keras optimizer to flat buffers: one update instead of one per variable.

Keras still does the math. A *stand-in* for the user's optimizer, of the same class and with the same settings, gets
variables that are pieces of the flat buffers. Keras applies everything around an update (loss scaling, clipping,
gradient accumulation, weight averages) to the pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import torch
from keras.src.optimizers.base_optimizer import global_norm

from fastdp.buffers import Memory
from fastdp.program.keras.optimizer.direct import DirectUpdate, direct_update, is_bare, is_plain
from fastdp.program.keras.optimizer.fused import fused_step
from fastdp.program.keras.optimizer.regions import Region, regions_of
from fastdp.program.keras.optimizer.sharded import SlotParts
from fastdp.program.keras.optimizer.slots import Slots, chain, needs_whole
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.tensors.arrays import dtype_name, tensors_of

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
class _Pieces:
    """The flat buffers split into pieces whose variables are treated alike.

    `whole` are the gradients of all variables, where `gradients` are those of this replica's part. `direct` updates
    the pieces without Keras, where it may.
    """

    variables: list[FlatVariable]
    kinds: list[list[FlatVariable]]
    indices: dict[int, int]
    decays: dict[int, bool]
    used: list[FlatVariable]
    gradients: list[torch.Tensor]
    whole: list[torch.Tensor]
    direct: DirectUpdate | None = None


class FlatUpdate:
    """The update of one replica.

    Args:
        optimizer: the user's built optimizer. Each update reads its settings; its own variables stay unchanged.
        slots: its slots, laid out for flat buffers.
        trainable: the variables to train, the first ones in `memory.variables`.
        memory: the replica's buffers, written in place.
        parts: the slots, if each replica updates its part of the variables; None if this one updates all of them.
        rank: the replica's.
    """

    def __init__(
        self,
        optimizer: Any,
        slots: Slots,
        trainable: Sequence[keras.Variable],
        memory: Memory,
        parts: SlotParts | None = None,
        rank: int = 0,
    ) -> None:
        self._optimizer = optimizer
        self._slots = slots
        self._trainable = list(trainable)
        self._whole = regions_of(memory, len(slots.kinds) if parts is None else 0)
        self._regions = {dtype: [region] for dtype, region in self._whole.items()}
        self._scratch: dict[str, Region] = {}
        if parts is not None:
            self._regions = _own_regions(self._whole, parts, rank, len(slots.kinds))
            for dtype, whole in self._whole.items():
                tensors = [parts.tensor(rank, kind, dtype) for kind in range(len(slots.kinds))]
                self._scratch[dtype] = whole.part(0, 1, tensors).scratch()
        self._parts = parts
        order = slots.order if parts is None else [v for slot in slots.scalars for v in slot.variables]
        at = {id(v): view for v, view in zip(order, tensors_of(memory.slots), strict=True)}
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
        if pieces.direct is not None and share is None and is_plain(self._optimizer) and self._has_scalars():
            if not pieces.direct(self._optimizer):
                self._clear_gaps()
            return
        stand_in = self._stand_in(pieces, share)
        if not reduced:
            vars(stand_in)["_backend_increment_gradient_accumulators"] = lambda gradients, accumulated: None
        if len(self._whole) == 1 and not unused and is_bare(stand_in):
            # The core of `apply`. Its surrounding calls took as long as the update of a small network.
            stand_in._backend_update_step(pieces.gradients, pieces.used, stand_in.learning_rate)
            stand_in._iterations.tensor.add_(1)
        else:
            stand_in.apply(pieces.gradients, pieces.used)
        self._clear_gaps()

    def _has_scalars(self) -> bool:
        """Whether the optimizer still has the counter and the learning rate that lie in this memory."""
        return all(getattr(slot.owner, slot.attribute) is slot.variables[0] for slot in self._slots.scalars)

    def _clear_gaps(self) -> None:
        """Make the gaps between variables zero again."""
        for region in [region for of_dtype in self._regions.values() for region in of_dtype]:
            if region.gaps.numel():  # 0 / 0 is not zero
                for tensor in (region.variables, *region.kinds):
                    tensor.index_fill_(0, region.gaps, 0)

    def fold(self, attribute: str, scale: float | None) -> None:
        """Add reduced gradients to the slots of one kind, which accumulate them."""
        kind = next(at for at, slot in enumerate(self._slots.kinds) if slot.attribute == attribute)
        for region in [region for of_dtype in self._regions.values() for region in of_dtype]:
            region.kinds[kind].add_(region.gradients if scale is None else region.gradients / scale)

    def rehearse(self) -> None:
        """Update copies of one element per dtype, to raise any error of the settings before a real update."""
        rehearsal = copy.copy(self)
        rehearsal._regions = {dtype: [region.first() for region in regions] for dtype, regions in self._regions.items()}
        rehearsal._scalars = [FlatVariable(scalar.value.detach().clone()) for scalar in self._scalars]
        rehearsal._pieces = {}
        with torch.no_grad():
            rehearsal.apply(frozenset())
            (pieces,) = rehearsal._pieces.values()
            if pieces.direct is not None:  # several threads share the other way of the same update
                pieces.direct = None
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
            elif len(self._whole) == 1:
                # With several dtypes Keras computes all of them with the scalars of the first dtype, so they need one
                # common call.
                own["_backend_update_step"] = _piece_by_piece(stand_in, share)
                own["_apply_weight_decay"] = lambda variables: None  # `_piece_by_piece` does it
            inner = stand_in
        if self._parts is not None and needs_whole(self._optimizer):
            _judge_by_whole(inner, pieces.whole)
        return inner

    def _movers(self, dtype: str, unused: frozenset[int]) -> list[Region]:
        """An element of its own, for a replica whose part has no gradient, or not those of each dtype: so the scalars
        move on every replica alike, by the first dtype's numbers."""
        if not self._scratch:
            return []
        mine = [i for regions in self._regions.values() for region in regions for i in region.members]
        needed = len(self._whole) > 1 or all(i in unused for i in mine)
        return [self._scratch[dtype]] if needed else []

    def _cut(self, unused: frozenset[int], decays: Sequence[bool], shared: bool) -> _Pieces:
        """Split the buffers into pieces of adjacent variables that are treated alike; if `shared`, a few per core."""
        pieces = _Pieces([], [[] for _ in self._slots.kinds], {}, {}, [], [], [])
        dtypes = sorted(self._whole, key=lambda dtype: _first_used(self._whole[dtype], unused))
        for dtype in dtypes:
            for region in [*self._movers(dtype, unused), *self._regions[dtype]]:
                for part, is_unused, decay in region.spans(unused, decays, CORES if shared else None):
                    variable = FlatVariable(region.variables[part])
                    pieces.indices[id(variable)] = len(pieces.variables)
                    pieces.decays[id(variable)] = decay
                    pieces.variables.append(variable)
                    for kind, tensor in zip(pieces.kinds, region.kinds, strict=True):
                        kind.append(FlatVariable(tensor[part]))
                    if not is_unused:
                        pieces.used.append(variable)
                        pieces.gradients.append(region.gradients[part])
        if self._parts is not None:
            cores = CORES if CORES > 1 and self._whole[dtypes[0]].variables.device.type == "cpu" else None
            for dtype in dtypes:  # as one device would cut them
                whole = self._whole[dtype]
                spans = whole.spans(unused, decays, cores)
                pieces.whole += [whole.gradients[part] for part, is_unused, _ in spans if not is_unused]
        if len(self._whole) == 1 and self._parts is None and not unused:
            kinds = {slot.attribute: kind for slot, kind in zip(self._slots.kinds, pieces.kinds, strict=True)}
            pieces.direct = direct_update(
                self._optimizer,
                [variable.tensor for variable in pieces.used],
                pieces.gradients,
                {name: [one.tensor for one in kind] for name, kind in kinds.items()},
                {slot.attribute: one.tensor for slot, one in zip(self._slots.scalars, self._scalars, strict=True)},
            )
        return pieces


def _own_regions(whole: Mapping[str, Region], parts: SlotParts, rank: int, kinds: int) -> dict[str, list[Region]]:
    """A replica's part of the regions: one for each bucket of gradients."""
    regions: dict[str, list[Region]] = {}
    for dtype, region in whole.items():
        regions[dtype] = []
        for low, high, _, at in (place for place in parts.places[dtype] if place[2] == rank):
            tensors = [parts.tensor(rank, kind, dtype)[at : at + high - low] for kind in range(kinds)]
            regions[dtype].append(region.part(low, high, tensors))
    return regions


def _judge_by_whole(stand_in: Any, whole: Sequence[torch.Tensor]) -> None:
    """Let clipping by the global norm, and the check for infinite numbers, look at the gradient of all variables."""
    owners = chain(stand_in)
    innermost = owners[-1]

    def clipped(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        every = list(whole)
        for owner in owners[:-1]:
            every = [keras.ops.divide(gradient, owner.dynamic_scale) for gradient in every]
        if innermost.loss_scale_factor is not None:
            every = [gradient / innermost.loss_scale_factor for gradient in every]
        norm, most = global_norm(every), innermost.global_clipnorm
        # As `clip_by_global_norm`, whose norm would be that of this part.
        scale = most * keras.ops.minimum(1.0 / norm, 1.0 / most) + (norm - norm)
        return [gradient * scale for gradient in gradients]

    if innermost.global_clipnorm:
        vars(innermost)["_clip_gradients"] = clipped
    for owner in owners[:-1]:
        vars(owner)["check_finite"] = partial(_check_all, owner, whole)


def _check_all(owner: Any, whole: Sequence[torch.Tensor], part: Sequence[torch.Tensor]) -> Any:
    """Keras's check for infinite numbers, of the whole gradient instead of a part of it."""
    return type(owner).check_finite(owner, whole)


def _first_used(region: Region, unused: frozenset[int]) -> int:
    """The number of the first variable that has a gradient."""
    return min((i for i in region.members if i not in unused), default=len(unused) + region.members[-1])


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
