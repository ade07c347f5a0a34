"""Converts fp32 numbers to bfloat16 and back. NumPy lacks the type, so uint16 arrays hold its bits.

The rounding is that of torch (`c10::BFloat16`) and of kernels/common.cuh: to the nearest, ties to even. Values that are
too large become infinities, and every NaN becomes 0x7fc0. (Torch's vectorized loops produce other NaN bits; torch does
not agree with itself there.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAN = np.uint16(0x7FC0)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 numbers rounded to bfloat16, as bits in a new uint16 array of the same shape."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), _NAN, rounded)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """bfloat16 bits (uint16) converted to fp32 exactly, in a new array of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
