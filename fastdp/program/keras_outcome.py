"""What the pure part of a step gives, and what the sums of a step mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import torch

from fastdp.program.keras_batch import OutputStructure
from fastdp.program.keras_effects import Effect
from fastdp.program.keras_moments import Moments
from fastdp.program.keras_plain import check_same


@dataclass(slots=True)
class Notes:
    """What a step's sums mean, beside its outputs' structure.

    `sums` holds: the loss; the loss terms; then per entry of `assigned` its elements; then per entry of
    `normalized` its moments. `constant` are assigned values that are the same on all replicas.
    """

    structure: OutputStructure | None = None
    terms: int = 0
    assigned: list[tuple[int, Effect]] = field(default_factory=list)
    constant: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    normalized: list[keras.layers.BatchNormalization] = field(default_factory=list)
    unused: frozenset[int] = frozenset()

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
class Outcome:
    """What the pure part of a step gives: gradients of the trainable variables (None where there is none), the
    loss and its terms, outputs and masks, assigned variables by number, moments of batch normalization."""

    gradients: Sequence[torch.Tensor | None]
    terms: list[torch.Tensor]
    outputs: list[torch.Tensor]
    structure: OutputStructure | None
    assigned: list[tuple[int, torch.Tensor]]
    moments: list[tuple[keras.layers.BatchNormalization, Moments]]
