"""The protocol of what captured steps need of a model: a training step as a pure function of tensors.

Each kind of program implements `PureStep`. Tracing, guarding, compiling and recording know nothing else of the model.
Variables are identified by number, in one order for the template and all replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

from fastdp.buffers import FlatBuffers
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.runtime.queue import QueueDevice

Draw = Callable[[], torch.Tensor]
# Variables that the step's draws have advanced (states of generators): their numbers and new values.
Moved = list[tuple[int, torch.Tensor]]


class Draws(Protocol):
    """Makes or replaces the random draws of a captured step. Draws come in the same order in each step."""

    def take(self, draw: Draw) -> torch.Tensor:
        """The outcome of `draw()`, or a replacement."""


class ReplicaTensors(Protocol):
    """The memory of one replica, as tensors at fixed addresses on its device."""

    @property
    def device(self) -> QueueDevice:
        """The device that the replica runs on."""

    @property
    def variables(self) -> Sequence[torch.Tensor]:
        """The replica's variables, by number; none is part of autograd's graph."""

    @property
    def gradients(self) -> Sequence[torch.Tensor]:
        """The memory for the gradients of the trained variables, in their order."""

    @property
    def gradient_buffers(self) -> FlatBuffers:
        """The flat buffers that `gradients` are views of."""


class Outcome(Protocol):
    """The result of one replica's step: gradients, and whatever else the program needs."""

    @property
    def gradients(self) -> Sequence[torch.Tensor | None]:
        """The gradients of the trained variables, in their order; None for a variable that nothing depends on."""


OutcomeT = TypeVar("OutcomeT", bound=Outcome)
OutcomeT_co = TypeVar("OutcomeT_co", bound=Outcome, covariant=True)


class OutcomeForm(Protocol[OutcomeT_co]):
    """An outcome without its tensors."""

    def filled(
        self, gradients: Sequence[torch.Tensor | None], values: Iterator[torch.Tensor], moved: Moved
    ) -> OutcomeT_co:
        """Make an outcome of this form from tensors.

        Args:
            gradients: as `Outcome.gradients`. The device's compute stream may still be computing their values.
            values: in the order of `PureStep.flatten`. Valid until the replica's next step.
            moved: variables that the draws advanced, outside of the graph.
        """


class PureFunction(Protocol):
    """What a model does in a step or a pass, without side effects: what all that is captured has in common.

    All members are called on the host thread between steps. `key`, `rows`, `draw` and `OutcomeForm.filled` are also
    called by the workers of replicas, in each step.
    """

    @property
    def name(self) -> str:
        """The model's name, for messages."""

    @property
    def variables(self) -> list[torch.Tensor]:
        """The template's present variables, by number; none is part of autograd's graph."""

    @property
    def replicas(self) -> Mapping[int, ReplicaTensors]:
        """The replicas by rank."""

    @property
    def most_replicas(self) -> int:
        """How many replicas may share the rows of the next step."""

    @property
    def spans_devices(self) -> bool:
        """Whether a replica computes on several devices."""

    def why_never(self) -> str:
        """The reason, if known without a trace, why no step of the model can be captured; else empty."""

    def own_code(self) -> str:
        """A part of the step that is the user's code, in words; empty if there is none."""

    def prepare(self) -> None:
        """Called before a step runs or is traced: make the decisions that are common to all replicas."""

    def key(self, context: Context) -> Hashable:
        """What a graph depends on besides the shapes and number of rows and whether outputs are wanted."""

    def shape_name(self, context: Context) -> str:
        """The name of what a graph depends on besides the model, the same in each process."""

    def structure(self) -> str:
        """The model's parts and its variables' shapes as text, the same in each process.

        Models with equal texts may differ: the text only tells which of them an earlier run may have trained.
        """

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """A replica's rows as contiguous tensors, on their present device."""

    def draw(
        self, draws: Sequence[Draw], variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], Moved]:
        """Make draws that were recorded by `Draws`, for a step of the replica of `context`.

        Returns:
            The contiguous outcomes, and the new values of variables that the draws advance; `variables` are unchanged.
        """

    def tracing(self) -> AbstractContextManager[None]:
        """Held while this thread traces `compute`. An error that leaves it says where in the model it arose."""

    def watch(self, watch: Watch) -> None:
        """Add everything that a trace of the step reads besides its arguments. A change of it invalidates the trace."""


class PureStep(PureFunction, Protocol[OutcomeT]):
    """A model's training step without side effects."""

    @property
    def trained(self) -> Sequence[int]:
        """The numbers of the variables that have gradients, in the order of the gradients."""

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> OutcomeT:
        """Compute forward, the replica's contribution to the loss, and its gradients. No side effects.

        Args:
            variables: by number; trained variables are leaves of autograd.
            rows: as returned by `rows`; fake tensors while the step is traced.
            context: the replica's place. Exchanging values with other replicas is an error.
            draws: makes all random draws.

        Raises:
            NotCapturable: the step does something that a graph cannot repeat.
        """

    def flatten(self, outcome: OutcomeT) -> tuple[list[torch.Tensor], OutcomeForm[OutcomeT]]:
        """The tensors of an outcome except its gradients, and the outcome's form.

        Raises:
            NotCapturable: the outcome contains a value that may differ in each step and is not a tensor, or the step
                itself has computed a variable that a draw advances.
        """
