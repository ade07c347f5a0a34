"""Refuses derivatives in forward mode while several replicas run: torch has one state of them per process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from fastdp.program.keras.replica import running
from fastdp.tensors.forward_mode import WHY_REFUSED
from fastdp.tensors.row_effects import NotByRowsError


def refused_on_replicas(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that begins derivatives in forward mode. Torch counts their levels for all threads together."""

    @functools.wraps(original)
    def begin(*args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is not None and state.is_among_others:
            raise NotByRowsError(f"{WHY_REFUSED}; or use gpus=[0].")
        return original(*args, **kwargs)

    return begin


def changes() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """The owner, name and replacement of each function of torch that begins derivatives in forward mode."""
    yield forward_ad, "enter_dual_level", refused_on_replicas
    yield eager_transforms, "jvp_increment_nesting", refused_on_replicas
