"""The autocast of one thread, entered again by others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Autocast:
    """The calling thread's CPU autocast. It is thread-local, so workers must enter it again."""

    enabled: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def current(cls) -> Autocast:
        """The autocast of this thread."""
        return cls(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())

    def enter(self) -> AbstractContextManager[Any]:
        """A context manager that applies the same autocast on another thread, where it is off."""
        if not self.enabled:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache)
