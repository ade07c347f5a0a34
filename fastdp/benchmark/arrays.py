"""The arrays of a batch by name, shape and dtype, and synthetic ones of that kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Array:
    """One input or target of a model.

    Args:
        name: the input's name; the name of a forward's parameter.
        shape: without the rows.
        dtype: NumPy's name of it.
        below: integers are drawn from 0 to `below - 1`; for floats it has no meaning.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    below: int = 2

    def draw(self, rows: int, generator: np.random.Generator) -> NDArray[Any]:
        """Random rows: normal numbers, whole numbers below the limit, or truth values."""
        dtype, shape = np.dtype(self.dtype), (rows, *self.shape)
        if dtype.kind in "iu":
            return generator.integers(0, self.below, shape).astype(dtype)
        if dtype.kind == "b":
            return generator.integers(0, 2, shape).astype(dtype)
        return generator.standard_normal(shape, np.float32).astype(dtype, copy=False)

    def zeros(self, rows: int) -> NDArray[Any]:
        """Rows of zeros."""
        return np.zeros((rows, *self.shape), self.dtype)

    def nbytes(self, rows: int) -> int:
        """Bytes of so many rows."""
        return rows * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """For the result: name, shape without rows, dtype."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}


def draw(arrays: Sequence[Array], rows: int, seed: int) -> list[NDArray[Any]]:
    """Random rows of several arrays; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return [array.draw(rows, generator) for array in arrays]
