"""Runs a torch module on a few rows of a batch, on copies of its own, without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.fast_paths import FAST_PATHS
from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.following.copies import replicate
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.following.writes import Place, Written, writes_of
from fastdp.program.torch.module import Slot, slots_of
from fastdp.program.torch.random.checkpoints import REPEATED_DRAWS
from fastdp.program.torch.replica import ReplicaContext, backward
from fastdp.program.torch.rows.decisions import Decisions, Site
from fastdp.program.torch.rows.draws import CannotSplitError, TrialDraws
from fastdp.program.torch.rows.hidden import check_leaves
from fastdp.program.torch.rows.inputs import Change, Injected, TrialInputs
from fastdp.program.torch.rows.surroundings import HANDLERS, TrialPeers, Watch, undisturbed
from fastdp.program.torch.shared_draws import DrawPlace
from fastdp.shard import Rows
from fastdp.tensors import pytree
from fastdp.tensors.arrays import settle
from fastdp.tensors.collectives import peers_scope
from fastdp.tensors.function_mode import ReplicaMode

# Gives the tensors among the outputs for some rows from which backward begins, with gradients.
Roots = Callable[[Any, Rows], Sequence[tuple[torch.Tensor, torch.Tensor]]]


# Goes on with a run: gets the replica, what the module and the loss function are given, and the module's outputs.
Then = Callable[[ReplicaContext, Any, Any], None]


@dataclass(slots=True)
class Run:
    """What a module did with some rows.

    Attributes:
        outputs: its outputs, as it returned them.
        values: its parameters and buffers afterwards.
        replaced: in whose place forward has put another tensor, by their numbers.
        written: what it wrote to attributes and containers.
        guard: of the copy that ran.
        module: this copy.
    """

    outputs: Any
    values: list[torch.Tensor]
    replaced: set[int]
    written: dict[Place, Written]
    guard: Guard
    module: nn.Module

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that it gave: outputs and what it wrote."""
        leaves = [*pytree.tree_leaves(self.outputs), *(leaf for one in self.written.values() for leaf in one.leaves)]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@dataclass(slots=True)
class Differentiated:
    """The gradients of a run: of the parameters that have one, by name, and of the wanted arrays."""

    parameters: dict[str, torch.Tensor]
    inputs: list[torch.Tensor | None]


class Trial:
    """Runs of a module on some rows of a batch, and on parts of them. All of them must be run first.

    Args:
        module: the user's own. It is not changed.
        batch: the global batch.
        chosen: the rows, by their numbers in the batch.
        wanted: the arrays that require gradients, by their places.
        noise: the size of random numbers that are added to the parameters, so that none of them is zero, relative to
            their spread or to one.
        change: makes other values of the arrays.
        on_host: run in host memory, where a number that an index must not have is an error and not the end of a GPU.
        is_wide: run in double precision, outside of autocast.
        weighs: weigh losses in forward by what counts in all rows (`weighed_losses`).

    Random draws and the results of collectives are those of the run on all
    rows. Batch normalization uses its running
    statistics, or leaves its input as it is.

    Attributes:
        slots: the module's parameters and buffers.
        inputs: the rows.
        is_noisy: whether random numbers are added to the parameters.
        wanted: as given.
        rows: how many.
        compared: the numbers that the module has compared tensors with.
        is_coarse: whether something was computed in single or half precision.
        has_losses: whether forward has called losses that can be weighed.
        watch: of the run that `then` goes on with.
        decisions: of the latest run.
        written: the inputs that forward has changed in place, by their places among the leaves of the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Batch,
        chosen: Sequence[int],
        wanted: Sequence[int] = (),
        *,
        noise: float = 0.0,
        change: Change | None = None,
        on_host: bool = False,
        is_wide: bool = False,
        weighs: bool = False,
    ) -> None:
        self._module, self._batch, self._chosen, self.rows = module, batch, chosen, len(chosen)
        self.wanted, self._noise, self._is_wide = wanted, noise, is_wide
        change = _widened if is_wide and change is None else change
        self.inputs = TrialInputs(batch, list(chosen), change)
        self.compared: set[float] = set()
        self.written: set[int] = set()
        self.is_coarse = False
        self.watch: Watch | None = None
        self.is_noisy = noise > 0.0
        self._injected = change if isinstance(change, Injected) else None
        self.slots = slots_of(module)
        self._contents = Contents(module, [slot.tensor for slot in self.slots])
        self._draws = TrialDraws()
        self._met: list[torch.Tensor] = []
        self._aligned: list[bool] = []
        self._weighs, self._counts = weighs, list[float]()
        self.has_losses = False
        self.decisions = Decisions()
        settle(slot.tensor for slot in self.slots)
        self._where = str(self.slots[0].tensor.device) if self.slots and not on_host else "cpu"

    @property
    def is_rough(self) -> bool:
        """Whether it runs under autocast."""
        return bool(self._batch.structure.autocast.enabled)

    @property
    def meets(self) -> bool:
        """Whether the module has called collectives."""
        return bool(self._met)

    @property
    def draw_places(self) -> dict[int, DrawPlace]:
        """Where the rows are in the draws of the runs, by number."""
        return self._draws.found

    def after(self, run: Run, drawn: Trial | None = None) -> Trial:
        """A trial on the same rows of the copy that has run, as it was left.

        `drawn`: one whose draws and results of collectives it repeats.
        """
        later = Trial(run.module, self._batch, self._chosen, self.wanted, weighs=self._weighs)
        if drawn is not None:
            later._draws, later._met, later._aligned = drawn._draws, drawn._met, drawn._aligned
            later._counts = drawn._counts
        return later

    def names_of(self, run: Run) -> set[str]:
        """The names of the tensors that a run has put somewhere, of a trial that goes on after it."""
        put = {id(leaf) for written in run.written.values() for leaf in written.leaves}
        return {name for name, tensor in self._contents.tensors if id(tensor) in put}

    def held(self, rows: int) -> list[str]:
        """The names of tensors of the module, other than parameters, that have an axis of this length."""
        buffers = ((slot.name, slot.tensor) for slot in self.slots if not slot.is_parameter)
        return [name for name, one in (*self._contents.tensors, *buffers) if rows in one.shape]

    def run(self, start: int, stop: int, *, times: int = 1, then: Then | None = None, other: Site | None = None) -> Run:
        """Run the module on rows `[start, stop)` of the chosen ones, so many times one after the other.

        `then` goes on with what the module was given and its outputs.
        `other`: where it decides otherwise than it does.
        """
        rows = Rows(start, stop, self.rows)
        self.decisions = Decisions(other)
        replica, copied = replicate(self._module, self.slots, self._fresh(), self._contents)
        held = [(slot, slot.tensor) for slot in slots_of(replica.module)]
        for _ in range(times):
            outputs = self._pass(replica.module, rows, then)
        values = [slot.tensor.detach() for slot in slots_of(replica.module)]
        replaced = {at for at, (slot, tensor) in enumerate(held) if slot.table.get(slot.key) is not tensor}
        run = Run(outputs, values, replaced, writes_of(copied.guard), copied.guard, replica.module)
        check_leaves(run.tensors(), copied.guard.contents.tensors)
        return run

    def differentiate(self, start: int, stop: int, roots_of: Roots, sizes: Sequence[float]) -> list[Differentiated]:
        """Run forward on rows `[start, stop)` of the chosen ones, and backward for each of some sizes.

        Args:
            roots_of: gives the tensors among the outputs for these rows from which backward begins, with gradients.
            sizes: what these gradients are multiplied by.
        """
        rows = Rows(start, stop, self.rows)
        replica, _ = replicate(self._module, self.slots, self._fresh(), self._contents)
        found: list[Differentiated] = []

        def differentiate(running: ReplicaContext, nest: Any, outputs: Any) -> None:
            given = [
                leaf for leaf in pytree.tree_leaves(nest[:2]) if isinstance(leaf, torch.Tensor) and leaf.requires_grad
            ]
            roots = roots_of(outputs, rows)
            for size in sizes:
                for one in (*replica.parameters, *given):
                    one.grad = None
                seeds = [seed * size for _, seed in roots]
                backward(running, [root for root, _ in roots], seeds, retain=size != sizes[-1])
                named = ((name, one.grad) for name, one in replica.module.named_parameters())
                kept = {name: grad for name, grad in named if grad is not None and not grad.is_sparse}
                found.append(Differentiated(kept, [leaf.grad for leaf in given]))

        self._pass(replica.module, rows, differentiate)
        return found

    def _pass(self, module: nn.Module, rows: Rows, then: Then | None) -> Any:
        """The outputs of a copy for some rows. All passes draw the same random numbers."""
        structure: Structure = self._batch.structure
        own = Structure(structure.nest, draws=self._draws, _seed=1)
        running = ReplicaContext(
            Context(0, rows, 0, Rendezvous(1, 1.0), 2, Batch([], own, self.rows), own), rows, weighs=self._weighs
        )
        sought = self._injected.number if self._injected is not None else None
        wanted, generators = self.wanted if torch.is_grad_enabled() else (), self._contents.generators
        with (
            self._draws.run(rows, generators),
            undisturbed(),
            REPEATED_DRAWS,
            Watch(self.slots, self.compared, sought, decisions=self.decisions, seeks_coarse=self._is_wide) as watch,
        ):
            args, kwargs, _ = given = self.inputs.of(rows, self._where, wanted)
            versions, leaves = _versions(given), pytree.tree_leaves(given)
            among = TrialPeers(self._met, rows, self._aligned, self._counts)
            with peers_scope(among), FAST_PATHS, ReplicaMode(running, HANDLERS):
                with nullcontext() if self._is_wide else structure.entered():
                    outputs = module(*args, **kwargs)
                _check_not_filled(leaves, given)
                if then is not None:
                    self.watch = watch
                    then(running, given, outputs)
            _check_statistics(running, module)
            self.written |= {place for place, now in _versions(given).items() if now != versions[place]}
        self.is_coarse = self.is_coarse or watch.is_coarse
        self.has_losses = self.has_losses or running.has_losses
        if self._injected is not None and watch.found:
            self._injected.is_met = True
        return outputs

    def _fresh(self) -> list[torch.Tensor]:
        """The values of the parameters and buffers, in memory of the run."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for slot in self.slots:
            value = slot.tensor.detach().clone().to(self._where)
            value = _widened(value) if self._is_wide else value
            if self._noise and _is_trained(slot):
                spread = value.float().std() if value.numel() > 1 else value.new_zeros(())
                size = self._noise * torch.where(spread > 0, spread, 1.0).to(value.dtype)
                value += size * torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            found.append(value)
        return found


def _check_statistics(running: ReplicaContext, module: nn.Module) -> None:
    """Check that running statistics of batch normalization are buffers of the module, which are merged.

    Raises:
        CannotSplitError: they are not.
    """
    known = {id(slot.tensor) for slot in slots_of(module)}
    if any(id(call.mean) not in known for call in running.normalized):
        raise CannotSplitError(
            "Batch normalization in forward has running statistics that are no buffers of the module: those of a layer "
            "in a plain list or outside of the module, or tensors of its own. On several devices each would be moved "
            "by its own rows. Register the layer (nn.ModuleList, an attribute) or the statistics (register_buffer), "
            "call eval() on the layer, or use gpus=[0]."
        )


def _check_not_filled(before: list[Any], given: Any) -> None:
    """Check that forward has put nothing into the lists and dicts that it is given.

    Raises:
        CannotSplitError: it has.
    """
    known = {id(leaf) for leaf in before}
    for path, leaf in pytree.tree_leaves_with_path(given):
        if id(leaf) not in known:
            kind = "keyword " if isinstance(path[1], pytree.MappingKey) else ""
            raise CannotSplitError(
                f"forward puts a {type(leaf).__name__} into an argument, at {pytree.keystr(path[1:])} of its "
                f"{kind}arguments: on several devices each has lists and dicts of its own, and yours would stay as "
                "they are. Return it from forward, put it into a copy (dict(d)), or use gpus=[0]."
            )


def _widened(tensor: torch.Tensor, place: int | None = None) -> torch.Tensor:
    """A tensor in double precision, if it has real floating-point numbers."""
    return tensor.double() if tensor.is_floating_point() else tensor


def _versions(nest: Any) -> dict[int, int]:
    """How often each tensor of a nest was changed, by its place among the leaves."""
    leaves = enumerate(pytree.tree_leaves(nest))
    return {i: leaf._version for i, leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()}


def _is_trained(slot: Slot) -> bool:
    return slot.is_parameter and slot.tensor.is_floating_point()
