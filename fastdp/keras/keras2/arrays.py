"""`to_categorical` and `normalize`: Keras 2's utilities for arrays."""

from __future__ import annotations

import math
import operator
from typing import Any

import keras
import numpy as np


def to_categorical(y: Any, num_classes: int | None = None, dtype: Any = "float32") -> Any:
    """Class numbers as one-hot rows.

    Args:
        y: whole numbers from 0, of any shape; a last axis of length 1 is dropped.
        num_classes: length of a row; None means the greatest number in `y` plus one.
        dtype: dtype of the result.

    Returns a new array of shape `y.shape + (num_classes,)`; a tensor if `y` is a tensor.

    Raises:
        ValueError: a number in `y` is not whole, or not from 0 to `num_classes - 1`; or `y` is empty without
            `num_classes`, has rows of several lengths, or `num_classes` is less than 1.
        TypeError: `y` holds no numbers, `num_classes` is no whole number, or `dtype` is no dtype of numbers.

    Example:
        >>> to_categorical([0, 2, 1])
        array([[1., 0., 0.],
               [0., 0., 1.],
               [0., 1., 0.]], dtype=float32)
    """
    is_tensor = keras.ops.is_tensor(y)
    classes = _class_numbers(keras.ops.convert_to_numpy(y) if is_tensor else y)
    count = _count_of(num_classes, classes)
    outside = classes[(classes < 0) | (classes >= count)]
    if outside.size:
        raise ValueError(
            f"y must hold class numbers from 0 to {count - 1}, got {outside[0]}: "
            "renumber the classes, or pass a larger num_classes"
        )
    if is_tensor:
        return keras.ops.cast(keras.utils.to_categorical(y, count), dtype)
    rows = np.zeros((*classes.shape, count), _dtype_of_numbers(dtype))
    np.put_along_axis(rows, classes[..., np.newaxis], 1, axis=-1)
    return rows


def _class_numbers(y: Any) -> np.ndarray:
    """The class numbers as whole numbers, without a last axis of length 1.

    Raises:
        TypeError: they are no numbers.
        ValueError: they are not whole, or have no shape.
    """
    remedy = "number the classes, as np.unique(y, return_inverse=True) does"
    if _are_digits(y):
        y = np.asarray(y).astype(np.int64)  # as Keras 2 read them
    numbers = _numbers(y, "y", remedy)
    if numbers.dtype.kind == "c":
        raise TypeError(f"y must hold whole numbers, got {numbers.dtype}: pass class numbers")
    if numbers.dtype.kind == "f":
        odd = numbers[~np.isfinite(numbers) | (numbers != np.floor(numbers))]
        if odd.size:
            raise ValueError(f"y must hold whole numbers, got {odd[0]}: round it, or pass class numbers")
    if numbers.ndim > 1 and numbers.shape[-1] == 1:
        numbers = numbers[..., 0]
    if numbers.dtype.kind in "uf" and numbers.size and float(numbers.max()) >= 2.0**63:
        raise ValueError(f"y must hold class numbers, got {numbers.max()}, which is too large: renumber the classes")
    return numbers.astype(np.int64)


def _count_of(num_classes: int | None, classes: np.ndarray) -> int:
    """The number of classes.

    Raises:
        TypeError: `num_classes` is no whole number.
        ValueError: it is less than 1, or missing where there are no class numbers.
    """
    if num_classes is None:
        if not classes.size:
            raise ValueError("num_classes must be given where y is empty, got None: pass the number of classes")
        return max(1, int(classes.max()) + 1)
    if isinstance(num_classes, (float, np.floating)) and float(num_classes).is_integer():
        num_classes = int(num_classes)
    try:
        count = operator.index(num_classes)
    except TypeError:
        raise TypeError(
            f"num_classes must be a whole number or None, got {num_classes!r}: pass the number of classes"
        ) from None
    if count < 0:
        raise ValueError(f"num_classes must be at least 1, got {count}: pass the number of classes, or None")
    return count or _count_of(None, classes)  # 0 means None, as in Keras 2


def _dtype_of_numbers(dtype: Any) -> np.dtype[Any]:
    """The dtype of a result.

    Raises:
        TypeError: it is none, or none of numbers.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.kind not in "biufc":
        raise TypeError(f"dtype must be a dtype of numbers, got {dtype!r}: pass 'float32', 'int64' or the like")
    return found


def normalize(x: Any, axis: int = -1, order: Any = 2) -> Any:
    """Divide an array by its norm along an axis. If the norm is 0, the values stay 0.

    Keras 3.15's own function fails for `axis=0`.

    Args:
        x: array of numbers, of any shape with one axis at least.
        axis: the axis to take norms along.
        order: as in `numpy.linalg.norm` for vectors: 1, 2, `np.inf`, ...

    Returns a new array of the shape of `x`; a tensor if `x` is a tensor.

    Raises:
        ValueError: `x` has no such axis, or has rows of several lengths.
        TypeError: `x` holds no numbers, or `axis` or `order` is no number.

    Example:
        >>> normalize(np.array([[3.0, 4.0]]))
        array([[0.6, 0.8]])
    """
    is_tensor = keras.ops.is_tensor(x)
    values = x if is_tensor else _numbers(x, "x", "normalize divides numbers: convert it first")
    try:
        axis = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be a whole number, got {axis!r}: pass one axis, such as -1") from None
    rank = len(values.shape)
    if not -rank <= axis < rank:
        has = f"{rank} axes, so from {-rank} to {rank - 1}" if rank else "none: it is one number"
        raise ValueError(f"axis must be an axis of x, which has {has}, got {axis}: pass another axis, or reshape x")
    order = 2 if order is None else order
    if isinstance(order, (bool, str)) or not isinstance(order, (int, float, np.number)) or math.isnan(float(order)):
        raise TypeError(f"order must be a number, as 1, 2 or np.inf, got {order!r}: pass the order of a vector norm")
    if is_tensor:
        return keras.utils.normalize(x, axis=axis, order=order)
    norm = np.linalg.norm(values, float(order), axis, keepdims=True)
    return values / np.where(norm == 0, 1, norm)


def _numbers(value: Any, name: str, remedy: str) -> np.ndarray:
    """An argument as an array of numbers.

    Raises:
        ValueError: its rows have several lengths.
        TypeError: it holds something else than numbers.
    """
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} must have rows of one length, got a {type(value).__name__} with rows of several: pad them"
        ) from None
    if array.dtype.kind not in "biufc" and not (array.dtype.kind == "O" and _are_numbers(array)):
        raise TypeError(f"{name} must hold numbers, got {_said(value, array)}: {remedy}")
    return array.astype(np.float64) if array.dtype.kind == "O" else array


def _are_digits(value: Any) -> bool:
    """Whether a value is made of texts of whole numbers."""
    if not isinstance(value, (list, tuple, str, np.ndarray)):
        return False
    try:
        array = np.asarray(value)
    except ValueError:
        return False
    return (
        array.dtype.kind == "U"
        and array.size > 0
        and all(str(one).strip().lstrip("+-").isdecimal() for one in array.ravel())
    )


def _are_numbers(array: np.ndarray) -> bool:
    """Whether an array of objects, as pandas makes it, holds numbers alone."""
    return all(isinstance(one, (int, float, np.integer, np.floating)) for one in array.ravel())


def _said(value: Any, array: np.ndarray) -> str:
    """What came, in a few words."""
    first = array.ravel()[0] if array.size else value
    text = repr(first)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(first).__name__})"
