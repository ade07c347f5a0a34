"""`to_categorical` and `normalize`: Keras 2's utilities for arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def to_categorical(y: Any, num_classes: int | None = None, dtype: Any = "float32") -> Any:
    """Class numbers as one-hot rows.

    Args:
        y: ints from 0, of any shape; a last axis of length 1 is dropped.
        num_classes: length of a row; None means the greatest number in `y` plus one.
        dtype: dtype of the result.

    Returns a new array of shape `y.shape + (num_classes,)`; a tensor if `y` is a tensor.

    Raises:
        ValueError: a number in `y` is not from 0 to `num_classes - 1`, or `y` is empty without `num_classes`.

    Example:
        >>> to_categorical([0, 2, 1])
        array([[1., 0., 0.],
               [0., 0., 1.],
               [0., 1., 0.]], dtype=float32)
    """
    if keras.ops.is_tensor(y):
        num_classes = num_classes or int(keras.ops.max(y)) + 1
        return keras.ops.cast(keras.utils.to_categorical(y, num_classes), dtype)
    classes = np.asarray(y).astype(np.int64)
    if classes.ndim > 1 and classes.shape[-1] == 1:
        classes = classes[..., 0]
    if not num_classes and not classes.size:
        raise ValueError("num_classes must be given where y is empty, got None: pass the number of classes")
    num_classes = num_classes or int(classes.max()) + 1
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if outside.size:
        raise ValueError(
            f"y must hold class numbers from 0 to {num_classes - 1}, got {outside[0]}: "
            "renumber the classes, or pass a larger num_classes"
        )
    rows = np.zeros((*classes.shape, num_classes), dtype)
    np.put_along_axis(rows, classes[..., np.newaxis], 1, axis=-1)
    return rows


def normalize(x: Any, axis: int = -1, order: Any = 2) -> Any:
    """Divide an array by its norm along an axis. If the norm is 0, the values stay 0.

    Keras 3.15's own function fails for `axis=0`.

    Args:
        x: array of any shape.
        axis: the axis to take norms along.
        order: as in `numpy.linalg.norm`: 1, 2, `np.inf`, ...

    Returns a new array of the shape of `x`; a tensor if `x` is a tensor.

    Example:
        >>> normalize(np.array([[3.0, 4.0]]))
        array([[0.6, 0.8]])
    """
    if keras.ops.is_tensor(x):
        return keras.utils.normalize(x, axis=axis, order=order)
    x = np.asarray(x)
    norm = np.linalg.norm(x, order, axis, keepdims=True)
    return x / np.where(norm == 0, 1, norm)
