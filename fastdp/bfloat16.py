"""Converts fp32 numbers to bfloat16 and back: NumPy lacks the type, and its arrays hold the bits.

The rounding is torch's own (`c10::BFloat16`), and that of kernels/common.cuh: to the nearest, ties to even; what is too
large becomes an infinity, and every NaN becomes 0x7fc0. (Torch's vectorized loops leave other bits of a NaN: those are
the one thing in which torch does not agree with itself.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAN = np.uint16(0x7FC0)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 numbers rounded to bfloat16, as its bits; an array of its own, of the same shape."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), _NAN, rounded)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The fp32 numbers of equal value, of bits as uint16; an array of its own, of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
