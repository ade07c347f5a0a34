"""What a pass of a loop shares memory with, found on the replicas, and given to the merged outputs and attributes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdp.program.torch.aliases import Aliases, aliases_of, in_common, shared
from fastdp.program.torch.following.merged import WriteNotes
from fastdp.program.torch.loop_passes import Apart, ForwardNotes, ForwardPass
from fastdp.program.torch.module import ReplicaModule
from fastdp.tensors.row_effects import ROWS_FIRST


@dataclass(slots=True)
class Sharing:
    """Knows for each kind of passes which tensors share memory. Captured passes, which come later, do not show it.

    Keys of tensors are the numbers of outputs, a place with the number of a leaf for what forward writes, and a word
    with a number for the arguments and for what the module holds.
    """

    _known: dict[Any, Aliases] = field(default_factory=dict)

    def note(self, work: ForwardPass, every: Sequence[ForwardNotes]) -> None:
        """Note what the replicas' tensors of a pass share."""
        structure = work.batch.structure
        key = structure.kind, structure.autocast.dtypes, work.keeps, structure.inference
        found = [notes.aliases for notes in every if notes.aliases is not None]
        if len(found) == len(every):
            self._known[key] = in_common(found)
        work.aliases = self._known.get(key, {})

    @staticmethod
    def given_to(work: ForwardPass, tensors: Sequence[torch.Tensor], user: ReplicaModule) -> list[torch.Tensor]:
        """The merged tensors of a pass, with memory in common as on one device. Its writes get those without a graph.

        Args:
            work: the pass.
            tensors: the merged outputs, then what forward has written with a graph.
            user: the user's module.
        """
        if not work.aliases:
            return list(tensors)
        assert work.nest is not None
        count = len(work.nest.dtypes)
        merged: dict[Hashable, torch.Tensor] = dict(enumerate(tensors[:count]))
        with_graph = {(one.place, one.number): one for one in work.graphs}
        merged.update(zip(with_graph, tensors[count:], strict=True))
        written = work.noted.merged if work.noted is not None else {}
        left = [(place, number) for place, number in _leaves(written) if (place, number) not in with_graph]
        merged.update(((place, number), written[place].leaves[number]) for place, number in left)
        bases = {alias.base for alias in work.aliases.values()}
        given = {key: one for key, one in (*_arguments(work), *held_by(user)) if key in bases}
        found, apart = shared(work.aliases, merged, given, _axes(work, with_graph))
        work.apart = [
            Apart(_name(key), _name(base), one.detach(), one._version)
            for pair in apart
            for key, base in (pair, pair[::-1])
            if (one := found.get(key)) is not None
        ]
        for place, number in left:
            written[place].leaves[number] = found[place, number]
        return [found[key] for key in (*range(count), *with_graph)]


def _axes(work: ForwardPass, with_graph: Iterable[Hashable]) -> dict[Hashable, int | None]:
    """Where the rows are, by key: of outputs, of what forward has written with a graph, and of arguments with rows."""
    assert work.nest is not None
    made = zip([*range(len(work.nest.dtypes)), *with_graph], work.layouts, strict=True)
    layouts = work.batch.structure.layouts or [ROWS_FIRST] * len(work.arrays)
    given = ((("argument", at), layout.axis) for at, layout in enumerate(layouts))
    return {**{key: layout.axis for key, layout in made}, **dict(given)}


def _name(key: Any) -> str:
    """A tensor's name for messages, by its key."""
    if isinstance(key, int):
        return f"output {key}"
    first, number = key
    return f"{first} {number}" if isinstance(first, str) else f"`{first.name}`"


def aliases_on(
    replica: ReplicaModule, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], writes: WriteNotes
) -> Aliases:
    """What the outputs of a replica's pass, and what it has written, share memory with.

    Args:
        replica: its module.
        given: what that was given.
        outputs: what it has returned.
        writes: what it has written.
    """
    arguments = [(("argument", at), tensor) for at, tensor in enumerate(given)]
    made: list[tuple[Hashable, torch.Tensor]] = list(enumerate(outputs))
    for place, number in _leaves(writes.written):
        if place.kind in ("value", "more", "all"):
            made.append(((place, number), writes.written[place].leaves[number]))
    return aliases_of([*arguments, *held_by(replica)], made)


def held_by(replica: ReplicaModule) -> Iterator[tuple[Hashable, torch.Tensor]]:
    """The tensors that a replica's module holds, in one order for all replicas."""
    for at, parameter in enumerate(replica.parameters):
        yield ("parameter", at), parameter
    for buffer in replica.buffers:
        tensor = buffer.slot.table.get(buffer.slot.key)
        if tensor is not None:
            yield ("buffer", buffer.index), tensor
    for at, (_, tensor) in enumerate(replica.guard.contents.tensors if replica.guard is not None else ()):
        yield ("tensor", at), tensor


def _arguments(work: ForwardPass) -> Iterator[tuple[Hashable, torch.Tensor]]:
    """The user's own tensors behind the arguments, in the order in which a replica's module gets its parts."""
    shared_by_all = [leaf for leaf in work.batch.structure.nest.leaves if isinstance(leaf, torch.Tensor)]
    for at, tensor in enumerate((*work.arrays, *shared_by_all)):
        if tensor is not None:
            yield ("argument", at), tensor


def _leaves(written: Any) -> Iterator[tuple[Any, int]]:
    """The places and numbers of the tensors among what was written."""
    for place, one in written.items():
        for number, leaf in enumerate(one.leaves):
            if isinstance(leaf, torch.Tensor):
                yield place, number
