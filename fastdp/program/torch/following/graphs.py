"""What a forward pass has written with autograd's graph: the graph goes on through the merged values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastdp.program.torch.following.merged import MergedWrite, WriteNotes, refused
from fastdp.program.torch.following.writes import Place
from fastdp.tensors.row_effects import Effect, Layout


@dataclass(slots=True)
class Leaf:
    """A leaf with a graph: where it is, its layout, and its value merged and on each replica."""

    place: Place
    number: int
    layout: Layout
    merged: torch.Tensor
    parts: list[torch.Tensor]


@dataclass(slots=True)
class PassWrites:
    """What the replicas have written in a forward pass, and the same merged."""

    every: list[WriteNotes]
    merged: dict[Place, MergedWrite]

    def graphs(self) -> list[Leaf]:
        """The leaves with graphs.

        Raises:
            ValueError: one is an extreme over rows, whose gradient belongs to one row.
        """
        found = []
        for place, write in self.merged.items():
            for i, (leaf, role) in enumerate(zip(write.leaves, write.roles, strict=True)):
                parts = [_own(notes, place, i) for notes in self.every]
                if not any(part is not None and part.requires_grad for part in parts):
                    continue
                if role.layout.effect in (Effect.LARGEST, Effect.SMALLEST):
                    raise refused(place.name, "to an extreme over rows that gradients may flow back from")
                found.append(Leaf(place, i, role.layout, leaf, [leaf if part is None else part for part in parts]))
        return found


def _own(notes: WriteNotes, place: Place, number: int) -> torch.Tensor | None:
    """A replica's own tensor."""
    own = notes.written.get(place)
    leaf: Any = own.leaves[number] if own is not None else None
    return leaf if isinstance(leaf, torch.Tensor) else None
