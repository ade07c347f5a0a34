"""What the pure part of a step gives, and what the sums of a step mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import torch

from fastdp.program.keras_batch import OutputStructure
from fastdp.program.keras_effects import Effect
from fastdp.program.keras_moments import Moments


@dataclass(slots=True)
class Notes:
    """What a step's sums mean, beside its outputs' structure.

    `sums` holds: the loss; the loss terms; then per entry of `assigned` its elements; then per entry of
    `normalized` its moments. `kept` are assigned values, by number, that are no sums: the same on all replicas, or
    extremes.
    """

    structure: OutputStructure | None = None
    terms: int = 0
    assigned: list[tuple[int, Effect]] = field(default_factory=list)
    kept: list[tuple[int, Effect, torch.Tensor]] = field(default_factory=list)
    normalized: list[keras.layers.BatchNormalization] = field(default_factory=list)
    unused: frozenset[int] = frozenset()


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
