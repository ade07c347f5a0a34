"""Repeats the forward pass of a loop whose graphs are lost, or for whose backward pass a device has no memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastdp.errors import GraphsLostError, ReplicaError
from fastdp.program.torch.loop import LoopProgram
from fastdp.program.torch.loop_passes import ForwardPass
from fastdp.tensors import pytree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdp.program.torch.batch import Structure


@dataclass(slots=True)
class Seen:
    """What a forward pass has begun with, if it may be repeated.

    Attributes:
        changes: how often the module had changed.
        versions: of the tensors among the arguments, and of the module's parameters.
        buffers: those that the pass has changed, as they were before, by their places.
    """

    tensors: list[torch.Tensor]
    changes: int
    buffers: dict[int, torch.Tensor]
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = [tensor._version for tensor in self.tensors]

    @classmethod
    def by(cls, program: LoopProgram, work: ForwardPass, values: Any) -> Seen:
        """What a pass on these arguments begins with. The pass notes its buffers."""
        tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        work.may_repeat = True
        return cls([*tensors, *program.module.parameters()], program.changes, work.before)


def why_once(program: LoopProgram, work: ForwardPass, seen: Seen | None) -> str:
    """Why a pass cannot be repeated with the outcome that it had; empty if it can."""
    if seen is None:
        return "no pass is to be repeated"
    if work.normalizes_by_replica and not program.sync_batch_norm:
        return "batch normalization used each device's own rows; sync_batch_norm=True uses those of the batch"
    if work.written or (work.noted is not None and work.noted.merged):
        return "forward has written to its arguments or to the module's attributes"
    if any(buffer.own for buffer in program.user_buffers):
        return "forward replaces a buffer by one of another shape"
    return changed_since(program, seen)


def changed_since(program: LoopProgram, seen: Seen) -> str:
    """What forward would find changed if it ran again; empty if nothing."""
    if program.changes != seen.changes:
        return "the module was changed since"
    if [tensor._version for tensor in seen.tensors] != seen.versions:
        return "an argument or a parameter was changed in place since"
    return ""


def split_refused(work: ForwardPass) -> str:
    """Why the rows of a device cannot run in parts in a loop; empty if they can."""
    return "batch normalization uses the moments of all rows of a device" if work.normalizes_by_replica else ""


def again(
    program: LoopProgram,
    work: ForwardPass,
    seen: Seen | None,
    forward: Callable[[], ForwardPass],
    error: ReplicaError | GraphsLostError,
) -> ForwardPass:
    """Repeat a forward pass on the replicas that there are now, with the draws and buffers that it had.

    Args:
        work: the pass.
        seen: what it began with.
        forward: runs another pass on the same arguments, with gradients.
        error: which has ended the backward pass.

    Returns:
        The other pass.

    Raises:
        ReplicaError, GraphsLostError: `error`, with the reason why the pass cannot be repeated. Nothing has changed.
    """
    why = why_once(program, work, seen)
    if why:
        error.args = (f"{error} The backward pass cannot be repeated: {why}.",)
        raise error
    assert seen is not None
    structure: Structure = work.batch.structure
    with _as_then(program, structure, seen), torch.enable_grad(), structure.autocast.enter():
        found = forward()
    found.merged, found.inner = work.merged, work.inner
    return found


@contextmanager
def _as_then(program: LoopProgram, structure: Structure, seen: Seen) -> Iterator[None]:
    """Let generators and buffers be what they were before a pass, and then again what they are now."""
    states = [(generator, generator.get_state()) for generator in structure.draws.generators]
    present = program.exchange_buffers(seen.buffers)
    structure.draws.undo()
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        program.exchange_buffers(present)
