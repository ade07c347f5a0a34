"""What a training step gives besides outputs: gradients, loss terms and side effects, summed over replicas.

The side effects of a forward pass are one thing, and listed here alone. On a replica they are `SideEffects`: values of
assigned variables (counters, metrics of layers, states of seed generators) and moments of BatchNormalization.
`SideEffects.summed` writes them as numbers to be added up over the replicas, with a `Summed` that says which they are,
and `Summed.apply` gives variables their values for the global batch. `add_loss()` terms are numbers of the loss: they
stand before them (`Notes.terms`). Whoever asks whether a forward pass has left anything behind asks the `Summed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import keras
import numpy as np
import torch

from fastdp.errors import NotCapturable
from fastdp.program.keras.batch import OutputStructure
from fastdp.program.keras.batch_norm import moved_statistics, statistics
from fastdp.program.keras.plain_outputs import check_same
from fastdp.program.keras.replica import ReplicaContext
from fastdp.program.keras.rows.effects import Effect, UndecidedError, values_agree
from fastdp.program.keras.rows.probe import Effects
from fastdp.program.keras.variables import Mapping, ReplicaScope
from fastdp.tensors.moments import Moments, combine
from fastdp.tensors.sums import move, movement

_EXTREMES = {Effect.LARGEST: torch.amax, Effect.SMALLEST: torch.amin}


@dataclass(slots=True)
class SideEffects:
    """What a forward pass did on one replica, beside its outputs and losses.

    Args:
        assigned: the variables that it assigned, by their number in the program, and their values.
        moments: in the order of the calls, BatchNormalization layers and the moments of their inputs.
        by_loss: ids of variables that the loss of the merged outputs has assigned, on the first replica alone.
    """

    assigned: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    moments: list[tuple[keras.layers.BatchNormalization, Moments]] = field(default_factory=list)
    by_loss: frozenset[int] = frozenset()

    @classmethod
    def of(cls, scope: ReplicaScope, mapping: Mapping, run: ReplicaContext) -> SideEffects:
        """Those of the forward pass that has run within `scope`, over the variables of `mapping`."""
        # A layer whose statistics follow a rule of its own assigns them as any layer assigns a variable.
        moments = [(layer, found) for layer, found in run.moments if statistics(layer)]
        return cls(scope.assigned(mapping), moments, run.by_loss)

    def tensors(self) -> list[torch.Tensor]:
        """All values, in the order that `EffectsForm.filled` takes them in."""
        values = [value for _, value in self.assigned]
        return [*values, *(t for _, found in self.moments for t in (found.mean, found.variance))]

    def form(self) -> EffectsForm:
        """The same without values: of a step that is captured."""
        return EffectsForm([i for i, _ in self.assigned], [(layer, found.count) for layer, found in self.moments])

    def summed(self, before: Mapping, share: float, effects: Effects) -> tuple[list[np.ndarray], Summed]:
        """As float64 numbers of which the sum over replicas counts, and what they stand for.

        Args:
            before: the variables and their values before the forward pass.
            share: the replica's part of the rows of the global batch.
            effects: how variables depend on the rows.
        """
        notes = Summed(normalized=[layer for layer, _ in self.moments])
        by_moments = {id(v) for layer in notes.normalized for v in statistics(layer)}
        sums = []
        for i, value in self.assigned:
            variable, old = before[i]
            if id(variable) in by_moments:
                continue
            if id(variable) in self.by_loss:
                notes.kept.append((i, Effect.FIRST, value.detach()))
                continue
            effect = effects.of_variable(i, variable)
            if effect in (Effect.MEAN, Effect.SUM):
                notes.assigned.append(i)
                sums.append(movement(value, old, 1.0 if effect is Effect.SUM else share))
            elif effect is not Effect.UNDECIDED or not torch.equal(value, old):
                notes.kept.append((i, effect, value.detach()))
        return [*sums, *(moments.sums() for _, moments in self.moments)], notes


@dataclass(slots=True)
class EffectsForm:
    """Side effects without their values: numbers of variables, and layers with the counts of their moments."""

    assigned: list[int] = field(default_factory=list)
    moments: list[tuple[Any, float]] = field(default_factory=list)

    def filled(self, values: Iterator[torch.Tensor], seeds: Sequence[tuple[int, torch.Tensor]] = ()) -> SideEffects:
        """With these values, and the states of the seed generators that were moved outside."""
        return SideEffects(
            [*seeds, *((i, next(values)) for i in self.assigned)],
            [(layer, Moments(next(values), next(values), count)) for layer, count in self.moments],
        )


@dataclass(slots=True)
class Summed:
    """The side effects of a step on all replicas; true where there are any.

    The numbers hold, per entry of `assigned`, by how much each element of the variable moves, then per entry of
    `normalized` its moments. `kept` are assigned values, by number, that are no sums: the same on all replicas, or
    extremes over them.
    """

    assigned: list[int] = field(default_factory=list)
    kept: list[tuple[int, Effect, torch.Tensor]] = field(default_factory=list)
    normalized: list[keras.layers.BatchNormalization] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.assigned or self.kept or self.normalized)

    @staticmethod
    def apply(
        every: Sequence[Summed],
        variables: Sequence[torch.Tensor],
        sums: np.ndarray,
        number_of: dict[int, int],
        effects: Effects,
    ) -> None:
        """Give variables their values for the global batch, in place.

        Args:
            every: of all replicas.
            variables: a replica's, by number.
            sums: the numbers, added up over the replicas.
            number_of: of a Keras variable, by its id.
            effects: how variables depend on the rows.

        Raises:
            UndecidedError: a variable moved otherwise than in the trial. Nothing has been assigned.
        """
        first = every[0]
        for i, value in _kept_of_all(every, effects):
            variables[i].copy_(value)
        at = 0
        for i in first.assigned:
            length = variables[i].numel()
            move(variables[i], sums[at : at + length])
            at += length
        for layer in first.normalized:
            targets = [variables[number_of[id(v)]] for v in statistics(layer)]
            length = 1 + 2 * targets[0].numel()
            mean, variance = combine(sums[at : at + length])
            for tensor, new in zip(targets, moved_statistics(layer, targets, mean, variance), strict=True):
                tensor.copy_(new)
            at += length


def _kept_of_all(every: Sequence[Summed], effects: Effects) -> list[tuple[int, torch.Tensor]]:
    """Values that are the same on all replicas, and extremes."""
    if len(every) == 1:
        return [(i, value) for i, _, value in every[0].kept]
    found = [(i, value) for i, effect, value in every[0].kept if effect is Effect.FIRST]
    by_all = [[entry for entry in one.kept if entry[1] is not Effect.FIRST] for one in every]
    if len({tuple(i for i, _, _ in kept) for kept in by_all}) > 1:
        raise _moved_otherwise(effects, min(i for kept in by_all for i, _, _ in kept))
    for place, (i, effect, value) in enumerate(by_all[0]):
        if effects.is_seed(i):
            found.append((i, value))
            continue
        values = [value, *(kept[place][2].to(value.device) for kept in by_all[1:])]
        if effect in _EXTREMES:
            found.append((i, _EXTREMES[effect](torch.stack(values), 0)))
            continue
        are_same = all(torch.equal(value, other) or values_agree(other, value) for other in values[1:])
        if not are_same or (effect is Effect.UNDECIDED and not effects.asked_of_every_row):
            raise _moved_otherwise(effects, i)
        found.append((i, value))
    return found


def _moved_otherwise(effects: Effects, i: int) -> UndecidedError:
    """A variable has moved in another way than the trial has shown."""
    return UndecidedError(
        f"The variable {effects.path(i)} is assigned in the forward pass, and depends on the rows in another way than "
        "on the rows that fastdp has tried. Let its layer compute it from a mean or a sum over rows, pass "
        'rows="replica" to fastdp.wrap to let the devices\' values be averaged, or use gpus=[0].'
    )


@dataclass(slots=True)
class Notes:
    """What a step's sums mean, beside its outputs' structure.

    `sums` holds: the loss; the loss terms (`terms` of them); then the numbers of `effects`. The last `added` of the
    terms are those of `add_loss`.
    """

    structure: OutputStructure | None = None
    terms: int = 0
    effects: Summed = field(default_factory=Summed)
    unused: frozenset[int] = frozenset()
    added: int = 0

    @staticmethod
    def agree(every: Sequence[Notes]) -> None:
        """Before an update: what no sum puts together is the same on all replicas.

        Raises:
            NotByRowsError: outputs that are no tensors differ.
        """
        structures = [notes.structure for notes in every if notes.structure is not None]
        if any(structure.plain for structure in structures):
            check_same([structure.plain for structure in structures], structures[0].nest)


@dataclass(slots=True)
class StepSums:
    """What the pure part of a step gives: gradients of the trainable variables (None where there is none), the
    loss and its terms, outputs and masks, and what the forward pass did beside them. The last `added` of the terms are
    those of `add_loss`."""

    gradients: Sequence[torch.Tensor | None]
    terms: list[torch.Tensor]
    outputs: list[torch.Tensor]
    structure: OutputStructure | None
    effects: SideEffects
    added: int = 0

    def flatten(self) -> tuple[list[torch.Tensor], StepSumsForm]:
        """The tensors beside the gradients, in the order that `StepSumsForm.filled` takes them in, and the rest.

        Raises:
            NotCapturable: outputs that are no tensors.
        """
        if self.structure is not None and any(value is not None for _, value in self.structure.plain):
            raise NotCapturable("outputs that are no tensors, which may be others in each call")
        counts = len(self.terms), len(self.outputs)
        form = StepSumsForm(*counts, self.structure, self.effects.form(), self.added)
        return [*self.terms, *self.outputs, *self.effects.tensors()], form


@dataclass(slots=True)
class StepSumsForm:
    """What a step gives, without its tensors: of a step that is captured."""

    terms: int
    outputs: int
    structure: OutputStructure | None
    effects: EffectsForm
    added: int

    def filled(
        self,
        gradients: Sequence[torch.Tensor | None],
        values: Iterator[torch.Tensor],
        moved: Sequence[tuple[int, torch.Tensor]],
    ) -> StepSums:
        """With these gradients and values, and the states of the seed generators that were moved outside."""
        terms = list(islice(values, self.terms))
        outputs = list(islice(values, self.outputs))
        return StepSums(gradients, terms, outputs, self.structure, self.effects.filled(values, moved), self.added)
