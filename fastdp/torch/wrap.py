"""Wraps torch modules: the torch side of `fastdp.wrap`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdp.comm.processes import launched
from fastdp.options import Options
from fastdp.runtime.shards import resolve_devices
from fastdp.torch.augment import set_augmentation
from fastdp.torch.checks import check_module
from fastdp.torch.parallel_module import TorchParallel


def wrap_torch(module: nn.Module, gpus: Any, options: Options) -> TorchParallel:
    """`fastdp.wrap` for a torch.nn.Module, with the same arguments.

    Returns:
        A `TorchParallel` that trains `module` in place.

    Raises:
        TypeError: `module` is not a torch.nn.Module, or `augment` cannot be called.
        ValueError: invalid `gpus`, a module that cannot be replicated, or an option for Keras models.

    Example:
        >>> dp = wrap_torch(module, 8, Options())  # doctest: +SKIP
    """
    if isinstance(module, TorchParallel):
        raise ValueError("`model` is parallel already. Wrap its module: model.module")
    check_module(module)
    devices, options = resolve_devices(gpus, options, process=launched())
    parallel = TorchParallel(module, devices, options)
    set_augmentation(module, options.augment)
    return parallel
