"""Lets replicas take torch's fast paths of attention in evaluation, as plain torch does, all of them or none.

Torch leaves them where a function mode is active, since a mode would not see their operations. The results are other
ones: with a padding mask `nn.TransformerEncoder` gives zeros for what is padding, and numbers otherwise. It takes the
fast path if the padding of all rows is at their ends, which replicas have to ask each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode

from fastdp.errors import NotCapturable
from fastdp.patching import Patch
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.function_mode import Handler, ReplicaMode

_PLAIN = (torch.Tensor, Parameter, FakeTensor, FunctionalTensor, type(None))


def _but_for_replicas(has: Callable[[Iterable[Any]], bool]) -> Callable[[Iterable[Any]], bool]:
    """Torch's function, for which the mode of replicas is none."""

    def called(relevant: Iterable[Any]) -> bool:
        found = has(relevant)
        if not found or not isinstance(_get_current_function_mode(), ReplicaMode):
            return found
        return any(type(one) not in _PLAIN for one in relevant)

    return called


def _all_aligned(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> bool:
    """Whether the padding of all rows of the batch is at their ends."""
    own = bool(function(*args, **kwargs))
    if running.rows.count == running.rows.total:
        return own
    if running.traced:
        raise NotCapturable("nn.TransformerEncoder with a padding mask: devices ask each other where padding is")
    return all(running.context.exchange(own, "the padding of a batch"))


ALIGNED = torch._nested_tensor_from_mask_left_aligned
HANDLERS: dict[Any, Handler] = {ALIGNED: _all_aligned}
# Held while replicas run their passes.
FAST_PATHS = Patch([(torch.overrides, "has_torch_function", _but_for_replicas)])
