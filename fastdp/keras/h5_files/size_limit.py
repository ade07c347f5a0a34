"""Keeps a model's configuration from a file from filling the memory: a layer may declare any number of units."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RATIO = 16
FREE_NBYTES = 1 << 28
ITEM_NBYTES = 4


class SizesBounded(TorchDispatchMode):
    """A context in which this thread makes new tensors of a bounded size, all together.

    Args:
        path: the file, for the message.
        nbytes: the size of the arrays in the file. Tensors may be 16 times as large, plus 256 MiB: initializers make
            several of each, and layers have constants.

    Raises:
        ValueError: a tensor would exceed that, before it is made.
    """

    def __init__(self, path: str, nbytes: int) -> None:
        super().__init__()
        self._path, self._nbytes = path, nbytes
        self._left = RATIO * nbytes + FREE_NBYTES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the sizes that an operation without tensors is given: it makes a new one."""
        kwargs = kwargs or {}
        everything = [*args, *kwargs.values()]
        makes = not any(isinstance(one, torch.Tensor) for one in everything)
        if makes and torch.device(kwargs.get("device") or "cpu").type != "meta":
            sizes = [one for one in everything if isinstance(one, (list, tuple)) and all(type(n) is int for n in one)]
            numbers = [one for one in args if type(one) is int]
            self._left -= ITEM_NBYTES * max([math.prod(one) for one in [*sizes, numbers] if one], default=0)
            if self._left < 0:
                raise ValueError(
                    f"`filepath` must describe a model of the size of its weights, got {self._path!r} with "
                    f"{self._nbytes:,} bytes of weights and a far larger model: the file is damaged, or it is made to "
                    "fill the memory"
                )
        return func(*args, **kwargs)
