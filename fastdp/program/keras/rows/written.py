"""Finds what a model's own layers write to their attributes while a trial runs them, and takes it back afterwards.

All replicas run the same Python object, so they would write to the same attribute at the same time, each the value of
its rows. A value that every pass writes alike (a table made at the first call) harms nothing. Any other one (a tensor
kept for the loss, the number of rows, a counter of calls) is not what one device would leave there.

Assignments (`self.scores = ...`) are noted as they happen, so that one which a later assignment hides is found as well.
What happens inside of lists, dicts and sets is found by comparing them before and after each pass.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch

from fastdp.patching import Patch
from fastdp.program.keras.plain_outputs import is_same

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, np.ndarray, np.generic)
_CONTAINERS: tuple[type[Any], ...] = (list, dict, set)
_DEPTH = 4
_ABSENT = object()
_MASKS = frozenset(("_dropout_mask", "_recurrent_dropout_mask"))  # which replicas have of their own

Place = tuple[int, str]  # the owner's id, and the attribute's name


class _Thread(threading.local):
    """What notes the assignments of this thread."""

    writes: Writes | None = None


_thread = _Thread()


@dataclass(slots=True)
class Writes:
    """What the passes of a trial have written.

    Attributes:
        runs: for each pass, the values that it has written, by place.
    """

    owners: dict[int, Any]
    runs: list[dict[Place, list[Any]]] = field(default_factory=list)
    _before: dict[Place, Any] = field(default_factory=dict)
    _contents: dict[Place, tuple[Any, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> Writes:
        """The writes of a model's layers that are not Keras's own, and of such metrics of its layers."""
        every = [part for layer in model._flatten_layers() for part in (layer, *layer._metrics)]
        writes = cls({id(one): one for one in every if not type(one).__module__.startswith(("keras.", "fastdp."))})
        for number, owner in writes.owners.items():
            for name, value in vars(owner).items():
                if isinstance(value, _CONTAINERS) and name not in _names_of_keras():
                    writes._contents[number, name] = value, copy.copy(value)
        return writes

    def begin(self) -> None:
        """Forget the passes so far: others begin."""
        self.runs.clear()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what one pass writes."""
        self.runs.append({})
        contents = {place: _frozen(value) for place, (value, _) in self._contents.items()}
        before, _thread.writes = _thread.writes, self
        try:
            yield
        finally:
            _thread.writes = before
        for place, (value, _) in self._contents.items():
            after = _frozen(value)
            if not _agree(contents[place], after):
                self.runs[-1].setdefault(place, []).append(after)

    def assigned(self, owner: Any, name: str, value: Any) -> None:
        """Called before an assignment to an attribute of any layer."""
        number = id(owner)
        if number not in self.owners or name in _names_of_keras() or isinstance(value, torch.nn.Module):
            return
        place = number, name
        self._before.setdefault(place, vars(owner).get(name, _ABSENT))
        self.runs[-1].setdefault(place, []).append(_frozen(value))

    def found(self) -> tuple[Any, str] | None:
        """The first owner and attribute to which the passes have not written the same values."""
        for place in dict.fromkeys(place for run in self.runs for place in run):
            written = [run[place] for run in self.runs if place in run]
            if not all(_agree(one, written[0]) for one in written[1:]):
                return self.owners[place[0]], place[1]
        return None

    def take_back(self) -> None:
        """Give attributes and containers back what they were before the trial."""
        for (number, name), value in self._before.items():
            attributes = vars(self.owners[number])
            if value is not _ABSENT:
                attributes[name] = value
            elif isinstance(attributes.get(name, _ABSENT), (*_PLAIN, *_CONTAINERS, tuple)):
                del attributes[name]
        for value, before in self._contents.values():
            if not _agree(_frozen(value), _frozen(before)):
                _fill(value, before)


@contextmanager
def writes_of(model: Any) -> Iterator[Writes]:
    """Note what the model's own layers write in passes of this thread, and take it back at the end."""
    writes = Writes.of(model)
    with _patch:
        try:
            yield writes
        finally:
            writes.take_back()


def _noting(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Layer.__setattr__` to note assignments."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        writes = _thread.writes
        if writes is not None:
            writes.assigned(self, name, value)
        original(self, name, value)

    return __setattr__


_patch = Patch([(keras.Layer, "__setattr__", _noting)])


@functools.cache
def _names_of_keras() -> frozenset[str]:
    """The attributes that Keras and torch keep for themselves in each layer and model."""
    plain = keras.Layer(name="layer"), keras.Model(name="model")
    return _MASKS.union(*(vars(one) for one in plain)) | {"trainable", "losses"}


def _frozen(value: Any, depth: int = 0) -> Any:
    """A value that later writes do not change; other objects as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if depth >= _DEPTH:
        return value
    if isinstance(value, dict):
        return {key: _frozen(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(one, depth + 1) for one in value]
    return set(value) if isinstance(value, set) else value


def _agree(one: Any, other: Any) -> bool:
    """Whether two frozen values are equal. Objects of other classes are taken to be."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_agree, one, other))
    plain = isinstance(one, (*_PLAIN, *_CONTAINERS)) or isinstance(other, (*_PLAIN, *_CONTAINERS))
    return is_same(one, other) if plain else True


def _fill(container: Any, before: Any) -> None:
    """Give a container the contents of another one, past the code of its class, which Keras replaces."""
    kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    kind.clear(container)
    if kind is list:
        list.extend(container, before)
    else:
        kind.update(container, before)
