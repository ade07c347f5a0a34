"""Warns of steps that are not captured or not compiled as the user asked, once for each reason."""

from __future__ import annotations

from fastdp.warn import warn_user


class Notices:
    """The warnings of one model's captured steps.

    Args:
        name: the model's.
        quiet: warn of nothing: the report alone tells, where steps run any code of the user's and "auto" just tries.
    """

    def __init__(self, name: str, *, quiet: bool) -> None:
        self._name, self._quiet = name, quiet
        self._told = ""

    def eager(self, why: str) -> None:
        """Warn that steps run eagerly, and why."""
        if not self._quiet and self._told != why:
            self._told = why
            warn_user(f"fastdp runs {self._name!r} eagerly: it cannot be captured because of {why}")

    def traced(self, why: str | None) -> None:
        """Warn that steps are not compiled, and why."""
        if not self._quiet:
            warn_user(f"fastdp runs {self._name!r} traced and not compiled: {why}")
