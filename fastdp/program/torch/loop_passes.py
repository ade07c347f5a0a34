"""One forward pass of a user's loop and the backward pass through it: what they are given, and what replicas tell."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdp.capture.shapes import Shape
from fastdp.capture.steps import Captures
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.program.torch.activations import Inner, inner_of, retained
from fastdp.program.torch.aliases import Aliases
from fastdp.program.torch.following.graphs import Leaf, PassWrites
from fastdp.program.torch.following.merged import WriteNotes
from fastdp.program.torch.gradients import Found
from fastdp.program.torch.half import HalfGradients
from fastdp.program.torch.module_buffers import BufferNotes
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.declared import rows_back
from fastdp.program.torch.rows.merging import own_part
from fastdp.program.torch.shared_draws import SharedDraws
from fastdp.tensors import pytree
from fastdp.tensors.arrays import as_tensor
from fastdp.tensors.row_effects import ROWS_FIRST, Layout


@dataclass(slots=True)
class KeptGraph:
    """What a replica keeps of a forward pass: its outputs with their graph, and its leaves.

    `captured`: forward was. Then `normalizes` says that it has used moments of the batch: `running` does not tell.
    """

    running: ReplicaContext
    outputs: list[torch.Tensor]
    rows: list[torch.Tensor]
    shared: list[torch.Tensor]
    captured: bool = False
    normalizes: bool = False


@dataclass(slots=True)
class GivenLeaves:
    """What a replica's module gets: its tensors in the order of `Structure.tensors`, with leaves where gradients count.

    `rows` and `shared` are these leaves: with rows, and without.
    """

    tensors: list[torch.Tensor]
    rows: list[torch.Tensor]
    shared: list[torch.Tensor]


@dataclass(slots=True)
class Apart:
    """A merged tensor that shares elements with another one on one device, and not here."""

    name: str
    other: str
    tensor: torch.Tensor
    version: int


def check_apart(tensors: list[Apart]) -> None:
    """Check that nobody has written to such tensors. Those of the list are forgotten then.

    Raises:
        RuntimeError: somebody has.
    """
    for one in tensors:
        if one.tensor._version != one.version:
            tensors.clear()
            raise RuntimeError(
                f"The loop has written in place to {one.name} of the module, which shares memory with {one.other} in "
                "forward: on one device the other one has these values too, and on several it has not. Write to a "
                "clone, or let forward return one."
            )


@dataclass(slots=True)
class ForwardNotes:
    """What a replica tells of a forward pass. `others` are outputs that are not merged by their first axis.

    `used` are the outputs from which a captured backward pass begins; None if forward ran eagerly. `aliases`: what
    shares memory; None if forward was captured.
    """

    nest: Nest
    layouts: list[Layout]
    requires_grad: list[bool]
    others: list[torch.Tensor]
    draws: SharedDraws
    writes: WriteNotes
    buffers: BufferNotes = field(default_factory=BufferNotes)
    used: list[bool] | None = None
    aliases: Aliases | None = None

    def agree(self, every: Sequence[ForwardNotes]) -> None:
        """Check that all replicas have drawn the same random numbers, and agree on buffers.

        Raises:
            RuntimeError, ValueError: they have not, or do not.
        """
        self.draws.end()
        self.buffers.check([note.buffers for note in every])


@dataclass(slots=True)
class ForwardPass:
    """One forward pass of all replicas.

    Args:
        batch: the global batch.
        arrays: the user's tensor behind each array of the batch; None for arrays that are none.
        rows: the tensors with rows whose gradients are wanted, by their place among the arrays of the batch.
        shared: tensors without rows whose gradients are wanted, by their place among the other leaves of the batch.
        keeps: keep the graphs.

    `records`: gradients are enabled, though perhaps nothing has any. `captures` are the captured passes of its kind;
    None if it runs eagerly. `before`: the buffers that forward has changed and may have read, as they were, by their
    places; all that it has changed if the pass `may_repeat` on the replicas.
    `shapes` are those of its rows, `seconds` what forward has taken, and `used` as in
    `ForwardNotes`.
    """

    batch: Batch
    arrays: list[torch.Tensor | None]
    rows: dict[int, torch.Tensor]
    shared: dict[int, torch.Tensor]
    keeps: bool
    versions: dict[int, int] = field(default_factory=dict)
    layouts: list[Layout] = field(default_factory=list)
    requires_grad: list[bool] = field(default_factory=list)
    nest: Nest | None = None
    noted: PassWrites | None = None
    graphs: list[Leaf] = field(default_factory=list)
    kept: dict[int, KeptGraph] = field(default_factory=dict)
    captures: Captures[Any] | None = None
    shapes: list[Shape[Any]] = field(default_factory=list)
    seconds: float = 0.0
    used: list[bool] | None = None
    records: bool = False
    before: dict[int, torch.Tensor] = field(default_factory=dict)
    may_repeat: bool = False
    merged: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    aliases: Aliases = field(default_factory=dict)
    apart: list[Apart] = field(default_factory=list)

    @classmethod
    def of(cls, batch: Batch, values: object, *, keeps: bool) -> ForwardPass:
        """A pass on a batch that was made of `values`. `keeps`: gradients are recorded."""
        arrays: list[torch.Tensor | None] = []
        rows: dict[int, torch.Tensor] = {}
        shared: dict[int, torch.Tensor] = {}
        for place, leaf in enumerate(pytree.tree_leaves(values)):
            tensor = leaf if isinstance(leaf, torch.Tensor) else None
            wanted = keeps and tensor is not None and tensor.requires_grad
            if batch.structure.nest.is_hole(place):
                if wanted:
                    rows[len(arrays)] = leaf
                arrays.append(tensor)
            elif wanted:
                shared[place] = leaf
        return cls(batch, arrays, rows, shared, keeps, records=keeps)

    def find_inner(self) -> None:
        """Find in a replica's graph which outputs are computed from others."""
        judged, outputs = self.batch.structure.judged, self.kept[0].outputs
        if len(outputs) > 1 and judged is not None:
            if judged.inner is None and not self.kept[0].captured:
                judged.inner = inner_of(outputs)
            self.inner = judged.inner or Inner()

    def note_merged(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note the merged outputs. Those whose parts retain their gradients do so too."""
        self.merged = [weakref.ref(tensor) for tensor in tensors]
        for at, tensor in enumerate(tensors):
            parts = [kept.outputs[at] for kept in self.kept.values()]
            if tensor.requires_grad and any(part.retains_grad for part in parts):
                tensor.retain_grad()

    def retained(self, gradients: Sequence[torch.Tensor | None], cut: Collection[int]) -> list[int]:
        """As `activations.retained`, in a backward pass from these gradients. `cut` as in `BackwardPass`."""
        starts = self.inner.starts - set(cut)
        users = ((at, self.merged[at]()) for at in starts)
        found = retained({at: one for at, one in users if one is not None}, starts, gradients)
        if found:
            self.note_watched()
        return found

    def note_watched(self) -> None:
        """Note that a gradient by an output is wanted from which others are computed.

        Raises:
            NotImplementedError: the pass was captured.
        """
        judged = self.batch.structure.judged
        if judged is not None:
            judged.watched = True
        if self.kept[0].captured:
            raise NotImplementedError(
                "A gradient by an output from which the module has computed another one (retain_grad(), a hook, "
                "torch.autograd.grad), after a pass that was captured and kept no graph between the two. Later passes "
                "are not captured: run the step again, or use fastdp.wrap(module, compile=None)."
            )

    @property
    def written(self) -> frozenset[int]:
        """The arrays that forward changes in place, by their numbers."""
        judged = self.batch.structure.judged
        return frozenset() if judged is None else judged.written

    def own_argument(self, number: int, batch: Sequence[Any], context: Context) -> torch.Tensor:
        """A replica's rows of an array that forward changes in place, in the user's own memory."""
        structure = self.batch.structure
        layout = structure.layouts[number] if structure.layouts else ROWS_FIRST
        given = self.arrays[number]
        if given is None:
            return rows_back(as_tensor(batch[number], structure.nest.dtypes[number]), layout)
        # With a version of its own: it must not count what other replicas do to their rows.
        return own_part(given.data, layout, context.rows)

    def leaves(self, batch: Sequence[Any], context: Context) -> GivenLeaves:
        """What a replica's module gets."""
        structure = context.structure
        nest, on_host = structure.nest, context.device is not None and not context.device.on_gpu
        layouts = structure.layouts or [ROWS_FIRST] * len(batch)
        tensors: list[torch.Tensor] = []
        arrays = zip(batch, nest.dtypes, self.arrays, layouts, strict=True)
        for number, (array, name, given, layout) in enumerate(arrays):
            if given is not None and on_host and number in self.written:
                tensors.append(self.own_argument(number, batch, context))
            elif given is not None and on_host:  # the user's own: torch notices if it is changed before backward
                tensors.append(own_part(given.detach(), layout, context.rows))
            else:
                tensors.append(rows_back(as_tensor(array, name), layout))
        for at in self.rows:
            tensors[at] = tensors[at].detach().requires_grad_()
        others = {
            place: tensor.detach().to(context.torch_device).requires_grad_() for place, tensor in self.shared.items()
        }
        nest = nest.replaced(others) if on_host else nest.replaced(others).on(context.torch_device)
        every = [*tensors, *(leaf for leaf in nest.leaves if isinstance(leaf, torch.Tensor))]
        return GivenLeaves(every, [tensors[at] for at in self.rows], list(others.values()))

    @property
    def differentiated(self) -> tuple[int, ...]:
        """The numbers of the tensors whose gradients are wanted, as `Structure.differentiated`."""
        leaves = self.batch.structure.nest.leaves
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        return *self.rows, *(len(self.arrays) + tensors.index(place) for place in self.shared)

    def ended(self, gradients: Sequence[torch.Tensor | None], seconds: float) -> None:
        """Note a backward pass from these gradients by the outputs, which has taken so long."""
        captures: Any = self.captures
        if captures is None:
            return
        captures.note(self.seconds + seconds, self.shapes)
        self.shapes = []  # a pass counts once
        used = [one is not None and wants for one, wants in zip(gradients, self.requires_grad, strict=True)]
        if self.used is not None and used != self.used:
            captures.note_used(self.batch.structure, used)

    def check_written(self) -> None:
        """Check before backward that arrays which forward has changed in place are as it has left them, and outputs
        that share memory on one device.

        Raises:
            RuntimeError: one is not.
        """
        check_apart(self.apart)
        for number, version in self.versions.items():
            given = self.arrays[number]
            if given is not None and given._version != version:
                raise RuntimeError(
                    "A tensor that forward has changed in place was changed again before backward, which may need its "
                    f"values: an argument of shape {tuple(given.shape)}. Run backward first, or pass a clone."
                )

    @property
    def row_layouts(self) -> list[Layout]:
        """The layouts of the tensors in `rows`."""
        layouts = self.batch.structure.layouts
        return [layouts[at] if layouts else ROWS_FIRST for at in self.rows]

    @property
    def normalizes_by_replica(self) -> bool:
        """Whether batch normalization has used moments of the batch."""
        return bool(self.kept[0].running.normalized) or self.kept[0].normalizes

    @property
    def given(self) -> list[torch.Tensor]:
        """The tensors whose gradients are wanted: those with rows, then the shared ones."""
        return [*self.rows.values(), *self.shared.values()]


@dataclass(slots=True)
class BackwardPass:
    """A backward pass through a forward pass.

    Args:
        gradients: of the loss by the merged outputs; None where it does not depend on one.
        retain: keep the graphs for another backward pass.
        retained: the outputs whose gradients are wanted, by number.
        cut: the outputs whose gradients have in them what comes through the module, by number.
    """

    forward: ForwardPass
    gradients: Sequence[torch.Tensor | None]
    retain: bool
    retained: Sequence[int] = ()
    cut: Collection[int] = ()


@dataclass(slots=True)
class BackwardNotes:
    """What a replica tells of a backward pass: what has a gradient, those of shared inputs and of retained outputs."""

    found: Found
    rows: list[bool]
    shared: list[torch.Tensor | None]
    writes: WriteNotes
    half: HalfGradients | None = None
    retained: list[torch.Tensor | None] = field(default_factory=list)
