"""Torch functions that draw inside, such as attention and recurrent layers with dropout, on replicas."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdp.program.torch.random.drawn import PARAMETERS, drawn, is_known
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
    """

    def __init__(self, running: ReplicaContext, function: Any, axis: int) -> None:
        super().__init__()
        self._running, self._function, self._axis = running, function, axis

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
        size = target.shape[self._axis] if target.ndim > self._axis else 0
        if not is_known(running) and (not size or size % running.rows.count):
            raise NotImplementedError(
                f"{self._function.__name__} draws random numbers of shape {tuple(target.shape)}, in which axis "
                f"{self._axis} does not have the {running.rows.count} rows of this device. Give it a batch with its "
                "rows there, or use gpus=[0]."
            )
        return target.copy_(drawn(running, name, numbers, target, fill, self._axis))


def inside(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> Any:
    """Run a function that draws inside."""
    on_gpu = any(isinstance(one, torch.Tensor) and one.is_cuda for one in (*args, *kwargs.values()))
    if on_gpu or not draws_in_call(function, args, kwargs):  # fused kernels draw from each GPU's own generator
        return function(*args, **kwargs)
    axis = 0
    if function in RNNS:
        if args[0].ndim != 3:
            raise NotImplementedError(
                "A recurrent layer with dropout between its layers gets a packed sequence, whose entries belong to "
                "rows in no fixed order, so its masks cannot be those of one device. Set its dropout to 0 and use "
                "nn.Dropout between single layers on padded sequences, or use gpus=[0]."
            )
        axis = 1  # inside, recurrent layers have time first
    with _SharesDraws(running, function, axis):
        return function(*args, **kwargs)
