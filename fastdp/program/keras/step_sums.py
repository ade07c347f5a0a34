"""What a training step gives besides outputs: gradients, loss terms and side effects, summed over replicas.

Only this module knows the side effects of a forward pass. On a replica they are `SideEffects`: values of assigned
variables (counters, metrics of layers, states of seed generators) and moments of BatchNormalization.
`SideEffects.summed` writes them as numbers to be summed over the replicas, with a `Summed` that describes them.
`Summed.apply` gives variables their values for the global batch. `add_loss()` terms belong to the loss and precede
these numbers (`Notes.terms`). The truth value of a `Summed` says whether a forward pass had any side effects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.base import Result
from fastdp.program.keras.batch import OutputStructure
from fastdp.program.keras.batch_norm import moved_statistics, statistics
from fastdp.program.keras.plain_outputs import check_same
from fastdp.program.keras.replica import ReplicaContext
from fastdp.program.keras.rows.probe import Effects
from fastdp.program.keras.variables import Mapping, ReplicaScope
from fastdp.tensors.arrays import output_array
from fastdp.tensors.moments import Moments, combine
from fastdp.tensors.row_effects import Effect, UndecidedError, values_agree
from fastdp.tensors.sums import move, movement

_EXTREMES = {Effect.LARGEST: torch.amax, Effect.SMALLEST: torch.amin}


@dataclass(slots=True)
class SideEffects:
    """What a forward pass did on one replica, besides its outputs and losses.

    Args:
        assigned: the numbers (in the program) and new values of the variables that it assigned.
        moments: BatchNormalization layers and the moments of their inputs, in the order of the calls.
        by_loss: ids of variables that the loss of the merged outputs assigned, on the first replica only.
        foreign: variables that replicas do not hold, and the values that they were assigned for all rows.
    """

    assigned: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    moments: list[tuple[keras.layers.BatchNormalization, Moments]] = field(default_factory=list)
    by_loss: frozenset[int] = frozenset()
    foreign: Mapping = field(default_factory=list)

    @classmethod
    def of(cls, scope: ReplicaScope, mapping: Mapping, run: ReplicaContext) -> SideEffects:
        """The side effects of the forward pass that ran within `scope`, over the variables of `mapping`."""
        # A layer with its own rule for statistics assigns them like any other variable: its moments are skipped.
        moments = [(layer, found) for layer, found in run.moments if statistics(layer)]
        foreign = scope.assigned_foreign(run.by_loss, alone=run.context.size == 1) if scope.foreign else []
        if foreign:
            run.not_captured("an assignment to a variable that belongs to no layer of the model")
        return cls(scope.assigned(mapping), moments, run.by_loss, foreign)

    def tensors(self) -> list[torch.Tensor]:
        """All values, in the order that `EffectsForm.filled` expects."""
        values = [value for _, value in self.assigned]
        return [*values, *(t for _, found in self.moments for t in (found.mean, found.variance))]

    def form(self) -> EffectsForm:
        """The form of these side effects without values, for captured steps."""
        return EffectsForm([i for i, _ in self.assigned], [(layer, found.count) for layer, found in self.moments])

    def summed(self, before: Mapping, share: float, effects: Effects) -> tuple[list[np.ndarray], Summed]:
        """The side effects as float64 numbers to be summed over replicas, and their description.

        Args:
            before: the variables and their values before the forward pass.
            share: the replica's share of the rows of the global batch.
            effects: how variables depend on the rows.
        """
        notes = Summed(normalized=[layer for layer, _ in self.moments], share=share, foreign=self.foreign)
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
        """Side effects with these values, and with the seed states that draws outside of the graph have advanced."""
        return SideEffects(
            [*seeds, *((i, next(values)) for i in self.assigned)],
            [(layer, Moments(next(values), next(values), count)) for layer, count in self.moments],
        )


@dataclass(slots=True)
class Summed:
    """Describes the side effects of a step; true if there are any.

    The numbers hold, for each entry of `assigned`, by how much each element of the variable moves; then, for each entry
    of `normalized`, its moments. `kept` are assigned values, with the variable's number, that are not sums: the same on
    all replicas, or extremes over them. `share` is the replica's part of the rows. `foreign` are values for variables
    that no replica holds.
    """

    assigned: list[int] = field(default_factory=list)
    kept: list[tuple[int, Effect, torch.Tensor]] = field(default_factory=list)
    normalized: list[keras.layers.BatchNormalization] = field(default_factory=list)
    share: float = 1.0
    foreign: Mapping = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.assigned or self.kept or self.normalized or self.foreign)

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
            every: the descriptions of all replicas.
            variables: a replica's variables, by number.
            sums: the numbers, summed over the replicas.
            number_of: maps the id of a Keras variable to its number.
            effects: how variables depend on the rows.

        Raises:
            UndecidedError: a variable moved differently than in the trial. Nothing has been assigned.
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
    """The values to assign: those that are the same on all replicas, and extremes over them."""
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
        are_equal = all(torch.equal(value, other) for other in values[1:])
        are_same = are_equal or all(values_agree(other, value) for other in values[1:])
        if not are_same or (effect is Effect.UNDECIDED and not effects.asked_of_every_row):
            raise _moved_otherwise(effects, i)
        found.append((i, value if are_equal else _mean(values, [one.share for one in every])))
    return found


def _mean(values: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The mean of nearly equal values, by the replicas' shares of the rows. Whole numbers that agree are equal."""
    weighted = [value.double() * share for value, share in zip(values, shares, strict=True)]
    return torch.stack(weighted).sum(0).to(values[0].dtype)


def _moved_otherwise(effects: Effects, i: int) -> UndecidedError:
    """The error for a variable that moved differently than in the trial."""
    return UndecidedError(
        f"The variable {effects.path(i)} is assigned in the forward pass, and depends on these rows in another way "
        "than on the rows that fastdp tried. Let its layer compute it from a mean or a sum over rows, pass "
        'rows="replica" to fastdp.wrap to average the devices\' values, or use gpus=[0].'
    )


@dataclass(slots=True)
class Notes:
    """The layout of a step's sums, and the structure of its outputs.

    `sums` holds the loss, then `terms` loss terms, then the numbers of `effects`. The last `added` terms are those of
    `add_loss`. `unused` are the positions of the trainable variables without a gradient. `branches` as in `StepSums`.
    """

    structure: OutputStructure | None = None
    terms: int = 0
    effects: Summed = field(default_factory=Summed)
    unused: frozenset[int] = frozenset()
    added: int = 0
    branches: tuple[bool, ...] = ()

    @staticmethod
    def agree(every: Sequence[Notes]) -> None:
        """Check before an update that outputs which cannot be merged are the same on all replicas.

        Raises:
            NotByRowsError: outputs that are not tensors differ.
            UndecidedError: the code of the forward pass has gone different ways.
        """
        if len({notes.branches for notes in every}) > 1:
            raise UndecidedError(
                "The code of the forward pass asks a tensor (`if ops.max(x) > ...`), and has gone different ways on "
                "the devices, each by its own rows. One device asks once, of all rows. Use ops.where for each row, or "
                "gpus=[0]."
            )
        structures = [notes.structure for notes in every if notes.structure is not None]
        if any(structure.plain for structure in structures):
            check_same([structure.plain for structure in structures], structures[0].nest)


@dataclass(slots=True)
class StepSums:
    """The result of the pure part of a step: gradients of the trainable variables (None for a variable without one),
    the loss and its terms, outputs and masks, and side effects. The last `added` terms are those of `add_loss`.
    `branches` are the answers of tensors that the code of the forward pass has asked."""

    gradients: Sequence[torch.Tensor | None]
    terms: list[torch.Tensor]
    outputs: list[torch.Tensor]
    structure: OutputStructure | None
    effects: SideEffects
    added: int = 0
    branches: tuple[bool, ...] = ()

    def result(self, mapping: Mapping, context: Context, notes: Notes, effects: Effects) -> Result:
        """The replica's result: outputs as arrays, and numbers that sum up terms and side effects.

        Args:
            mapping: the variables with their tensors, as before the pass.
            notes: of the step; they get the description of the side effects.
            effects: how variables depend on the rows.
        """
        result = self.summed(mapping, context, notes, effects)
        result.outputs = self.arrays(context)
        return result

    def summed(self, mapping: Mapping, context: Context, notes: Notes, effects: Effects) -> Result:
        """As `result`, without the outputs. Waits for the values."""
        terms = np.array([float(term) for term in self.terms])
        sums, notes.effects = self.effects.summed(mapping, context.rows.share, effects)
        return Result([], np.concatenate([terms, *sums]), notes)

    def arrays(self, context: Context) -> list[np.ndarray]:
        """The outputs as arrays on the replica's device."""
        return [output_array(tensor, context.device) for tensor in self.outputs]

    def flatten(self) -> tuple[list[torch.Tensor], StepSumsForm]:
        """The tensors except the gradients, in the order that `StepSumsForm.filled` expects, and the form.

        Raises:
            NotCapturable: there are outputs that are not tensors.
        """
        if self.structure is not None and any(value is not None for _, value in self.structure.plain):
            raise NotCapturable("outputs that are not tensors and may differ from call to call")
        counts = len(self.terms), len(self.outputs)
        form = StepSumsForm(*counts, self.structure, self.effects.form(), self.added)
        return [*self.terms, *self.outputs, *self.effects.tensors()], form


@dataclass(slots=True)
class StepSumsForm:
    """The form of a step's result without its tensors, for captured steps."""

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
        """Step sums with these tensors, and with the seed states that draws outside of the graph have advanced."""
        terms = list(islice(values, self.terms))
        outputs = list(islice(values, self.outputs))
        return StepSums(gradients, terms, outputs, self.structure, self.effects.filled(values, moved), self.added)
