"""The outcome of a torch module's step, and its form without tensors, for captured steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from fastdp.capture.pure_step import Moved
from fastdp.program.torch.losses import Reported
from fastdp.program.torch.nest import Nest
from fastdp.tensors.row_effects import Layout


@dataclass(frozen=True, slots=True)
class OutcomeForm:
    """The form of an outcome.

    Attributes:
        loss_dtype: the dtype of the loss.
        moved: the numbers of the buffers whose movements follow the loss in `sums`.
        normalized: one entry per call of batch normalization, whose moments follow: the numbers of the running mean and
            variance, and the momentum.
        constant: the numbers of the buffers that have a value of their own.
        unjudged: the names of those among `constant` that no trial has seen change.
        reported: the nest of the other numbers that the loss function returns; None if there are none.
        weight: the replica's weight of its part of these numbers.
        outputs: the nest of the module's outputs, if they are wanted, and how each tensor depends on the rows.
    """

    loss_dtype: torch.dtype
    moved: tuple[int, ...] = ()
    normalized: tuple[tuple[int, int, float], ...] = ()
    constant: tuple[int, ...] = ()
    unjudged: dict[int, str] = field(default_factory=dict)
    reported: Reported | None = None
    weight: float = 1.0
    outputs: tuple[Nest, list[Layout]] | None = None

    def filled(
        self, gradients: Sequence[torch.Tensor | None], values: Iterator[torch.Tensor], moved: Moved
    ) -> TorchOutcome:
        """As `fastdp.capture.pure_step.OutcomeForm.filled`."""
        sums = next(values)
        constants = list(islice(values, len(self.constant)))
        reported = self.reported and self.reported.filled(values)
        return TorchOutcome(gradients, sums, constants, reported, list(values), self)


@dataclass(slots=True)
class TorchOutcome:
    """The result of the pure part of a step.

    Attributes:
        gradients: of the trained parameters; None for those without one.
        sums: a float64 vector: the replica's contribution to the loss, then the numbers that `form` describes.
        constants: the values of the buffers in `form.constant`.
        reported: the other numbers that the loss function returns.
        outputs: the tensors of the module's outputs.
    """

    gradients: Sequence[torch.Tensor | None]
    sums: torch.Tensor
    constants: list[torch.Tensor]
    reported: Reported | None
    outputs: list[torch.Tensor]
    form: OutcomeForm
