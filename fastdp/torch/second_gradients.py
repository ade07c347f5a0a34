"""Gradients of gradients: the pass is repeated on one device, with the values and draws that it had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastdp.program.torch.loop import LoopProgram
from fastdp.program.torch.paths import arriving, between, hooked
from fastdp.tensors import pytree
from fastdp.tensors.arrays import to_tensor
from fastdp.warn import warn_user

if TYPE_CHECKING:
    from fastdp.torch.autograd import OpenPass

_Gradients = Sequence[torch.Tensor | None]


class SecondGradients:
    """Differentiates passes of a program in a way that can be differentiated again."""

    def __init__(self, program: LoopProgram) -> None:
        self._program = program
        self._told = False

    def with_graph(
        self, opened: OpenPass, tensors: Sequence[torch.Tensor], gradients: _Gradients
    ) -> list[torch.Tensor | None]:
        """The gradients of a pass by `tensors`, which are those that it was given and the parameters.

        Raises:
            NotImplementedError: batch normalization used each replica's own moments, or the gradients come through
                what forward sets.
        """
        work, watched = opened.work, opened.watched
        if work.retained(gradients, watched.present_cut()):
            raise NotImplementedError(
                "retain_grad() on an output from which the module has computed another one, in a gradient of a "
                "gradient (create_graph=True): several devices do not know it. Use gpus=[0]."
            )
        outputs = self._outputs(opened, tensors)
        gradients, others = gradients[: len(outputs)], gradients[len(outputs) :]
        if any(gradient is not None for gradient in others):
            raise _not_through_attributes()
        watched.repeated = (-1, [])
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        roots, seeds = [root for root, _ in pairs], [seed for _, seed in pairs]
        cut = {outputs[at]: one for at in watched.present_cut() if (one := gradients[at]) is not None}
        with hooked(arriving(cut)):
            return list(torch.autograd.grad(roots, list(tensors), seeds, create_graph=True, allow_unused=True))

    def path(
        self, opened: OpenPass, ends: Sequence[int], gradients: _Gradients, starts: Sequence[int]
    ) -> list[torch.Tensor | None]:
        """As `Calls.path`."""
        tensors = [*opened.work.given, *(self._program.users[i] for i in opened.numbers)]
        outputs = self._outputs(opened, tensors)
        pairs = [(at, g) for at, g in zip(ends, gradients, strict=True) if g is not None]
        if max(*starts, *(at for at, _ in pairs)) >= len(outputs):
            raise _not_through_attributes()
        roots, seeds = [outputs[at] for at, _ in pairs], [seed for _, seed in pairs]
        return between(roots, seeds, [outputs[at] for at in starts], create_graph=True)

    def _outputs(self, opened: OpenPass, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of a pass that is repeated, once in a backward pass."""
        if opened.work.normalizes_by_replica and not self._program.sync_batch_norm:
            raise NotImplementedError(
                "A gradient of a gradient (create_graph=True) through batch normalization needs the moments of the "
                "global batch: wrap the module with sync_batch_norm=True."
            )
        task, outputs = opened.watched.repeated
        if task != torch._C._current_graph_task_id():
            self._tell_once()
            outputs = [leaf for leaf in self._repeated(opened, tensors) if isinstance(leaf, torch.Tensor)]
            opened.watched.repeated = torch._C._current_graph_task_id(), outputs
        return outputs

    def _repeated(self, opened: OpenPass, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The leaves of the outputs of a pass that is repeated by the user's own module, on one device."""
        work, module = opened.work, self._program.module
        leaves, spec = pytree.tree_flatten(opened.values)
        places = {id(given): tensor for given, tensor in zip(work.given, tensors, strict=False)}
        args, kwargs, _ = pytree.tree_unflatten([places.get(id(x), to_tensor(x)) for x in leaves], spec)
        buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        slots = [(one.slot, one.slot.tensor) for one in self._program.user_buffers]
        drawn = torch.get_rng_state()
        torch.set_rng_state(opened.drawn)
        try:
            with self._program.as_before(work), torch.enable_grad(), work.batch.structure.autocast.enter():
                return pytree.tree_leaves(module(*args, **kwargs))
        finally:
            torch.set_rng_state(drawn)
            for slot, buffer in slots:  # forward may have put another tensor there
                slot.table[slot.key] = buffer
            for buffer, before in buffers:
                buffer.data.copy_(before)

    def _tell_once(self) -> None:
        """Warn once that gradients of gradients are computed on one device."""
        if not self._told:
            self._told = True
            warn_user(
                f"fastdp: gradients of gradients (create_graph=True) of {type(self._program.module).__name__} are "
                "computed on one device."
            )


def _not_through_attributes() -> NotImplementedError:
    return NotImplementedError(
        "A gradient of a gradient (create_graph=True) cannot go through values that forward sets as attributes. Return "
        "them from forward."
    )
