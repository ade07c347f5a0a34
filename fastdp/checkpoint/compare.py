"""Compares the numbers of two checkpoints bit by bit, and tells by how many units in the last place they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdp.bfloat16 import from_bfloat16
from fastdp.checkpoint.contents import Numbers

_WORDS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Difference:
    """How a value differs.

    Attributes:
        name: the tensor's, or the value's.
        what: in words.
        count: of how many numbers, out of `total`; 0 for what is no array.
        ulps: units in the last place that the numbers lie apart at most; None for what has no such unit.
        largest: the largest absolute difference; None likewise, infinite next to infinities and NaNs.
        place: the place of the first differing number, as an index.
    """

    name: str
    what: str
    count: int = 0
    total: int = 0
    ulps: int | None = None
    largest: float | None = None
    place: tuple[int, ...] = ()


def differences(one: Numbers, other: Numbers) -> list[Difference]:
    """All values that differ in a bit, in the order of the first."""
    names = dict.fromkeys([*one, *other])
    found = [_difference(name, one, other) for name in names]
    return [difference for difference in found if difference is not None]


def _difference(name: str, one: Numbers, other: Numbers) -> Difference | None:
    for mine, where in ((one, "first"), (other, "second")):
        if name not in mine:
            return Difference(name, f"is not in the {where}")
    a, b = one[name], other[name]
    if not (_is_array(a) and _is_array(b)):
        return None if (type(a), repr(a)) == (type(b), repr(b)) else Difference(name, f"is {_shown(a)} and {_shown(b)}")
    x, y = np.asarray(a), np.asarray(b)
    dtypes = [mine.dtypes.get(name, str(array.dtype)) for mine, array in ((one, x), (other, y))]
    if (dtypes[0], x.shape) != (dtypes[1], y.shape):
        return Difference(name, f"is {dtypes[0]} of shape {x.shape} and {dtypes[1]} of shape {y.shape}")
    return _of_arrays(name, x, y, dtypes[0])


def _of_arrays(name: str, x: np.ndarray, y: np.ndarray, dtype: str) -> Difference | None:
    """How two arrays of one type and shape differ."""
    if x.tobytes() == y.tobytes():
        return None
    floats = dtype == "bfloat16" or x.dtype.kind == "f"
    if not floats and x.dtype.kind not in "iu":
        return Difference(name, "differs")
    bits = [np.ascontiguousarray(array).reshape(-1).view(_WORDS[array.itemsize]) for array in (x, y)]
    differs = np.flatnonzero(bits[0] != bits[1])
    place = tuple(int(i) for i in np.unravel_index(int(differs[0]), x.shape)) if x.ndim else ()
    if dtype == "bfloat16":
        values = [from_bfloat16(array.view(np.uint16)).astype(np.float64) for array in bits]
    else:
        values = [np.asarray(array, np.float64).reshape(-1) for array in (x, y)]
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(values[0][differs] - values[1][differs])
    largest = float(np.nan_to_num(apart, nan=math.inf).max())
    ulps = _ulps(bits[0][differs], bits[1][differs]) if floats else None
    return Difference(name, "differs", differs.size, x.size, ulps, largest, place)


def _ulps(a: np.ndarray, b: np.ndarray) -> int:
    """How far floats with these bits lie apart at most, in floats between them. Both zeros are one float."""
    ordered = [_ordered(bits) for bits in (a, b)]
    if a.itemsize < 8:
        return int(np.abs(ordered[0] - ordered[1]).max())
    return max(abs(int(p) - int(q)) for p, q in zip(*ordered, strict=True))  # may need one bit more


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Whole numbers in the order of the floats with these bits: neighbours are one apart."""
    wide = bits.astype(np.int64)
    lowest = -(1 << (8 * bits.itemsize - 1))
    return np.where(wide < 0, lowest - wide, wide)


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def as_json(difference: Difference) -> Mapping[str, Any]:
    """A difference as plain values."""
    return {name: value for name, value in vars(difference).items() if value is not None and value != ()}
