"""Runs a torch module on a few rows of a batch, on copies of its own, without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

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
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.draws import TrialDraws
from fastdp.program.torch.rows.hidden import check_leaves
from fastdp.program.torch.rows.inputs import Change, Injected, TrialInputs
from fastdp.program.torch.rows.surroundings import HANDLERS, TrialPeers, Watch, undisturbed
from fastdp.program.torch.shared_draws import DrawPlace
from fastdp.shard import Rows
from fastdp.tensors.arrays import settle
from fastdp.tensors.collectives import peers_scope
from fastdp.tensors.function_mode import ReplicaMode


@dataclass(slots=True)
class Run:
    """What a module did with some rows.

    Attributes:
        outputs: its outputs, as it returned them.
        values: its parameters and buffers afterwards.
        written: what it wrote to attributes and containers.
        guard: of the copy that ran.
    """

    outputs: Any
    values: list[torch.Tensor]
    written: dict[Place, Written]
    guard: Guard

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that it gave: outputs and what it wrote."""
        leaves = [*pytree.tree_leaves(self.outputs), *(leaf for one in self.written.values() for leaf in one.leaves)]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


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

    Random draws and the results of collectives are those of the run on all
    rows. Batch normalization uses its running
    statistics, or leaves its input as it is.

    Attributes:
        slots: the module's parameters and buffers.
        inputs: the rows.
        is_noisy: whether random numbers are added to the parameters.
        compared: the numbers that the module has compared tensors with.
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
    ) -> None:
        self._module, self._batch, self._total = module, batch, len(chosen)
        self._wanted, self._noise = wanted, noise
        self.inputs = TrialInputs(batch, list(chosen), change)
        self.compared: set[float] = set()
        self.written: set[int] = set()
        self.is_noisy = noise > 0.0
        self._injected = change if isinstance(change, Injected) else None
        self.slots = slots_of(module)
        self._contents = Contents(module, [slot.tensor for slot in self.slots])
        self._draws = TrialDraws()
        self._met: list[torch.Tensor] = []
        self._aligned: list[bool] = []
        settle(slot.tensor for slot in self.slots)
        self._where = str(self.slots[0].tensor.device) if self.slots and not on_host else "cpu"

    @property
    def meets(self) -> bool:
        """Whether the module has called collectives."""
        return bool(self._met)

    @property
    def draw_places(self) -> dict[int, DrawPlace]:
        """Where the rows are in the draws of the runs, by number."""
        return self._draws.found

    def run(self, start: int, stop: int, *, times: int = 1) -> Run:
        """Run the module on rows `[start, stop)` of the chosen ones, so many times one after the other."""
        rows = Rows(start, stop, self._total)
        replica, copied = replicate(self._module, self.slots, self._fresh(), self._contents)
        for _ in range(times):
            outputs = self._pass(replica.module, rows)
        values = [slot.tensor.detach() for slot in slots_of(replica.module)]
        run = Run(outputs, values, writes_of(copied.guard), copied.guard)
        check_leaves(run.tensors(), copied.guard.contents.tensors)
        return run

    def _pass(self, module: nn.Module, rows: Rows) -> Any:
        """The outputs of a copy for some rows. All passes draw the same random numbers."""
        structure: Structure = self._batch.structure
        own = Structure(structure.nest, draws=self._draws, _seed=1)
        running = ReplicaContext(Context(0, rows, 0, Rendezvous(1, 1.0), 2, Batch([], own, self._total), own), rows)
        sought = self._injected.number if self._injected is not None else None
        wanted, generators = self._wanted if torch.is_grad_enabled() else (), self._contents.generators
        with self._draws.run(rows, generators), undisturbed(), Watch(self.slots, self.compared, sought) as watch:
            args, kwargs, _ = given = self.inputs.of(rows, self._where, wanted)
            versions = _versions(given)
            among = TrialPeers(self._met, rows, self._aligned)
            with peers_scope(among), FAST_PATHS, ReplicaMode(running, HANDLERS), structure.entered():
                outputs = module(*args, **kwargs)
            self.written |= {place for place, now in _versions(given).items() if now != versions[place]}
        if self._injected is not None and watch.found:
            self._injected.is_met = True
        return outputs

    def _fresh(self) -> list[torch.Tensor]:
        """The values of the parameters and buffers, in memory of the run."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for slot in self.slots:
            value = slot.tensor.detach().clone().to(self._where)
            if self._noise and _is_trained(slot):
                spread = value.float().std() if value.numel() > 1 else value.new_zeros(())
                size = self._noise * torch.where(spread > 0, spread, 1.0).to(value.dtype)
                value += size * torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            found.append(value)
        return found


def _versions(nest: Any) -> dict[int, int]:
    """How often each tensor of a nest was changed, by its place among the leaves."""
    leaves = enumerate(pytree.tree_leaves(nest))
    return {i: leaf._version for i, leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()}


def _is_trained(slot: Slot) -> bool:
    return slot.is_parameter and slot.tensor.is_floating_point()
