"""Runs a torch module on a few rows of a batch, on copies of its own, without changing anything."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.torch import embeddings
from fastdp.program.torch import gradients as torch_gradients
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.module import Slot, replicate, slots_of
from fastdp.program.torch.random import handlers as random_handlers
from fastdp.program.torch.random.drawn import row_axis
from fastdp.program.torch.random.sampled import sampled
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.declared import rows_back
from fastdp.program.torch.rows.plain import is_torchs_hook
from fastdp.program.torch.shared_draws import SharedDraws
from fastdp.shard import Rows
from fastdp.tensors.arrays import as_tensor, settle
from fastdp.tensors.collectives import peers_scope
from fastdp.tensors.function_mode import Handler, ReplicaMode
from fastdp.tensors.row_effects import ROWS_FIRST


@dataclass(slots=True)
class Run:
    """What a module did with some rows.

    Attributes:
        outputs: its outputs, as it returned them.
        values: its parameters and buffers afterwards.
        numbers: the numbers that its parts have as attributes, by their dotted names.
    """

    outputs: Any
    values: list[torch.Tensor]
    numbers: dict[str, float]


class Trial:
    """Runs of a module on some rows of a batch, and on parts of them. All of them must be run first.

    Args:
        module: the user's own. It is not changed.
        batch: the global batch.
        chosen: the rows, by their numbers in the batch.
        wanted: the arrays that require gradients, by their places.
        noise: the size of random numbers that are added to the parameters, so that none of them is zero.

    Hooks that are not torch's own do not run. Random draws and the results of collectives are those of the run on all
    rows. Batch normalization uses its running
    statistics, or leaves its input as it is.

    Attributes:
        slots: the module's parameters and buffers.
    """

    def __init__(
        self, module: nn.Module, batch: Batch, chosen: Sequence[int], wanted: Sequence[int] = (), noise: float = 0.0
    ) -> None:
        self._module, self._batch, self._chosen, self._total = module, batch, list(chosen), len(chosen)
        self._wanted, self._noise = wanted, noise
        self.slots = slots_of(module)
        self._draws = _TrialDraws()
        self._met: list[torch.Tensor] = []
        settle(slot.tensor for slot in self.slots)
        self._where = str(self.slots[0].tensor.device) if self.slots else "cpu"

    @property
    def meets(self) -> bool:
        """Whether the module has called collectives."""
        return bool(self._met)

    def run(self, start: int, stop: int, *, times: int = 1) -> Run:
        """Run the module on rows `[start, stop)` of the chosen ones, so many times one after the other."""
        rows = Rows(start, stop, self._total)
        module = replicate(self._module, self.slots, self._fresh()).module
        _drop_users_hooks(module)
        structure: Structure = self._batch.structure
        own = Structure(structure.nest, draws=self._draws, _seed=1)
        running = ReplicaContext(Context(0, rows, 0, Rendezvous(1, 1.0), 2, Batch([], own, self._total), own), rows)
        self._draws.begin_run(running)
        with _undisturbed():
            for _ in range(times):
                args, kwargs, _ = structure.nest.on(self._where).pack(self._inputs(rows))
                among = _TrialPeers(self._met, rows)
                with peers_scope(among), ReplicaMode(running, _HANDLERS), structure.autocast.enter():
                    outputs = module(*args, **kwargs)
        return Run(outputs, [slot.tensor.detach() for slot in slots_of(module)], numbers_of(module))

    def _fresh(self) -> list[torch.Tensor]:
        """The values of the parameters and buffers, in memory of the run."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for slot in self.slots:
            value = slot.tensor.detach().clone()
            if self._noise and _is_trained(slot):
                value += self._noise * torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            found.append(value)
        return found

    def _inputs(self, rows: Rows) -> list[torch.Tensor]:
        """The rows of the batch's arrays, in memory of the run."""
        structure: Structure = self._batch.structure
        layouts = structure.layouts or [ROWS_FIRST] * len(self._batch)
        found = []
        for at, (array, name, layout) in enumerate(zip(self._batch, structure.nest.dtypes, layouts, strict=True)):
            part = array[self._chosen[rows.start : rows.stop]]  # a copy
            tensor = rows_back(as_tensor(part, name), layout).to(self._where)
            found.append(tensor.requires_grad_() if at in self._wanted and torch.is_grad_enabled() else tensor)
        return found


def _drop_users_hooks(module: nn.Module) -> None:
    """Remove the hooks that are not torch's own: they may note what they see."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not is_torchs_hook(hook)]:
                del hooks[key]


def numbers_of(module: nn.Module) -> dict[str, float]:
    """The numbers that a module's parts have as attributes, by their dotted names."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _is_trained(slot: Slot) -> bool:
    return slot.is_parameter and slot.tensor.is_floating_point()


class _TrialDraws(SharedDraws):
    """The draws of a trial: made in the run on all rows, and taken by the runs of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self._running: ReplicaContext | None = None
        self._made: dict[int, torch.Tensor] = {}

    def begin_run(self, running: ReplicaContext) -> None:
        """A run begins."""
        self._running = running

    def alone(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Make a draw for all rows."""
        assert self._running is not None
        self._made[self._running.draws] = found = draw()
        return found

    def made(self, number: int) -> torch.Tensor:
        """The draw of this number, for all rows.

        Raises:
            NotImplementedError: as in `take`.
        """
        if number not in self._made:
            raise NotImplementedError("The module makes other random draws for some rows than for others.")
        return self._made[number]

    def take(
        self, number: int, replicas: int, request: tuple[Any, ...], draw: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """A draw for all rows: the one that was made for them.

        Raises:
            NotImplementedError: the run on all rows has made no such draw. The step itself says what is wrong with it.
        """
        made, shape, axis = self.made(number), request[-3], request[-1]
        assert self._running is not None
        rows = self._running.rows
        if tuple(made.shape) == shape:
            return made
        # The length happens to be a multiple of the part's rows, but the draw is the same for all rows.
        per_row = shape[axis] // rows.total
        own = (*shape[:axis], per_row * rows.count, *shape[axis + 1 :])
        if tuple(made.shape) != own:
            raise NotImplementedError(f"The module draws {tuple(made.shape)} for all rows and {own} for some of them.")
        found = made.new_zeros(shape)
        found.narrow(axis, per_row * rows.start, per_row * rows.count).copy_(made)
        return found


class _TrialPeers:
    """The collectives of a run: the parts of the rows get what all rows gave."""

    def __init__(self, results: list[torch.Tensor], rows: Rows) -> None:
        self._results, self._rows = results, rows
        self._number = 0

    @property
    def rank(self) -> int:
        """The number of the part."""
        return 1 if self._rows.start else 0

    @property
    def count(self) -> int:
        """The number of parts."""
        return 1 if self._rows.count == self._rows.total else 2

    @property
    def rows(self) -> Rows:
        """The rows of the part."""
        return self._rows

    def all_reduce(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """The result of the run on all rows."""
        return self._result(tensor)

    def all_gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The result of the run on all rows."""
        return self._result(tensor)

    def _result(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.count == 1:
            self._results.append(tensor.detach().clone())
            return tensor
        if self._number >= len(self._results):
            raise RuntimeError("The module calls more collectives for some rows than for others.")
        self._number += 1
        return self._results[self._number - 1]


_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _batch_norm(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.batch_norm by running statistics."""
    given = dict(zip(_NAMES, args, strict=False)) | kwargs
    if given.get("training"):
        x, mean, variance = given["input"], given.get("running_mean"), given.get("running_var")
        given["running_mean"] = x.new_zeros(x.shape[1]) if mean is None else mean
        given["running_var"] = x.new_ones(x.shape[1]) if variance is None else variance
        given["training"] = False
    found: torch.Tensor = function(**given)
    return found


def _sampled(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Functions with parameters per row: a part of the rows gets its part of what all rows got."""
    rows, draws = running.rows, running.context.structure.draws
    given = [one for one in args if isinstance(one, torch.Tensor)]
    if rows.count == rows.total or not given:
        return sampled(running, function, args, kwargs)
    by_rows = any(row_axis(one.shape, rows) is not None for one in given)
    made = draws.made(running.next_draw())
    if not by_rows or made.shape[0] % rows.total:
        return made.clone()
    per_row = made.shape[0] // rows.total
    return made.narrow(0, per_row * rows.start, per_row * rows.count).clone()


_HANDLERS: dict[Any, Handler] = {
    **{one: _sampled if how is sampled else how for one, how in random_handlers.HANDLERS.items()},
    **embeddings.HANDLERS,
    **torch_gradients.HANDLERS,
    F.batch_norm: _batch_norm,
}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Seed the global generators equally for each run, and restore them; suppress warnings."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    drawn = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)
            yield
    finally:
        torch.set_rng_state(drawn)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
