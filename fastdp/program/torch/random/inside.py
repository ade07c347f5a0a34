"""Torch functions that draw inside, such as attention and recurrent layers with dropout, on replicas."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdp.program.torch.random.drawn import PARAMETERS, drawn, is_known
from fastdp.program.torch.random.packed import PackedEntries
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.random_functions import RNNS, draws_in_call

_FILLS = frozenset(
    {"bernoulli_", "uniform_", "normal_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_"}
)


class _SharesDraws(TorchDispatchMode):
    """Shares the draws of all operations that a function consists of.

    Args:
        running: the replica.
        function: the function.
        axis: where its draws have the rows, if the length fits.
        packed: where the entries of its packed sequence are; None if its input is none.
    """

    def __init__(self, running: ReplicaContext, function: Any, axis: int, packed: PackedEntries | None = None) -> None:
        super().__init__()
        self._running, self._function, self._axis, self._packed = running, function, axis, packed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation inside the function."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name, running = func.overloadpacket.__name__, self._running
        if name == "rand":
            like, fill, numbers = func(*args, **{**kwargs, "device": "meta"}), torch.Tensor.uniform_, []
            target = torch.empty(like.shape, dtype=like.dtype)
        elif name in _FILLS and not any(isinstance(one, torch.Tensor) for one in args[1:]):
            target, *numbers = args
            fill = lambda whole: func(whole, *numbers)  # noqa: E731
        else:
            raise NotImplementedError(PARAMETERS.format(f"{self._function.__name__} ({name})"))
        if self._packed is not None:
            return target.copy_(self._packed.drawn(name, numbers, target, fill))
        size = target.shape[self._axis] if target.ndim > self._axis else 0
        if not is_known(running) and (not size or size % running.rows.count):
            raise NotImplementedError(
                f"{self._function.__name__} draws random numbers of shape {tuple(target.shape)}, in which axis "
                f"{self._axis} does not have the {running.rows.count} rows of this device. Give it a batch with its "
                "rows there, or use gpus=[0]."
            )
        return target.copy_(drawn(running, name, numbers, target, fill, self._axis))


def _is_packed(second: Any) -> bool:
    """Whether the second argument of a recurrent function is the number of entries of each step, and no state."""
    return isinstance(second, torch.Tensor) and second.dtype == torch.int64


def inside(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> Any:
    """Run a function that draws inside."""
    on_gpu = any(isinstance(one, torch.Tensor) and one.is_cuda for one in (*args, *kwargs.values()))
    if on_gpu or not draws_in_call(function, args, kwargs):  # fused kernels draw from each GPU's own generator
        return function(*args, **kwargs)
    axis, packed = 0, None
    if function in RNNS:
        axis = 1  # inside, recurrent layers have time first
        packed = PackedEntries(running, args[1]) if args[0].ndim == 2 and _is_packed(args[1]) else None
    with _SharesDraws(running, function, axis, packed):
        return function(*args, **kwargs)
