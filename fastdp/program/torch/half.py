"""Sums of float16 gradients, which are infinite on several devices where they are infinite on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastdp.tensors.autocast import Autocast

# What is at least this large is infinite in float16.
INFINITE = 65520.0
# Operations between a parameter and its cast that move numbers and change none.
_VIEWS = ("TBackward", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze", "Alias")


def may_overflow(autocast: Autocast, outputs: Sequence[torch.Tensor]) -> bool:
    """Whether a forward pass has computed in float16, as far as is seen outside: around it, or by its outputs."""
    return autocast.has_half or any(output.dtype == torch.float16 for output in outputs)


class HalfGradients:
    """The graph of a replica's forward pass, which tells which parameters autocast has cast to float16.

    Torch computes the gradient of such a parameter in float16, as a sum over all rows. It is infinite where the sum is
    too large, and a gradient scaler skips the step. Several replicas compute sums of fewer rows, which may be finite.

    Args:
        outputs: the replica's outputs, attached to the graph. Their values are not kept.
    """

    stays_in_process = True

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self._roots = [output.grad_fn for output in outputs if output.grad_fn is not None]

    def overflow(self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
        """Make numbers of reduced gradients infinite, in place, that are infinite on one device.

        Args:
            parameters: those of the replica.
            gradients: theirs, reduced.
        """
        pairs = [
            (parameter, gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None and gradient.dtype == torch.float32 and not gradient.is_sparse
        ]
        if not pairs:
            return
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in pairs], torch.inf)).tolist()
        large = [pair for pair, norm in zip(pairs, norms, strict=True) if norm >= INFINITE]
        cast = self._cast() if large else ()
        for parameter, gradient in large:
            if id(parameter) in cast:
                gradient.copy_(gradient.half())

    def _cast(self) -> set[int]:
        """The identities of the parameters that are used once, through a cast to float16."""
        uses: Counter[int] = Counter()
        casts: set[int] = set()
        for node, following in self._edges():
            if _is_leaf(following):
                uses[id(following.variable)] += 1
            if node.name().startswith("ToCopyBackward") and node._input_metadata[0].dtype == torch.float16:
                while following is not None and following.name().startswith(_VIEWS):
                    following = following.next_functions[0][0]
                if following is not None and _is_leaf(following):
                    casts.add(id(following.variable))
        return {one for one in casts if uses[one] == 1}

    def _edges(self) -> Iterator[tuple[Any, Any]]:
        """Pairs of a node and one that follows it in backward, each once."""
        seen, left = set(self._roots), list(self._roots)
        while left:
            node: Any = left.pop()
            for following, _ in node.next_functions:
                if following is None:
                    continue
                yield node, following
                if following not in seen:
                    seen.add(following)
                    left.append(following)


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")
