"""The autocast of one thread, entered again by others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Autocast:
    """The calling thread's autocast on the CPU, which is thread-local: to be entered again by the workers."""

    enabled: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def current(cls) -> Autocast:
        """That of this thread."""
        return cls(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())

    def enter(self) -> AbstractContextManager[Any]:
        """A context manager that is the same autocast on another thread, where it is off."""
        if not self.enabled:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache)
