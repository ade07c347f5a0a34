"""Finds trained tensors that are no parameters of a module: those in its plain lists, or outside of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastdp.program.torch.rows.draws import CannotSplitError


def check_leaves(outputs: Iterable[torch.Tensor], others: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Check that no gradients flow to tensors besides a module's parameters, which replicas do not reduce.

    Args:
        outputs: what a copy of the module has made.
        others: the tensors of the copy besides its parameters and buffers, with their names.

    Raises:
        CannotSplitError: gradients flow to one.
    """
    names = {id(tensor): name for name, tensor in others if tensor.requires_grad and tensor.is_leaf}
    if not names:
        return
    left = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise CannotSplitError(
                f"`{name}` gets gradients, but is no parameter of the module: it is in a plain list, a dict or an "
                "object, or outside of the module. On several devices its gradient would be left out. Register it "
                "(nn.ModuleList, nn.ParameterList, an attribute), switch its requires_grad off, or use gpus=[0]."
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)
