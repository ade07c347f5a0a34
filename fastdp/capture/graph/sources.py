"""Frees the source text that torch.fx keeps of every graph module until the process ends."""

from __future__ import annotations

import linecache
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch.fx import graph_module

from fastdp.patching import Patch

_here = threading.local()  # `made`: the names of the sources of this thread's innermost block


class Sources(AbstractContextManager["Sources"]):
    """Collects the sources of the graph modules that this thread makes in the block, and frees them.

    Torch keeps the text of each module's code for tracebacks, and a lazy entry in `linecache`: some 20 KiB for a small
    traced step, for as long as the process lives. Sources of other threads are left alone. Those of the block go at its
    end, or with an owner that `belong_to` has named.
    """

    def __init__(self) -> None:
        self._made: list[str] = []
        self._outer: list[str] | None = None
        self._owned = False

    def belong_to(self, owner: Any) -> None:
        """Keep the block's sources, from its beginning to its end, for as long as `owner` lives."""
        self._owned = True
        weakref.finalize(owner, _free, self._made).atexit = False

    def __enter__(self) -> Sources:
        _noting.enter()
        self._outer = getattr(_here, "made", None)
        _here.made = self._made
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _here.made = self._outer
        _noting.leave()
        if not self._owned:
            _free(self._made)


def _free(names: Sequence[str]) -> None:
    """Free sources by the names of their files."""
    for name in names:
        graph_module._loader.eval_cache.pop(name, None)
        linecache.cache.pop(name, None)


def _noted(cache: Callable[..., str]) -> Callable[..., str]:
    """`cache` of torch's loader, which also notes the names that it gives. Those of other files are nobody's here."""

    def noting(loader: Any, src: str, globals: dict[str, Any], *given: Any, **named: Any) -> str:
        name = cache(loader, src, globals, *given, **named)
        made = getattr(_here, "made", None)
        if made is not None and name.startswith("<eval_with_key>"):
            made.append(name)
        return name

    return noting


_noting = Patch([(graph_module._EvalCacheLoader, "cache", _noted)])
