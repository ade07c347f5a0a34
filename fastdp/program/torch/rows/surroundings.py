"""What surrounds a run of a trial: collectives of all rows, generators that stay, and what is refused."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastdp.program.torch import embeddings, weighed_losses
from fastdp.program.torch import gradients as torch_gradients
from fastdp.program.torch.fast_paths import ALIGNED
from fastdp.program.torch.module import Slot
from fastdp.program.torch.random import handlers as random_handlers
from fastdp.program.torch.replica import Normalized, ReplicaContext
from fastdp.program.torch.rows.decisions import Decisions
from fastdp.program.torch.rows.draws import CannotSplitError
from fastdp.program.torch.weighed_losses import Totals
from fastdp.shard import Rows
from fastdp.tensors.collectives import peers
from fastdp.tensors.compiled import uncompiled
from fastdp.tensors.function_mode import Handler


class Watch(TorchFunctionMode):
    """Watches a run: a copy of a module must not use the module's own tensors, and compares with numbers that matter.

    Args:
        slots: the module's parameters and buffers.
        compared: gets the numbers that tensors are compared with, or that a loss ignores.
        sought: a number.
        seeks_coarse: look at the precision of results.
        decisions: notes what is decided by numbers.

    Attributes:
        is_paused: look at nothing.
        is_coarse: whether a result has single or half precision.
        found: whether a tensor in which the sought number is was compared with a number, or is the target of a loss.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        compared: set[float],
        sought: float | None = None,
        *,
        decisions: Decisions,
        seeks_coarse: bool = False,
    ) -> None:
        super().__init__()
        self._seeks_coarse, self.is_coarse, self.is_paused = seeks_coarse, False, False
        self._names = {id(slot.tensor): slot.name for slot in slots}
        self._compared, self._sought = compared, sought
        self._decisions = decisions
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self._names:
                raise CannotSplitError(
                    f"A function of the module reaches `{self._names[id(leaf)]}` past the module that it runs in: a "
                    "forward that was decorated or replaced, or another function that keeps the module itself. On "
                    "several devices each replica runs a copy, which such a function does not know. Make it a method "
                    "that uses `self`, or use gpus=[0]."
                )
        if func in _HOOKING and isinstance(args[0], torch.nn.Parameter):
            raise CannotSplitError(
                f"forward calls {func.__name__} on a parameter. On several devices the hook would get each device's "
                "part of the gradient, and there would be one more after each call. Register it once, outside of "
                "forward, where it gets the gradient of the whole batch; or use gpus=[0]."
            )
        name = getattr(func, "__name__", "").strip("_")
        if name in _COMPARISONS or name in _LOSSES:
            self._note(args, kwargs, name)
        if name in _ORDER and not kwargs:
            return self._decisions.compared(func, args)
        if func is torch.Tensor.item:
            return self._decisions.read(func, args)
        result = func(*args, **kwargs)
        if self._seeks_coarse and isinstance(result, torch.Tensor) and result.is_floating_point():
            self.is_coarse = self.is_coarse or result.dtype.itemsize < 8
        return result

    def _note(self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> None:
        """Note what is compared."""
        given = [kwargs.get("ignore_index", -100)] if name in _LOSSES else args
        numbers = [one for one in given if type(one) in (int, float)]
        self._compared.update(numbers)
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        if numbers and self._sought is not None and not self.found:
            self.found = any(bool((one == self._sought).any()) for one in tensors if not one.is_floating_point())


_HOOKING = frozenset((torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook))
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_ORDER = frozenset(("lt", "le", "gt", "ge"))
_LOSSES = frozenset(("cross_entropy", "nll_loss"))


class TrialPeers(Totals):
    """The collectives of a run: the parts of the rows get what all rows gave."""

    def __init__(self, results: list[torch.Tensor], rows: Rows, aligned: list[bool], counts: list[float]) -> None:
        super().__init__(counts, is_whole=rows.count == rows.total)
        self._results, self._rows = results, rows
        self._number = 0
        self._aligned, self._asked = aligned, 0

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

    def all_aligned(self, own: bool) -> bool:
        """Where the padding was in the run on all rows."""
        if self.count == 1:
            self._aligned.append(own)
        self._asked += 1
        return self._aligned[self._asked - 1] if self._asked <= len(self._aligned) else own

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
        if mean is not None and variance is not None:
            running.normalized.append(Normalized(mean, variance, 0.0, None))
        given["running_mean"] = x.new_zeros(x.shape[1]) if mean is None else mean
        given["running_var"] = x.new_ones(x.shape[1]) if variance is None else variance
        given["training"] = False
    found: torch.Tensor = function(**given)
    return found


def _all_aligned(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> bool:
    """As `fastdp.program.torch.fast_paths` asks of all rows."""
    own, among = bool(function(*args, **kwargs)), peers()
    return among.all_aligned(own) if isinstance(among, TrialPeers) else own


HANDLERS: dict[Any, Handler] = {
    ALIGNED: _all_aligned,
    **random_handlers.HANDLERS,
    **embeddings.HANDLERS,
    **torch_gradients.HANDLERS,
    **weighed_losses.HANDLERS,
    F.batch_norm: _batch_norm,
}


def _host_states() -> tuple[Any, bytes]:
    """The states of Python's and NumPy's global generators."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002


@contextmanager
def _no_hooks_on_saved_tensors() -> Iterator[None]:
    """Keep the user's hooks from tensors that a trial saves."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        yield
        return
    with saved_tensors_hooks(_unchanged, _unchanged):
        yield


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def undisturbed() -> Iterator[None]:
    """Seed the global generators equally for each run, and restore them; suppress warnings and the user's hooks."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    drawn = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), _no_hooks_on_saved_tensors(), uncompiled():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)
            before = _host_states()
            yield
            after = _host_states()
        if before != after:
            name = "random" if before[0] != after[0] else "numpy.random"
            raise CannotSplitError(
                f"The module draws random numbers by {name} in forward. The replicas on several devices would each "
                "draw others. Draw by torch's functions, or use gpus=[0]."
            )
    finally:
        torch.set_rng_state(drawn)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
