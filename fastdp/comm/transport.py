"""Gradients in 16 bits: rounded for the way between devices and processes, and added up in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastdp.bfloat16 import from_bfloat16, to_bfloat16

SIXTEEN_BITS = ("bfloat16", "float16")
Add = Callable[..., np.ndarray]  # `add(values, dtype, out=None)`: the sum of vectors of this dtype


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit floats as fp32, in an array of its own."""
    return values.astype(np.float32) if dtype == "float16" else from_bfloat16(values)


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 as 16-bit floats, rounded to nearest even. Numbers that are too large become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16) if dtype == "float16" else to_bfloat16(values)


@dataclass(frozen=True, slots=True)
class Transport:
    """How gradients of float32 and float64 travel.

    Args:
        dtype: "bfloat16" or "float16".
        may_overflow: a number that is too large for float16 becomes infinite, as loss scaling expects; else it is an
            error.
    """

    dtype: str
    may_overflow: bool = False

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Gradients as 16-bit floats.

        Raises:
            OverflowError: a finite number is too large.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = narrowed(values.astype(np.float32, copy=False), self.dtype)
        if self._checks:
            _check(np.isinf(narrow), np.isfinite(values))
        return narrow

    def added(self, narrow: Sequence[np.ndarray], add: Add) -> np.ndarray:
        """The sum of vectors that `rounded` has given, as fp32: added in fp32 in the order of `add`, and rounded once.

        Raises:
            OverflowError: a sum of finite numbers is too large.
        """
        total = widened(add(narrow, self.dtype), self.dtype)
        if self._checks and not np.isfinite(total).all():
            _check(np.isinf(total), np.logical_and.reduce([np.isfinite(value) for value in narrow]))
        return total

    @property
    def _checks(self) -> bool:
        return self.dtype == "float16" and not self.may_overflow


def sent(add: Add, transport: Transport | None) -> Add:
    """`add` for gradients that travel so: each vector of float32 or float64 is rounded once, they are added in float32
    in the order of `add`, and the sum is rounded once. `add` itself if they travel as they are."""
    if transport is None:
        return add

    def add_rounded(values: Sequence[np.ndarray], dtype: str, out: np.ndarray | None = None) -> np.ndarray:
        if dtype not in ("float32", "float64"):
            return add(values, dtype, out)
        total = transport.added([transport.rounded(value) for value in values], add)
        total = total.astype(values[0].dtype, copy=False)
        if out is None:
            return total
        out[...] = total
        return out

    return add_rounded


def _check(infinite: np.ndarray, finite: np.ndarray) -> None:
    """Raise if a number has become infinite that was finite."""
    if (infinite & finite).any():
        raise OverflowError(
            'With grad_dtype="float16" gradients must stay within 65504, the largest number of float16, and one is '
            'larger. Use grad_dtype="bfloat16", which has the range of float32, or scale the loss down.'
        )
