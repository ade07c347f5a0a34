"""Remedies for batches that cannot be split by rows, by what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from fastdp.program.torch.nest import PLAIN
from fastdp.tensors import pytree

TOTAL_LENGTH = "pad_packed_sequence(..., total_length=x.shape[1])"


def refuse_packed(values: Any) -> None:
    """Refuse packed sequences, whose rows lie neither side by side nor apart.

    Args:
        values: `(args, kwargs, targets)`.

    Raises:
        ValueError: there is one.
    """
    if any(isinstance(part, PackedSequence) for part in _parts(values)):
        raise ValueError(
            "On several devices a batch must not have a PackedSequence, which cannot be split by rows. Pass the padded "
            "sequences and their lengths, and pack them inside forward: pack_padded_sequence(x, lengths, "
            f"batch_first=True, enforce_sorted=False), then {TOTAL_LENGTH}."
        )


def unequal(names: Sequence[str], rows: Sequence[int], values: Any) -> str:
    """What to do about arrays with different numbers of rows: the end of a message.

    Args:
        names, rows: of the arrays.
        values: `(args, kwargs, targets)`, of which the arrays are.
    """
    odd = next(name for name, count in zip(names, rows, strict=True) if count != rows[0])
    said = (
        f' If all rows share `{odd}`, as they do class weights or a mask, say so: fastdp.wrap(module, rows={{"{odd}": '
        f'"same"}}), or pass fastdp.same(tensor); if its rows lie along another axis, give its number in place of '
        f'"same".'
    )
    return said + of_values(values)


def of_values(values: Any) -> str:
    """Sentences about what is in `(args, kwargs, targets)` and cannot be split by rows; empty if there is nothing."""
    parts = list(_parts(values))
    return "".join(f" {text}" for applies, text in _KINDS if any(applies(part) for part in parts))


def refuse_lists(targets: Any, rows: int, reduction: str) -> None:
    """Refuse targets with a list of one plain value for each row, which each device would get as a whole.

    Args:
        targets: of a loss function that gets each device's own rows.
        rows: of the global batch.
        reduction: for the message.

    Raises:
        ValueError: there is one.
    """
    if rows > 1 and any(_is_list_of(part, PLAIN) and len(part) == rows for part in _parts(targets)):
        raise ValueError(
            f"A target has a list of {rows} values, one for each row, and reduction={reduction!r} gives each device "
            f"its "
            "own rows of tensors, but the whole of a list. Make it a tensor, or use reduction=None."
        )


def _is_list_of(part: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(part, list) and len(part) > 1 and all(isinstance(one, kinds) for one in part)


def _may_be_edges(part: object) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.int64 and part.ndim == 2 and part.shape[0] == 2


_KINDS: list[tuple[Callable[[object], bool], str]] = [
    (
        lambda part: _is_list_of(part, torch.Tensor),
        "A list of tensors, such as images of different sizes, is not split: each tensor in it is, along its own first "
        "axis. Stack or pad them into one tensor.",
    ),
    (
        lambda part: _is_list_of(part, dict),
        "A list of dicts, one for each row, as of detection targets, is not split. Pad what is in them into tensors "
        "with rows, or use gpus=[0].",
    ),
    (
        lambda part: _is_list_of(part, PLAIN),
        "A list of numbers or strings goes to each device as a whole. Make it a tensor with rows.",
    ),
    (
        _may_be_edges,
        "Indices of other rows, such as the edges of a graph, cannot be split: pass one graph a row, or use gpus=[0].",
    ),
]


def _parts(values: Any) -> Iterator[Any]:
    """All containers and leaves of a nest."""
    yield values
    if isinstance(values, (dict, list, tuple)):
        for one in values.values() if isinstance(values, dict) else values:
            yield from _parts(one)
    elif not isinstance(values, torch.Tensor):
        yield from (leaf for leaf in pytree.tree_leaves(values) if leaf is not values)
