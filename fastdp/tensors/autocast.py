"""The autocast of one thread, entered again by others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_KINDS = ("cpu", "cuda")  # of the devices that replicas run on


@dataclass(frozen=True, slots=True)
class Autocast:
    """The calling thread's autocast. It is thread-local, so workers must enter it again.

    Args:
        dtypes: the kinds of devices whose operations are cast, each with the dtype.
        cache: whether casts of weights are kept.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    cache: bool = True

    @classmethod
    def current(cls) -> Autocast:
        """The autocast of this thread."""
        found = tuple([(one, torch.get_autocast_dtype(one)) for one in _KINDS if torch.is_autocast_enabled(one)])
        return cls(found, torch.is_autocast_cache_enabled()) if found else _OFF

    @property
    def enabled(self) -> bool:
        """Whether any operations are cast."""
        return bool(self.dtypes)

    @property
    def has_half(self) -> bool:
        """Whether any operations are cast to float16."""
        return any(dtype == torch.float16 for _, dtype in self.dtypes)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Apply the same autocast on another thread, where it is off."""
        if not self.dtypes:
            yield
            return
        before = [(one, torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in _KINDS]
        kept = torch.is_autocast_cache_enabled()
        torch.autocast_increment_nesting()
        try:
            for kind, dtype in self.dtypes:
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(self.cache)
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            for kind, enabled, dtype in before:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(kept)


_OFF = Autocast()
