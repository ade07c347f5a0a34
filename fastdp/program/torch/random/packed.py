"""Draws for packed sequences: a replica's entries of the draw for the entries of the whole batch.

A packed sequence has the first steps of all rows, the longest rows first, then the second steps, and so on. Rows of
equal length stand in their order in the batch. So the lengths of all replicas' rows tell where each one's entries are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdp.errors import NotCapturable
from fastdp.program.torch.random.drawn import Fill, How
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.shared_draws import SharedDraws


class PackedEntries:
    """Where a replica's entries of a packed sequence are among those of all replicas.

    Args:
        running: the replica.
        batch_sizes: the number of entries of each step, as `PackedSequence.batch_sizes`. Replicas exchange them.
    """

    def __init__(self, running: ReplicaContext, batch_sizes: torch.Tensor) -> None:
        if running.traced:
            raise NotCapturable("draws for a packed sequence")
        self._running = running
        if running.rows.count == running.rows.total:
            draws: SharedDraws = running.context.structure.draws
            draws.note_lengths(running.draws, _lengths(batch_sizes))
            return
        draws = running.context.structure.draws
        everyone, own = draws.exchanged_lengths(running.context, running.draws, _lengths(batch_sizes))
        self._total = int(sum(map(torch.sum, everyone)))
        self._at = _places(everyone, own, batch_sizes)

    def drawn(self, name: str, numbers: Sequence[Any], like: torch.Tensor, fill: Fill) -> torch.Tensor:
        """The replica's entries of a draw. Read-only. Arguments as of `drawn.drawn`; `like` has entries first."""
        running = self._running
        number, how = running.next_draw(), How.of(running, torch.default_generator)
        if running.rows.count == running.rows.total:
            return how.outcome(running, number, None, lambda: fill(torch.empty_like(like)))
        shape = (self._total, *like.shape[1:])
        request = (name, *numbers, shape, like.dtype, "packed")
        whole = how.outcome(running, number, request, lambda: fill(torch.empty(shape, dtype=like.dtype)))
        return whole[self._at]


def _lengths(batch_sizes: torch.Tensor) -> torch.Tensor:
    """The lengths of the rows of a packed sequence, the longest first."""
    sizes = batch_sizes.cpu()
    return (sizes[None, :] > torch.arange(int(sizes[0]))[:, None]).sum(1)


def _places(everyone: Sequence[torch.Tensor], own: int, batch_sizes: torch.Tensor) -> torch.Tensor:
    """The places of a replica's entries among all entries.

    Args:
        everyone: the lengths of the rows of each replica, the longest first.
        own: the replica's number.
        batch_sizes: the replica's.
    """
    lengths, first = torch.cat(list(everyone)), sum(len(one) for one in everyone[:own])
    order = torch.sort(lengths, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    mine = rank[first : first + len(everyone[own])]
    sizes = (lengths[None, :] > torch.arange(int(lengths.max()))[:, None]).sum(1)
    begins = torch.cumsum(sizes, 0) - sizes
    return torch.cat([begins[step] + mine[:count] for step, count in enumerate(batch_sizes.tolist())])
