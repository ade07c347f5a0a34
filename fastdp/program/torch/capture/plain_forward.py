"""`PlainForward`: a forward pass of a module that is alone on the host, whose outputs belong to the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fastdp.buffers import FlatBuffers
from fastdp.capture.graph.ownership import Memory, memory_of, separated
from fastdp.capture.pure_step import Draws
from fastdp.capture.trace import Captured
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.pure_forward import ForwardForm, ForwardOutcome, TorchPureForward
from fastdp.program.torch.capture.pure_pass import classes_of
from fastdp.program.torch.capture.step_parts import is_fake
from fastdp.program.torch.module import Slot, slots_of
from fastdp.program.torch.nest import Nest
from fastdp.runtime.queue import QueueDevice


@dataclass(slots=True)
class OwnTensors:
    """The user's own parameters and buffers as the memory of a replica (`fastdp.capture.pure_step.ReplicaTensors`)."""

    device: QueueDevice
    slots: list[Slot]
    gradients: list[torch.Tensor]
    gradient_buffers: FlatBuffers

    @property
    def variables(self) -> list[torch.Tensor]:
        """The present tensors."""
        return [slot.table[slot.key] for slot in self.slots]


class PlainForward(TorchPureForward):
    """A pass over the user's own tensors, with nobody between it and the user.

    Args:
        module: the user's own, in host memory.
        device: the first device, on the host.
        records: as in `TorchPureForward`.

    Nothing is copied: arguments are used as they are, and outputs are handed out. So they share memory where those of
    an eager pass do.
    """

    def __init__(self, module: nn.Module, device: QueueDevice, *, records: bool) -> None:
        self.own = OwnTensors(device, slots_of(module), [], FlatBuffers([], device))
        super().__init__(module, self.own.slots, {0: self.own}, sync_batch_norm=False, devices=1, records=records)
        self._held: list[tuple[torch.Tensor, str]] = []
        self.memory: list[Memory | None] = []  # of the tensors of `flatten`

    @property
    def variables(self) -> list[torch.Tensor]:
        """As `PureStep.variables`, for a trace."""
        return [one.clone() if one.is_inference() else one.detach() for one in self.own.variables]

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """The arguments themselves. Those that were made in inference mode are copied for a trace, which is outside."""
        structure: Structure = context.structure
        inside = torch.is_inference_mode_enabled()
        leaves = (leaf for leaf in structure.nest.leaves if isinstance(leaf, torch.Tensor))
        return [leaf.clone() if leaf.is_inference() and not inside else leaf for leaf in leaves]

    def watch(self, watch: Watch) -> None:
        """As `PureStep.watch`. Nobody else looks whether parameters and buffers are those of before."""
        self.own.slots[:] = slots_of(self._module)
        super().watch(watch)
        tensors = self.own.variables
        for tensor, slot in zip(tensors, self.own.slots, strict=True):
            for name in ("shape", "dtype", "device"):
                watch.attribute_of_many(tensor, name, f"{slot.name}.{name}")
        watch.answer(_asked(methodcaller("stride"), tensors), "the memory layout of parameters")
        self._held = watch.tensors

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> ForwardOutcome:
        """As `PureStep.compute`."""
        outcome = super().compute(variables, rows, context, draws)
        if outcome.form.buffers.replaced:
            name = self._slots[min(outcome.form.buffers.replaced)].name
            raise NotCapturable(f"the buffer `{name}`, in whose place forward puts another tensor")
        if not is_fake(variables):
            self.memory = [None] * (len(outcome.constants) + len(outcome.written)) + self.memory
        return outcome

    def _check_written(self, arguments: Sequence[torch.Tensor], have_rows: bool) -> None:
        """As in `TorchPureForward`: all arguments are the user's own."""

    def _ran(self, outputs: Any, tensors: Sequence[torch.Tensor], given: list[torch.Tensor]) -> None:
        """As in `TorchPureForward`: notes what has the memory of the outputs.

        Raises:
            NotCapturable: they share it with something that the module holds, or cannot be made of their tensors.
        """
        nest, _ = Nest.flatten(outputs, "The module's outputs")
        if classes_of(outputs) != classes_of(nest.pack(tensors)):
            raise NotCapturable("outputs in a container of a class of its own, such as a torch.Size")
        self.memory = [*memory_of(tensors, [*given, *(tensor for tensor, _ in self._held)])]
        for label in self.memory:
            if isinstance(label, int) and label >= len(given):
                raise NotCapturable(f"an output that shares memory with {self._held[label - len(given)][1]}")


class OwnedCaptured(Captured[ForwardOutcome]):
    """A captured `PlainForward`, which hands out results."""

    _step: PlainForward

    @property
    def own(self) -> OwnTensors:
        """The tensors that it runs on."""
        return self._step.own

    @property
    def form(self) -> ForwardForm:
        """The form of an outcome."""
        form = super().form
        assert isinstance(form, ForwardForm)
        return form

    def _optimized(self, traced: GraphModule) -> GraphModule:
        return separated(super()._optimized(traced), self._step.memory)


def _asked(question: Callable[[Any], Any], tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    return lambda: [*map(question, tensors)]
