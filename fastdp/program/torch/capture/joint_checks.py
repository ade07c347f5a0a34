"""Compares a captured forward and backward pass with the eager ones, on random gradients by the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import get_gradient_edge

from fastdp.capture.agreement import Tensors, disagreement, moved
from fastdp.capture.joint import CapturedJoint
from fastdp.program.torch.capture.pure_joint import JointForm
from fastdp.program.torch.nest import Nest
from fastdp.tensors.function_mode import plain


class EagerPasses:
    """An eager forward pass, whose backward is run once from random gradients. It leaves the graph, and no `grad`.

    Args:
        captured: the captured passes to compare with.
        nest, outputs: of the eager forward.
        leaves: what gradients are by, in the order of the captured ones.
    """

    def __init__(
        self, captured: CapturedJoint, nest: Nest, outputs: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
    ) -> None:
        self._captured, self._outputs = captured, outputs
        form: JointForm = captured.form
        self._is_alike = nest == form.nest and [output.requires_grad for output in outputs] == form.requires_grad
        self._gradients: list[torch.Tensor | None] = [None] * len(leaves)
        if not self._is_alike:
            return
        wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        with plain():
            roots = [output for output, use in zip(outputs, form.used, strict=True) if use]
            self._tangents = _random(roots)
            begins, ends = [get_gradient_edge(root) for root in roots], [get_gradient_edge(leaves[i]) for i in wanted]
        # In the modes of the caller, since checkpoints run forward again.
        found = torch.autograd.grad(begins, ends, self._tangents, retain_graph=True, allow_unused=True)
        for i, gradient in zip(wanted, found, strict=True):
            self._gradients[i] = gradient

    def difference(
        self, inputs: Sequence[torch.Tensor], names: Sequence[str], *, rough: bool
    ) -> tuple[str, list[torch.Tensor]]:
        """What the captured passes give that differs, empty if nothing does; and their other values.

        Args:
            inputs: of the captured forward.
            names: those of the leaves.
            rough: numbers were computed in a lower precision than their own.
        """
        if not self._is_alike:
            return "the structure of the outputs", []
        found, values, gradients = self._captured_passes(inputs)

        def at(number: int) -> Tensors:
            outputs, _, by_leaves = self._captured_passes(moved(inputs, number))
            return [*outputs, *by_leaves]

        what = [f"output {i}" for i in range(len(found))] + [f"the gradient of {name}" for name in names]
        expected = [*self._outputs, *self._gradients]
        return disagreement([*found, *gradients], expected, what, rough=rough, at=at), values

    def _captured_passes(
        self, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
        """The outputs, other values and gradients of the captured passes."""
        captured = self._captured
        found, values, kept = captured.run(inputs)
        needed = [*(inputs[at] for at in captured.given), *kept]
        return found, values, captured.gradients(captured.passes, needed, self._tangents)


def _random(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Random gradients by outputs, which leave torch's generator as it is."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    return [one.to(y.dtype) for one, y in zip(made, outputs, strict=True)]
