"""Puts copies of buffers in the place of these wherever a module holds them besides, while a pass is repeated."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fastdp.program.torch.following.contents import is_empty
from fastdp.program.torch.following.holders import Holder


@contextmanager
def exchanged(holders: Sequence[Holder], copies: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """While the block runs, attributes, lists, dicts and closures hold the copies of tensors.

    Args:
        holders: what holds values of a module.
        copies: by what they are copies of.
    """
    by_identity = {id(tensor): copy for tensor, copy in copies.items()}
    with ExitStack() as undo:
        for holder in holders if copies else ():
            for key, value in list(_items(holder)):
                other = _exchange(value, by_identity)
                if other is not value:
                    _put(holder, key, other)
                    undo.callback(_put_back, holder, key, other, value)
        yield


def _exchange(value: Any, copies: Mapping[int, torch.Tensor]) -> Any:
    """A value with the copies in it; itself if there are none."""
    if type(value) is tuple:
        found = tuple(_exchange(one, copies) for one in value)
        return found if any(one is not other for one, other in zip(value, found, strict=True)) else value
    return copies.get(id(value), value)


def _items(holder: Holder) -> Iterator[tuple[Any, Any]]:
    table = holder.table
    if isinstance(table, types.CellType):
        if not is_empty(table):
            yield None, table.cell_contents
    elif isinstance(table, dict):
        yield from ((key, table[key]) for key in holder.keys if key in table)
    elif isinstance(table, (list, collections.deque)):
        yield from enumerate(table)


def _put(holder: Holder, key: Any, value: Any) -> None:
    if isinstance(holder.table, types.CellType):
        holder.table.cell_contents = value
    else:
        holder.table[key] = value


def _put_back(holder: Holder, key: Any, copy: Any, value: Any) -> None:
    """Put a value back, unless the module has put another one there."""
    if any(one is copy for at, one in _items(holder) if at == key):
        _put(holder, key, value)
