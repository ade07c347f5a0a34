"""Knows the name of the generator behind non-reentrant checkpoints, which is another since torch 2.14.

The generator runs to its `yield` before a part of a model runs in forward, and to its end afterwards. Until torch 2.13
`checkpoint` calls it by the name of `_EARLIER`, with `preserve_rng_state` second; since then by that of `_LATER`, with
`preserve_rng_state` by name, and the earlier name is kept for callers outside of torch. A replacement of the earlier
one would not be called there, and parts would draw anew in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

_EARLIER = "_checkpoint_without_reentrant_generator"
_LATER = "_checkpoint_without_reentrant_generator_impl"


def checkpoint_place(replacement_of: Callable[[Any], Any]) -> tuple[Any, str, Callable[[Any], Any]]:
    """Owner, name and replacement of the generator that this torch's `checkpoint` calls, for a `Patch`.

    Args:
        replacement_of: gets the original and returns its replacement; both are called with the part's function, whether
            to preserve the state of random generators, and further arguments that are passed on as they are.
    """
    if not hasattr(checkpoint, _LATER):
        return checkpoint, _EARLIER, replacement_of
    return checkpoint, _LATER, lambda original: _by_name(replacement_of, original)


def _by_name(replacement_of: Callable[[Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement, which takes `preserve_rng_state` in the second place, called as torch 2.14 and later do."""

    def by_place(function: Callable[..., Any], preserve: bool, *args: Any, **kwargs: Any) -> Any:
        return original(function, *args, preserve_rng_state=preserve, **kwargs)

    replacement = replacement_of(by_place)

    def generator(function: Callable[..., Any], *args: Any, preserve_rng_state: bool = True, **kwargs: Any) -> Any:
        return replacement(function, preserve_rng_state, *args, **kwargs)

    return generator
