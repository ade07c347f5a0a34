"""Torch's pytrees, in which dataclasses, attrs classes, namespaces and subclasses of dict are nests too.

Functions have the names and meanings of `torch.utils._pytree`. Types that are registered there are what they are
registered as. Nothing is registered for a user's class: other code sees it as before.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._pytree import KeyPath, MappingKey, TreeSpec, keystr, tree_unflatten

__all__ = [
    "KeyPath",
    "MappingKey",
    "TreeSpec",
    "is_record",
    "keystr",
    "paths_of",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_leaves_with_path",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]

_BASES = (OrderedDict, dict, SimpleNamespace, object)  # the layouts in memory that a record may have
_NO_RECORDS = (torch.Tensor, nn.Module, type)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that was made by Python code


@dataclass(frozen=True, slots=True)
class _Form:
    """A record apart from its values.

    Attributes:
        kind: its class.
        keys: those of its items, if it is a dict.
        names: of its attributes that are no items.
        same: attributes that are items too, as in transformers' outputs: names, and the places of the items.
    """

    kind: type
    keys: tuple[Any, ...]
    names: tuple[str, ...]
    same: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class _Record:
    """A node of torch's pytrees in the place of a record."""

    form: _Form
    values: list[Any]


def _made(values: Iterable[Any], form: _Form) -> Any:
    """The record of this form with these values, without its constructor, which may ask for more."""
    values, base = list(values), _base_of(form.kind)
    made = base.__new__(form.kind)
    for key, value in zip(form.keys, values, strict=False):
        base.__setitem__(made, key, value)
    for name, value in zip(form.names, values[len(form.keys) :], strict=True):
        object.__setattr__(made, name, value)
    for name, place in form.same:
        object.__setattr__(made, name, values[place])
    return made


def _keys_of(form: _Form) -> list[Any]:
    """The keys of the values for paths."""
    return [*map(_pytree.MappingKey, form.keys), *map(_pytree.GetAttrKey, form.names)]


_pytree.register_pytree_node(
    _Record,
    lambda record: (record.values, record.form),
    _made,
    flatten_with_keys_fn=lambda record: (
        list(zip(_keys_of(record.form), record.values, strict=True)),
        record.form,
    ),
)


def _base_of(kind: type) -> Any:
    """The class that lays out the memory of instances."""
    return next(one for one in _BASES if issubclass(kind, one))


@lru_cache(1024)
def _is_record_class(kind: type) -> bool:
    """Whether instances of a class are records: their items and attributes are all that they are."""
    if issubclass(kind, _NO_RECORDS) or hasattr(kind, "__array__"):
        return False
    solid = kind
    while solid.__flags__ & _HEAP_TYPE and solid.__base__ is not None:
        solid = solid.__base__
    if solid not in _BASES or issubclass(kind, defaultdict):
        return False
    return solid is not object or dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__")


def is_record(value: Any) -> bool:
    """Whether a value is a record."""
    kind: Any = type(value)
    return _is_record_class(kind)


def _record_of(value: Any, whole: Collection[int]) -> _Record:
    """The node for a record. `whole` as of `tree_flatten`."""
    kind = type(value)
    base = _base_of(kind)
    items = list(base.items(value)) if issubclass(base, dict) else []
    places = {id(item): place for place, (_, item) in enumerate(items)}
    attributes = _attributes_of(value)
    same = tuple([(name, places[id(one)]) for name, one in attributes.items() if _is_item(name, one, items, places)])
    left = [name for name in attributes if name not in dict(same)]
    form = _Form(kind, tuple([key for key, _ in items]), tuple(left), same)
    return _Record(
        form, [_with_nodes(one, whole) for one in (*(item for _, item in items), *map(attributes.get, left))]
    )


def _is_item(name: str, value: Any, items: list[tuple[Any, Any]], places: dict[int, int]) -> bool:
    """Whether an attribute is an item under its own name."""
    place = places.get(id(value))
    return place is not None and items[place][0] == name


def _attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an instance, in its dict and in slots."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            full = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, full):
                found[full] = getattr(value, full)
    return found


def _with_nodes(tree: Any, whole: Collection[int] = ()) -> Any:
    """A nest with nodes in the place of records; the same object if there are none. `whole` as of `tree_flatten`."""
    leaves, spec = _pytree.tree_flatten(tree)
    if not any(is_record(leaf) for leaf in leaves):
        return tree
    return spec.unflatten(
        [_record_of(leaf, whole) if is_record(leaf) and id(leaf) not in whole else leaf for leaf in leaves]
    )


_LEAVES = frozenset((torch.Tensor, nn.Parameter, np.ndarray, type(None), bool, int, float, str))
_MOST_KNOWN = 1000
_known: dict[Any, TreeSpec] = {}  # by shape


class _NoShapeError(Exception):
    """A nest consists of more than Python's own containers."""


def _shape_of(tree: Any, leaves: list[Any]) -> Any:
    """What nests of one structure have in common. Appends the leaves."""
    kind = type(tree)
    if kind in _LEAVES:
        leaves.append(tree)
        return None
    if kind is tuple or kind is list:
        return (kind, *[_shape_of(one, leaves) for one in tree])
    if kind is not dict or any([type(key) is not str for key in tree]):  # noqa: C419
        raise _NoShapeError
    return (dict, *tree, *[_shape_of(one, leaves) for one in tree.values()])


def tree_flatten(tree: Any, whole: Collection[int] = ()) -> tuple[list[Any], TreeSpec]:
    """The leaves of a nest, and its structure. `whole` are the identities of records that are leaves."""
    leaves: list[Any] = []
    try:
        shape = _shape_of(tree, leaves)
    except (_NoShapeError, RecursionError):
        return _flatten(tree, whole)
    known = _known.get(shape)
    if known is not None:
        return leaves, known
    found, spec = _flatten(tree, whole)
    if len(found) == len(leaves) and all(map(operator.is_, found, leaves)):  # in torch's order
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[shape] = spec
    return found, spec


def _flatten(tree: Any, whole: Collection[int]) -> tuple[list[Any], TreeSpec]:
    """As `tree_flatten`, of any nest."""
    leaves, spec = _pytree.tree_flatten(tree)
    for leaf in leaves:
        if is_record(leaf):
            return _pytree.tree_flatten(_with_nodes(tree, whole))
    return leaves, spec


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a nest."""
    return tree_flatten(tree)[0]


def tree_structure(tree: Any) -> TreeSpec:
    """The structure of a nest."""
    return tree_flatten(tree)[1]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """A nest of what the function makes of the leaves."""
    leaves, spec = tree_flatten(tree)
    return spec.unflatten([function(leaf) for leaf in leaves])


def tree_map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """As `tree_map`, for leaves of a class alone; others stay."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, tree)


def tree_flatten_with_path(tree: Any) -> tuple[list[tuple[KeyPath, Any]], TreeSpec]:
    """As `tree_flatten`, with the path to each leaf."""
    nodes = _with_nodes(tree)
    try:
        return _pytree.tree_flatten_with_path(nodes)
    except ValueError:  # a type that was registered without names
        leaves, spec = _pytree.tree_flatten(nodes)
        return list(zip(paths_of(spec), leaves, strict=True)), spec


def tree_leaves_with_path(tree: Any) -> list[tuple[KeyPath, Any]]:
    """The leaves of a nest, with the path to each."""
    return tree_flatten_with_path(tree)[0]


def paths_of(spec: TreeSpec, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths to the leaves of a structure, also where a type was registered without names."""
    if spec.is_leaf():
        yield path
        return
    children = spec.children()
    for key, child in zip(_keys_in(spec, len(children)), children, strict=True):
        yield from paths_of(child, (*path, key))


def _keys_in(spec: TreeSpec, count: int) -> list[Any]:
    """The keys of the children of a node whose type may have been registered without names."""
    context = spec.context
    if spec.type is _Record:
        return _keys_of(context)
    if isinstance(context, type) and hasattr(context, "_fields"):
        return list(map(_pytree.GetAttrKey, context._fields))
    if spec.type is defaultdict:
        context = context[1]
    if spec.type is not list and isinstance(context, (list, tuple)) and len(context) == count:
        return list(map(_pytree.MappingKey, context))
    return list(map(_pytree.SequenceKey, range(count)))
