"""A captured forward pass as a node of autograd's graph, whose backward is the captured backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.autograd.graph import get_gradient_edge

from fastdp.capture.joint import CapturedJoint, Passes
from fastdp.program.torch.capture.pure_joint import JointForm
from fastdp.program.torch.parameter_hooks import HookedGradients
from fastdp.tensors.compiled import not_compiled
from fastdp.tensors.function_mode import plain


@dataclass(slots=True)
class NodePass:
    """One pass of a replica.

    Args:
        captured: its captured form.
        inputs: variables, rows, and the outcomes of draws. Copies of the buffers that forward changes.
        counted: the tensors whose versions say whether somebody has written to `inputs`: the module's own, and the
            user's arguments. In the order of `inputs`; draws have none.
        parameters, arguments: what `TorchPureJoint` gives gradients by, in its order.
        again: runs forward eagerly, with the same draws and values, and other tensors in place of `arguments`. Gives
            the tensors of the outputs; leaving the context ends the use of the values.
        note_used: called with the outputs from which a backward pass begins, if they are not the expected ones.
        refuse: called with the reason why such passes are better not captured.
        values: further results of forward, once it has run.
    """

    captured: CapturedJoint
    inputs: list[torch.Tensor]
    counted: Sequence[torch.Tensor]
    parameters: Sequence[torch.Tensor]
    arguments: Sequence[torch.Tensor]
    again: Callable[[Sequence[torch.Tensor]], AbstractContextManager[Sequence[torch.Tensor]]]
    note_used: Callable[[list[bool]], None]
    refuse: Callable[[str], None]
    values: list[torch.Tensor] = field(default_factory=list)
    _passes: Passes = field(init=False)
    _versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._passes = self.captured.passes
        self._versions = self._now()

    @property
    def form(self) -> JointForm:
        """What is known of the outputs."""
        form: JointForm = self.captured.form
        return form

    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Run forward: the outputs, as part of autograd's graph. Fills `values`."""
        outputs: tuple[torch.Tensor, ...] = _Node.apply(self, *self.parameters, *self.arguments)
        return outputs

    def forward(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run forward: the outputs, and what backward needs."""
        outputs, self.values, kept = self.captured.run(self.inputs)
        return outputs, [*(self.inputs[at] for at in self.captured.given), *kept]

    def backward(
        self, needed: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None]:
        """The gradients by parameters and arguments.

        Args:
            needed: as from `forward`.
            tangents: by the outputs; None where the loss does not depend on one.
        """
        used = [tangent is not None for tangent in tangents]
        if torch.is_grad_enabled():
            self.refuse("gradients of gradients (create_graph=True)")
        elif used != self.form.used:
            self.note_used(used)
        if not torch.is_grad_enabled() and used == self.form.used:
            with plain():
                seeds = [tangent for tangent in tangents if tangent is not None]
                return self.captured.gradients(self._passes, needed, seeds)
        self._check_unwritten()
        return self._gradients_again(tangents)

    def release(self) -> None:
        """Drop what only another backward pass would need."""
        self.inputs, self.values, self.arguments, self.again = [], [], [], _freed

    def _gradients_again(self, tangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients by an eager forward pass of the same numbers; differentiable if gradients are enabled."""
        differentiable = torch.is_grad_enabled()
        gradients: list[torch.Tensor | None] = [None] * (len(self.parameters) + len(self.arguments))
        with torch.enable_grad(), HookedGradients(self.parameters).aside(None):
            # Not the arguments themselves, whose hooks run when torch gets their gradients.
            arguments = [
                one.view_as(one) if differentiable else one.detach().requires_grad_() for one in self.arguments
            ]
            leaves = [*self.parameters, *arguments]
            wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
            with self.again(arguments) as outputs:
                pairs = [(y, g) for y, g in zip(outputs, tangents, strict=True) if g is not None and y.requires_grad]
                roots, seeds = [y for y, _ in pairs], [g for _, g in pairs]
                with plain():  # by edges: see `fastdp.program.torch.replica.backward`
                    begins, ends = map(get_gradient_edge, roots), (get_gradient_edge(leaves[i]) for i in wanted)
                    edges = list(begins), list(ends)
                found = torch.autograd.grad(*edges, seeds, create_graph=differentiable, allow_unused=True)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return gradients

    def _now(self) -> list[int]:
        """The versions of what forward reads."""
        written = self.form.written  # forward has had copies
        return [0 if i in written else tensor._version for i, tensor in enumerate(self.counted)]

    def _check_unwritten(self) -> None:
        """Check that nothing was written to that forward would read again.

        Raises:
            RuntimeError: something was.
        """
        for tensor, now, version in zip(self.counted, self._now(), self._versions, strict=True):
            if now != version:
                raise RuntimeError(
                    "One of the variables needed for gradient computation has been modified by an inplace operation: a "
                    f"tensor of shape {tuple(tensor.shape)}, at version {now}; expected version {version}. "
                    "This backward pass runs forward again. Run it before you change weights or inputs."
                )


def _freed(arguments: Sequence[torch.Tensor]) -> NoReturn:
    """Forward cannot run again."""
    raise RuntimeError("Trying to backward through the graph a second time: pass retain_graph=True the first time.")


class _Node(torch.autograd.Function):
    """A pass as a node. Its inputs are the parameters and arguments of a `NodePass`."""

    @staticmethod
    def forward(ctx: Any, one: NodePass, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, needed = one.forward()
        captured = one.captured
        # Torch compares the versions of what is saved, and raises if one has changed.
        read = {*captured.given, *captured.shared} - one.form.written
        counted = [one.counted[at] for at in read if at < len(one.counted)]
        ctx.one, ctx.needed = one, len(needed)
        ctx.save_for_backward(*needed, *counted)
        ctx.set_materialize_grads(False)
        outputs = [output.detach() for output in outputs]  # no views, which could not be changed in place
        wants = one.form.requires_grad
        ctx.mark_non_differentiable(*(y for y, wanted in zip(outputs, wants, strict=True) if not wanted))
        return tuple(outputs)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        one: NodePass = ctx.one
        gradients = one.backward(ctx.saved_tensors[: ctx.needed], tangents)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            one.release()
        return None, *gradients
