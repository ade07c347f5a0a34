"""Wraps torch modules: the torch side of `fastdp.wrap`."""

from __future__ import annotations

from typing import Any

from fastdp.runtime.select import resolve
from fastdp.torch.checks import check_module
from fastdp.torch.parallel_module import TorchParallel


def wrap_torch(module: Any, gpus: Any = None, **options: Any) -> TorchParallel:
    """`fastdp.wrap` for a torch.nn.Module. Arguments as there.

    Returns:
        A `TorchParallel` that trains `module` in place.

    Raises:
        TypeError: `module` is no torch.nn.Module.
        ValueError: anything wrong with `gpus`, or a module that cannot be replicated.

    Example:
        >>> dp = wrap_torch(module, gpus=8)  # doctest: +SKIP
    """
    if isinstance(module, TorchParallel):
        raise ValueError("`model` is parallel already. Wrap its module: model.module")
    check_module(module)
    return TorchParallel(module, resolve(gpus), **options)
