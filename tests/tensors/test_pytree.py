"""Nests of torch's pytrees and of records: flattened and made again, they are what they were."""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree

from fastdp.tensors import pytree, wire


@dataclasses.dataclass
class Pair:
    first: typing.Any
    second: typing.Any = None

    def __post_init__(self):
        self.made = "by its constructor"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    first: typing.Any


class Output(OrderedDict):
    """As transformers' outputs: each field that is there is an item too."""

    def __init__(self, **fields):
        super().__init__(fields)
        self.__dict__.update(fields)


class Bag(dict):
    __getattr__ = dict.__getitem__


class Named(typing.NamedTuple):
    first: typing.Any


@dataclasses.dataclass
class Layer(nn.Module):
    width: int

    __hash__ = object.__hash__


class Attrs:
    __attrs_attrs__ = ()  # as `attr.s` leaves it

    def __init__(self, first):
        self.first = first


VALUES = {
    "dataclass": (Pair(1, [2, None]), [".first", ".second[0]", ".second[1]", ".made"]),
    "with slots": (Slotted(1), [".first"]),
    "items that are attributes": (Output(a=1, b=(2, 3)), ["['a']", "['b'][0]", "['b'][1]"]),
    "a dict of a class of its own": (Bag(a=1), ["['a']"]),
    "attrs": (Attrs(1), [".first"]),
    "namespace": (types.SimpleNamespace(a=1, b=2), [".a", ".b"]),
    "in each other": (
        {"x": Pair(Slotted(1), Named(Bag(a=2)))},
        ["['x'].first.first", "['x'].second.first['a']", "['x'].made"],
    ),
    "none": ([1, {"a": 2}], ["[0]", "[1]['a']"]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_record_is_made_again_with_other_leaves(kind):
    value, names = VALUES[kind]
    leaves, spec = pytree.tree_flatten(value)
    paths, again = pytree.tree_flatten_with_path(value)
    assert [pytree.keystr(path) for path, _ in paths] == names
    assert [leaf for _, leaf in paths] == leaves == pytree.tree_leaves(value)
    assert spec == again
    assert hash(spec) == hash(again)
    assert str(spec) == str(again)
    made = pytree.tree_map(lambda leaf: (leaf,), value)
    assert pytree.tree_leaves(made) == leaves
    assert type(made) is type(value)
    assert [leaf for _, leaf in pytree.tree_leaves_with_path(pytree.tree_unflatten(leaves, spec))] == leaves


def test_an_item_that_is_an_attribute_stays_one():
    value = Output(a=torch.ones(2), b=None)
    made = pytree.tree_map(lambda leaf: leaf if leaf is None else leaf + 1, value)
    assert made.a is made["a"]
    assert made.b is None
    assert list(made) == ["a", "b"]


def test_structures_tell_classes_and_fields_apart():
    structures = [pytree.tree_structure(one) for one in (Bag(a=1), Bag(b=1), {"a": 1}, Pair(1), Slotted(1))]
    assert all(one != other for at, one in enumerate(structures) for other in structures[:at])


def test_nothing_is_registered_for_a_class_and_modules_and_classes_are_leaves():
    pytree.tree_leaves(Pair(1))
    assert Pair not in _pytree.SUPPORTED_NODES
    layer, tensor = object.__new__(Layer), torch.ones(1)
    assert pytree.tree_leaves([Pair, layer, tensor]) == [Pair, layer, tensor]


def test_a_type_that_was_registered_without_names_has_paths():
    class Registered(OrderedDict):
        pass

    _pytree.register_pytree_node(
        Registered,
        lambda value: (list(value.values()), list(value)),
        lambda values, keys: Registered(zip(keys, values, strict=True)),
    )
    paths = pytree.tree_leaves_with_path([Registered(a=1), Pair(Named(2)), {"b": 3}])
    names = ["[0]['a']", "[1].first.first", "[1].second", "[1].made", "[2]['b']"]
    assert [pytree.keystr(path) for path, _ in paths] == names


def test_structures_reach_other_processes():
    for value in (Pair(Slotted(1), Output(a=Named(2))), {"a": [1, 2]}):
        spec = pytree.tree_structure(value)
        assert wire.loads(wire.dumps(spec, ()), ()) == spec


TREES = [
    torch.ones(2),
    None,
    (),
    ((torch.ones(2), 3), {"b": [1.5, "x"], "a": None}, (np.ones(2),)),
    {"a": {}, "b": (), "c": []},
    {1: torch.ones(2), True and "b": 2},
    [OrderedDict(a=1), defaultdict(list, a=[2])],
    (torch.nn.Parameter(torch.ones(2)), torch.Size([2, 3])),
    {"a": 1, "b": 2},
    {"b": 1, "a": 2},
]


@pytest.mark.parametrize("tree", TREES)
def test_nests_have_torchs_leaves_and_structure_also_when_their_shape_is_known(tree):
    leaves, spec = _pytree.tree_flatten(tree)
    for _ in range(3):
        found, known = pytree.tree_flatten(tree)
        assert known == spec
        assert len(found) == len(leaves)
        assert all(map(operator.is_, found, leaves))
    other = pytree.tree_unflatten([10 + i for i in range(len(leaves))], known)
    assert pytree.tree_flatten(other)[1] == _pytree.tree_flatten(other)[1]


def test_nests_of_a_known_shape_are_not_taken_apart_again(monkeypatch):
    nest = lambda: ((torch.ones(2),), {"known shape": 1}, ())  # noqa: E731
    pytree.tree_flatten(nest())
    monkeypatch.setattr(_pytree, "tree_flatten", None)
    assert len(pytree.tree_flatten(nest())[0]) == 2
    with pytest.raises(TypeError):
        pytree.tree_flatten(((1,), {"another shape": 1}, ()))
