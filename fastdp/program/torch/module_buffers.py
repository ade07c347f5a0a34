"""Combines what the replicas' forward passes assign to a module's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fastdp.program.torch.module import ReplicaModule
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.judged import is_exact
from fastdp.tensors.moments import combine, unbiased
from fastdp.tensors.row_effects import Effect
from fastdp.tensors.sums import like, move, moved_length, movement


@dataclass(slots=True)
class BufferNotes:
    """The layout of a step's numbers: the elements of each buffer in `moved`, then the moments of each call in
    `normalized`.

    Indices are those of the variables. Buffers in `constant` get the first replica's value; `unjudged` has the values
    of those that must be the same though no trial has shown it, by name. An entry of `normalized`
    is one call: the indices of the running mean and variance, and the momentum.
    """

    moved: list[int] = field(default_factory=list)
    constant: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    normalized: list[tuple[int, int, float]] = field(default_factory=list)
    unjudged: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def places(self) -> list[int]:
        """The indices of the buffers that forward has changed."""
        pairs = [(mean, variance) for mean, variance, _ in self.normalized]
        return sorted({*self.moved, *(index for index, _ in self.constant), *(i for pair in pairs for i in pair)})

    @property
    def readable(self) -> list[int]:
        """Those of them that forward may have read. In training, statistics of batch normalization are only written."""
        return sorted({*self.moved, *(index for index, _ in self.constant)})

    def check(self, every: Sequence[BufferNotes]) -> None:
        """Check that all replicas agree on the buffers that only a step has changed, and not its trial.

        Raises:
            ValueError: they do not.
        """
        for name in dict.fromkeys(name for notes in every for name in notes.unjudged):
            values = [notes.unjudged.get(name) for notes in every]
            first = values[0]
            if first is None or any(value is None or not torch.equal(value, first) for value in values):
                raise ValueError(
                    f"forward has changed the buffer `{name}` to different values on different devices, which it did "
                    "not when fastdp tried it on a few rows, or which `rows` says to be the same. Say what it is: "
                    f'fastdp.wrap(module, rows={{"buffer:{name}": "max"}}), "min", or "sum" or "mean" of what forward '
                    "adds to it; or combine the replicas' values by fastdp.replica.all_reduce or "
                    "fastdp.replica.all_gather; or use gpus=[0]."
                )


def gather_buffers(replica: ReplicaModule, running: ReplicaContext, notes: BufferNotes) -> list[np.ndarray]:
    """A replica's numbers, to be summed over replicas. Fills the notes."""
    sums = []
    judged, declared = running.context.structure.judged, running.context.structure.declared
    said = replica.by_index(declared.buffers) if declared is not None and declared.buffers else {}
    states: dict[int, Effect] = {**judged.states, **said} if judged is not None else said
    for index, value, before in replica.changed_buffers(states):
        effect = states.get(index)
        if effect is None and judged is None:
            effect = Effect.SAME if is_exact(value) else Effect.MEAN
        elif effect is None or (index in said and effect is Effect.SAME):
            notes.unjudged[replica.name_of(index)] = value.cpu().clone()
        if effect in (Effect.MEAN, Effect.SUM):
            notes.moved.append(index)
            sums.append(movement(value, before, 1.0 if effect is Effect.SUM else running.context.rows.share))
        elif effect in (Effect.LARGEST, Effect.SMALLEST):
            parts = torch.stack(running.context.exchange(value, f"the buffer `{replica.name_of(index)}`"))
            notes.constant.append((index, parts.amax(0) if effect is Effect.LARGEST else parts.amin(0)))
        else:
            notes.constant.append((index, value.clone()))
    for call in running.normalized:
        mean, variance = replica.index_of(call.mean), replica.index_of(call.variance)
        if mean is None or variance is None:  # not buffers of the module: private to the replica
            _move([call.mean, call.variance], call.momentum, call.sums)
            continue
        notes.normalized.append((mean, variance, call.momentum))
        sums.append(call.sums)
    return sums


def assign_buffers(variables: list[torch.Tensor], sums: np.ndarray, notes: BufferNotes) -> None:
    """Give buffers their values for the global batch, in place."""
    for index, value in notes.constant:
        variables[index].copy_(value)
    at = 0
    for index in notes.moved:
        length = moved_length(variables[index])
        move(variables[index], sums[at : at + length])
        at += length
    for mean, variance, momentum in notes.normalized:
        length = 1 + 2 * variables[mean].numel()
        _move([variables[mean], variables[variance]], momentum, sums[at : at + length])
        at += length


def _move(running: list[torch.Tensor], momentum: float, sums: np.ndarray) -> None:
    """Move the running mean and variance towards those of the batch, in their own precision, as torch does."""
    mean, variance = combine(sums)
    for target, value in zip(running, (mean, variance * unbiased(float(sums[0]))), strict=True):
        target.copy_(target * (1.0 - momentum) + like(value, target) * momentum)
