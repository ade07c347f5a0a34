"""`TorchPureJoint`: forward of a torch module with gradients and its backward, as captured loops ask for them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdp.capture.graph.ownership import memory_of
from fastdp.capture.joint import JointOutcome, Tangents
from fastdp.capture.pure_step import Draws, ReplicaTensors
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.torch.activations import inner_of
from fastdp.program.torch.batch import Structure, with_extremes
from fastdp.program.torch.capture.guard import side_effect, watch_pass
from fastdp.program.torch.capture.pure_pass import PurePass, classes_of
from fastdp.program.torch.capture.step_parts import FoundInBuffers, found_in_buffers, gradients_of_leaves, is_fake
from fastdp.program.torch.half import may_overflow
from fastdp.program.torch.module import Slot
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.rows.declared import parts_fit
from fastdp.tensors import pytree

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Used = tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class JointForm:
    """The form of a `JointOutcome` of a torch module.

    Attributes:
        nest: of the outputs.
        requires_grad: which outputs do.
        used: the outputs from which backward begins.
        buffers: what forward leaves in buffers, without their values.
    """

    nest: Nest
    requires_grad: list[bool]
    used: list[bool]
    buffers: FoundInBuffers

    @property
    def written(self) -> set[int]:
        """The numbers of the buffers that forward changes."""
        found = self.buffers
        return {*found.moved, *found.constant, *(i for call in found.normalized for i in call[:2])}


class TorchPureJoint(PurePass):
    """Implements `fastdp.capture.joint.PureJoint`; the form of outcomes is a `JointForm`.

    Args:
        module, slots, replicas, sync_batch_norm, devices: as in `PurePass`.
        trained: the numbers of the parameters that can have a gradient.

    Gradients are by the parameters `trained`, then by the tensors `Structure.differentiated` of a batch. Which outputs
    the loss depends on is known from the passes before: see `note_used`.
    """

    def __init__(
        self,
        module: nn.Module,
        slots: Sequence[Slot],
        trained: Sequence[int],
        replicas: Mapping[int, ReplicaTensors],
        *,
        sync_batch_norm: bool,
        devices: int,
    ) -> None:
        super().__init__(module, slots, replicas, sync_batch_norm=sync_batch_norm, devices=devices)
        self.name = f"loop of {type(module).__name__}"
        self.trained = list(trained)
        self._wanted: tuple[bool, ...] = ()
        self._used: dict[Hashable, Used] = {}
        self._held: list[tuple[torch.Tensor, str]] = []  # other tensors that the module has

    def why_never(self) -> str:
        """As `PureStep.why_never`."""
        together = self.most_replicas > 1
        if together and self._sync_batch_norm and any(isinstance(part, _NORMS) for part in self._module.modules()):
            return "sync_batch_norm: replicas exchange moments in the middle of a pass"
        return super().why_never()

    def own_code(self) -> str:
        """As `PureStep.own_code`: what a replay would leave out. Other code is compared with eager passes."""
        return side_effect(self._module)

    def prepare(self) -> None:
        """As `PureStep.prepare`."""
        self._wanted = tuple([self._slots[i].tensor.requires_grad for i in self.trained])

    def watch(self, watch: Watch) -> None:
        """As `PureStep.watch`. Hooks on parameters run outside of the passes, on the gradients that they give."""
        watch_pass(watch, self._module, self._slots, of_parameters=())
        self._held = watch.tensors

    def key(self, context: Context) -> tuple[Hashable, ...]:
        """As `PureStep.key`."""
        kind, structure = super().key(context), context.structure
        return kind, structure.differentiated, self._wanted, self._used.get(_kind(structure))

    def note_used(self, structure: Structure, used: Used) -> None:
        """Note from which outputs a backward pass began: the next ones are taken to do the same. At first all do."""
        self._used[_kind(structure)] = used

    def compute(
        self,
        variables: Sequence[torch.Tensor],
        rows: Sequence[torch.Tensor],
        context: Context,
        draws: Draws,
        tangents: Tangents,
    ) -> JointOutcome:
        """As `PureJoint.compute`."""
        structure: Structure = context.structure
        given = [*rows] if is_fake(variables) else [row.clone() for row in rows]
        leaves = [given[at].detach().requires_grad_() for at in structure.differentiated]
        for at, leaf in zip(structure.differentiated, leaves, strict=True):
            given[at] = leaf
        with torch.enable_grad(), self.lent_pass(variables, context, draws) as ran:
            args, kwargs, _ = self._nested(given, structure)
            before = _leaves((args, kwargs))
            with structure.autocast.enter():
                outputs = with_extremes(self._module(*args, **kwargs), ran.running.context)
            nest, tensors = Nest.flatten(outputs, "The module's outputs")
            if self.most_replicas == 1 and not is_fake(variables):
                self._refuse_shared(outputs, nest, tensors, [*given, *ran.values])
                if len(tensors) > 1 and inner_of(tensors):
                    # Its hooks, its `grad` and torch.autograd.grad by it would see the loss's own part alone.
                    raise NotCapturable("an output from which the module computes another one")
                if _leaves((args, kwargs)) != before:
                    raise NotCapturable("a list or dict among the arguments that forward changes")
            if context.rows.count < context.rows.total:
                if may_overflow(structure.autocast, tensors):
                    raise NotCapturable("float16 on several devices, where sums of gradients must overflow as on one")
                parts_fit(structure.layouts_of(outputs, tensors), tensors, context.rows)
            wants = [tensor.requires_grad for tensor in tensors]
            known = self._used.get(_kind(structure), wants)
            used = [use and wanted for use, wanted in zip(known, wants, strict=True)]
            leaves = [*(ran.values[i] for i in self.trained), *leaves]
            roots = [y for y, use in zip(tensors, used, strict=True) if use]
            gradients = gradients_of_leaves(ran.running, roots, leaves, tangents)
        with torch.no_grad():
            buffers = found_in_buffers(
                self._slots, ran.values, variables, ran.lent, self._changed(ran, variables), ran.running
            )
            if self.most_replicas == 1 and buffers.replaced:
                name = self._slots[min(buffers.replaced)].name
                raise NotCapturable(f"the buffer `{name}`, in whose place forward puts another tensor")
            values = [*([torch.cat(buffers.sums)] if buffers.sums else []), *buffers.constant.values()]
        return JointOutcome(tensors, values, gradients, JointForm(nest, wants, used, buffers.without_values()))

    def _refuse_shared(
        self, outputs: Any, nest: Nest, tensors: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> None:
        """Refuse outputs that a caller on one device can tell from those of a graph.

        Raises:
            NotCapturable: they share memory with each other or with something that is there already, or are in
                containers of a class of their own.
        """
        if classes_of(outputs) != classes_of(nest.pack(tensors)):
            raise NotCapturable("outputs in a container of a class of its own, such as a torch.Size")
        memory = memory_of(tensors, [*given, *(tensor for tensor, _ in self._held)])
        if len(set(memory)) < len(memory) or any(isinstance(one, int) for one in memory):
            raise NotCapturable("outputs that share memory with each other, with an argument or with the module")


def _leaves(nest: Any) -> Any:
    """What shows whether a nest has changed."""
    leaves, spec = pytree.tree_flatten(nest)
    return [*map(id, leaves)], spec


def _kind(structure: Structure) -> Hashable:
    """What the outputs of a batch are known by."""
    return structure.nest.spec, structure.nest.dtypes
