"""The protocol of what captured steps need of a model: a training step as a pure function of tensors.

A program of one kind of model implements `PureStep`; tracing, comparing, compiling and recording know no more of the
model than this. Variables are known by their number, in one order for the template and all replicas.
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
# Variables that the step's draws have moved (states of generators), by number, with their values after it.
Moved = list[tuple[int, torch.Tensor]]


class Draws(Protocol):
    """Who decides about the random draws of a step that is captured. Draws come in the same order in each step."""

    def take(self, draw: Draw) -> torch.Tensor:
        """The outcome of `draw()`, or what stands for it."""


class ReplicaTensors(Protocol):
    """The memory of one replica, as tensors on its device that stay where they are."""

    @property
    def device(self) -> QueueDevice:
        """Where the replica runs."""

    @property
    def variables(self) -> Sequence[torch.Tensor]:
        """Its variables, by number; none is part of autograd's graph."""

    @property
    def gradients(self) -> Sequence[torch.Tensor]:
        """Where the gradients of the trained variables go, in their order."""

    @property
    def gradient_buffers(self) -> FlatBuffers:
        """The flat buffers that `gradients` are views of."""


class Outcome(Protocol):
    """What one replica's step gives: gradients, and whatever else the program makes of it."""

    @property
    def gradients(self) -> Sequence[torch.Tensor | None]:
        """Of the trained variables, in their order; None where nothing depends on one."""


OutcomeT = TypeVar("OutcomeT", bound=Outcome)
OutcomeT_co = TypeVar("OutcomeT_co", bound=Outcome, covariant=True)


class OutcomeForm(Protocol[OutcomeT_co]):
    """An outcome without its tensors."""

    def filled(
        self, gradients: Sequence[torch.Tensor | None], values: Iterator[torch.Tensor], moved: Moved
    ) -> OutcomeT_co:
        """An outcome of the same form.

        Args:
            gradients: as of `Outcome.gradients`; they have their values, or get them on the device's compute stream.
            values: in the order of `PureStep.flatten`. Valid until the replica's next step.
            moved: what the draws moved, outside of the graph.
        """


class PureStep(Protocol[OutcomeT]):
    """A model's training step without side effects, for captured steps.

    All is asked on the host thread between steps, but `key`, `rows`, `draw` and what makes an outcome of a form: these
    are called by the workers of replicas too, in each step.
    """

    @property
    def name(self) -> str:
        """The model's, for messages."""

    @property
    def variables(self) -> list[torch.Tensor]:
        """The template's variables, as they are now, by number; none is part of autograd's graph."""

    @property
    def trained(self) -> Sequence[int]:
        """The numbers of the variables that have gradients, in the order of these."""

    @property
    def replicas(self) -> Mapping[int, ReplicaTensors]:
        """The replicas that there are, by rank."""

    @property
    def most_replicas(self) -> int:
        """How many of them may share the rows of the next step."""

    @property
    def spans_devices(self) -> bool:
        """Whether a replica computes on several devices."""

    def why_never(self) -> str:
        """Why no step of the model can be captured, known without a trace; empty where nothing is known."""

    def own_code(self) -> str:
        """Which part of the step is code of the user's, in words; empty where none is."""

    def prepare(self) -> None:
        """A step is going to run, or to be traced: decide what is decided once for all replicas."""

    def key(self, context: Context) -> Hashable:
        """What else a graph depends on than the shapes of the rows, their number, and whether outputs are wanted."""

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """A replica's rows as contiguous tensors, where they are."""

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> OutcomeT:
        """Forward, the replica's contribution to the loss, and its gradients. Nothing else changes.

        Args:
            variables: by number; those that are trained are leaves of autograd.
            rows: as `rows` gives them; of fakes without values while the step is traced.
            context: the replica's place. To exchange values with others is an error.
            draws: makes all random draws.

        Raises:
            NotCapturable: the step does something that a graph cannot repeat.
        """

    def flatten(self, outcome: OutcomeT) -> tuple[list[torch.Tensor], OutcomeForm[OutcomeT]]:
        """The tensors of an outcome beside its gradients, and the outcome's form.

        Raises:
            NotCapturable: the outcome has something that may be another in each step, and is no tensor; or what a draw
                moved has been computed in the step.
        """

    def draw(
        self, draws: Sequence[Draw], variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], Moved]:
        """Make draws that were taken from `Draws`, as for a step of the replica of `context`.

        Returns:
            Their outcomes, contiguous, and the variables that they have moved: these are not written to.
        """

    def tracing(self) -> AbstractContextManager[None]:
        """Held while `compute` is traced, on this thread. An error that leaves it says where in the model it arose."""

    def watch(self, watch: Watch) -> None:
        """Add all that a trace of the step reads beside its arguments, so that a change of it makes the trace void."""
