"""Finds what a model's code writes outside of its layers: helpers, globals, classes, closures, their tensors.

All replicas run the same Python code, so what it changes there is changed by all devices, in no fixed order, each by
its own rows. Attributes of the layers themselves are found by `fastdp.program.keras.rows.written`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch

from fastdp.capture.reach import Reach
from fastdp.capture.watch import Watch
from fastdp.program.keras.capture.reach import KerasRules
from fastdp.program.keras.plain_outputs import is_same
from fastdp.program.keras.rows.known_layers import HOOKS, global_hooks

ABSENT = object()
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, np.ndarray, np.generic)
CONTAINERS: tuple[type[Any], ...] = (list, dict, set)
_DEPTH = 4
_MOST_NBYTES = 1 << 26  # a larger tensor or array is data that code reads: a copy would fill the memory

Key = tuple[int, Any]  # what holds a value, by its id, and the name or key


@dataclass(slots=True)
class _Place:
    """A place that is looked at: its name, how it is read, and what was there, frozen."""

    what: str
    read: Callable[[], Any]
    before: Any


class Record(Watch):
    """A watch that also tells what was written, and can take back what was written to tensors.

    Attributes:
        caches: ids of the dicts that are no object's attributes: passes may add different keys to these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.caches: set[int] = set()
        self._places: dict[Key, _Place] = {}
        self._mappings: list[tuple[Any, frozenset[Any], str]] = []
        self._kept: list[tuple[torch.Tensor, str, int, torch.Tensor | None]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []

    # What to look at.

    def values(self, owner: Any, names: Sequence[Any], what: str) -> None:
        """As in `Watch`."""
        super().values(owner, names, what)
        for name in names:
            self._note(owner, name, f"{what}.{name}" if isinstance(name, str) else f"{what}[{name!r}]", _item)

    def object(self, owner: Any, key: Any, what: str) -> None:
        """As in `Watch`."""
        super().object(owner, key, what)
        self._note(owner, key, what, _item)

    def attribute(self, owner: Any, name: str, what: str, by_value: bool) -> None:
        """As in `Watch`."""
        super().attribute(owner, name, what, by_value)
        self._note(owner, name, what, getattr)

    def size(self, owner: Any, what: str) -> None:
        """As in `Watch`."""
        super().size(owner, what)
        self._mappings.append((owner, frozenset(owner), what))

    def elements(self, container: Any, what: str) -> None:
        """As in `Watch`."""
        super().elements(container, what)
        self._places[id(container), "elements"] = _Place(what, lambda: list(container), frozen(list(container)))

    def tensor(self, tensor: torch.Tensor, what: str) -> None:
        """As in `Watch`."""
        super().tensor(tensor, what)
        if not tensor.is_inference():
            small = tensor.layout == torch.strided and tensor.nbytes <= _MOST_NBYTES
            self._kept.append((tensor, what, tensor._version, tensor.detach().clone() if small else None))

    def array(self, array: np.ndarray, what: str) -> None:
        """As in `Watch`."""
        super().array(array, what)
        if array.flags.writeable and not array.dtype.hasobject and array.nbytes <= _MOST_NBYTES:
            content = array.copy()
            self._places[id(array), "content"] = _Place(what, array.copy, content)
            self._arrays.append((array, content))

    def memory(self, value: Any, what: str) -> None:
        """As in `Watch`."""
        super().memory(value, what)
        self._places[id(value), "memory"] = _Place(what, memoryview(value).tobytes, memoryview(value).tobytes())

    def _note(self, owner: Any, name: Any, what: str, read: Callable[[Any, Any, Any], Any]) -> None:
        value = read(owner, name, ABSENT)
        self._places[id(owner), name] = _Place(what, lambda: read(owner, name, ABSENT), _seen(value))

    # What was written.

    def is_new(self, key: Key) -> bool:
        """Whether a place was not there before."""
        return key not in self._places

    def written(self, *, functions: bool = False) -> Iterator[tuple[Key, str, Any]]:
        """The places that differ from what they were, with their names and values; ABSENT for what is gone.

        `functions`: another function is another value. (A pass may make one anew.)
        """
        for key, place in self._places.items():
            now = _seen(place.read())
            if not agree(now, place.before) or (functions and callable(now) and now is not place.before):
                yield key, place.what, now
        for owner, known, what in self._mappings:
            for name in [name for name in owner if name not in known]:
                yield (id(owner), name), f"{what}.{name}", _seen(owner[name])
        for tensor, what, version, before in self._kept:
            if tensor._version != version and (before is None or not agree(tensor, before)):
                yield (id(tensor), "tensor"), what, tensor.detach().clone()

    def restore(self) -> None:
        """Take back what was written, as far as it is known."""
        super().restore()
        for array, content in self._arrays:
            if not agree(array, content):
                array[...] = content
        with torch.no_grad():
            for tensor, _, version, before in self._kept:
                if tensor._version != version and before is not None:
                    tensor.copy_(before)


class _Walk(Reach):
    """A walk from layers that looks at what is not Keras's own, and follows what it can."""

    watch: Record
    with_layers = False

    def cannot_follow(self, why: str) -> None:
        """Go on."""

    def _object(self, value: Any, what: str) -> None:
        """Layers' own attributes are found otherwise; what they hold is looked at."""
        is_layer = isinstance(value, keras.Operation)
        if not is_layer and (self._rules.is_own(type(value)) or not type(value).__module__.startswith("keras.")):
            super()._object(value, what)
            return
        what, attributes = self._rules.name_of(value, what), getattr(value, "__dict__", {})
        names = self._read(attributes, self._rules.read_names(value, attributes))
        if self.with_layers and is_layer and self._rules.is_own(type(value)):
            self.mapping(attributes, names, what)
            names = []
            if not self._rules.has_further_attributes(value):
                self.watch.size(attributes, what)
        for name in names:
            self.walk(attributes[name], f"{what}.{name}")
        self._rules.walk_further(self, value, what)
        for cls in type(value).__mro__:
            self._class(cls)

    def _container(self, container: Any, what: str) -> None:
        """Containers that Keras has made of a layer's are found otherwise."""
        if type(container).__module__.startswith("keras.") and not self.with_layers:
            for element in container.values() if isinstance(container, dict) else list(container):
                self.walk(element, what)
            return
        if isinstance(container, dict):
            self.watch.caches.add(id(container))
        super()._container(container, what)

    def _class(self, cls: type) -> None:
        """Look at the user's classes."""
        if self._rules.is_own(cls):
            super()._class(cls)


@functools.cache
def _rules() -> KerasRules:
    return KerasRules()


def record_of(model: Any, *, with_layers: bool = False) -> Record:
    """What the code of a model's layers reaches outside of them, as it is now.

    `with_layers`: and the attributes of the layers that are not Keras's own.
    """
    record = Record()
    layers = model._flatten_layers()
    variables = [v for layer in layers for v in layer.variables]
    reach = _Walk(record, [*variables, *(v._value for v in variables)], _rules())
    reach.with_layers = with_layers
    for layer in layers:
        reach.walk(layer, layer.name)
        for name in HOOKS:
            for hook in getattr(layer, name, {}).values():
                reach.walk(hook, f"a hook of {layer.name}")
    for table in global_hooks():
        for hook in table.values():
            reach.walk(hook, "a hook of all modules")
    return record


def _item(owner: Any, key: Any, default: Any) -> Any:
    return owner.get(key, default) if hasattr(owner, "get") else owner[key]


def _seen(value: Any) -> Any:
    """A value for comparison. A container that is looked at itself counts as an object here."""
    return value if isinstance(value, (*CONTAINERS, tuple)) and not _is_plain(value) else frozen(value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers and strings alone, which no other place holds."""
    if isinstance(value, dict):
        return depth < _DEPTH and all(_is_plain(one, depth + 1) for one in value.values())
    if isinstance(value, (list, tuple, set)):
        return depth < _DEPTH and all(_is_plain(one, depth + 1) for one in value)
    return isinstance(value, PLAIN) and not isinstance(value, (torch.Tensor, np.ndarray))


def frozen(value: Any, depth: int = 0) -> Any:
    """A value that later writes do not change; other objects as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if depth >= _DEPTH:
        return value
    if isinstance(value, dict):
        return {key: frozen(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(one, depth + 1) for one in value]
    return set(value) if isinstance(value, set) else value


def agree(one: Any, other: Any) -> bool:
    """Whether two frozen values are equal. Objects of other classes are taken to be."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        if not alike or one.is_meta or other.is_meta:  # of Keras's symbolic calls
            return alike and one.is_meta == other.is_meta
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(agree, one, other))
    plain = isinstance(one, (*PLAIN, *CONTAINERS)) or isinstance(other, (*PLAIN, *CONTAINERS))
    if plain or ABSENT in (one, other):
        return is_same(one, other)
    return True
