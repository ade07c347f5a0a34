"""Outputs of a model that are no tensors: None, numbers, strings, NumPy arrays, objects.

Such outputs cannot be combined from the rows of several devices. If all replicas return the same value, it is taken as
the value for the whole batch. A trial on different numbers of rows detects values that depend on that number, and each
step compares the replicas' values. A number that depends on the rows (`x.shape[0]`) raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from fastdp.tensors.row_effects import NotByRowsError

Plain = Sequence[tuple[int, Any]]


def check_same(every: Sequence[Plain], nest: Any) -> None:
    """Compare the leaves that are not tensors, from several replicas or several numbers of rows.

    Args:
        every: place and value of each leaf, by replica.
        nest: the outputs, for the message.

    Raises:
        NotByRowsError: the leaves differ.
    """
    for others in every[1:]:
        if [place for place, _ in others] != [place for place, _ in every[0]]:
            raise NotByRowsError(
                "The model's outputs are tensors for some rows but not for others, so fastdp cannot merge them from "
                "several devices. Return the same kinds of outputs for all rows, or use gpus=[0]."
            )
        for (place, value), (_, other) in zip(every[0], others, strict=True):
            if not is_same(value, other):
                raise NotByRowsError(
                    f"The model's output {_name(nest, place)} is not a tensor but {_said(value)}, and it depends on "
                    f"the rows: other rows gave {_said(other)}. fastdp can merge only tensors. Return a tensor with a "
                    "row for each row of the batch, or compute the value from the merged outputs, or use gpus=[0]."
                )


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same object, or equal in class and content."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype == other.dtype and np.array_equal(value, other, equal_nan=value.dtype.kind in "fc")
    if isinstance(value, float):
        return value == other or (value != value and other != other)
    return (value == other) is True


def _name(nest: Any, place: int) -> str:
    """A leaf as an expression such as `outputs['a'][0]`."""
    path = [path for path, _ in keras.tree.flatten_with_path(nest)][place] if keras.tree.is_nested(nest) else ()
    return "outputs" + "".join(f"[{key!r}]" for key in path)


def _said(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
