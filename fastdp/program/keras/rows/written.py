"""Finds what a model's own code writes besides variables while a trial runs it, and takes it back afterwards.

All replicas run the same Python object, so they would write to the same attribute at the same time, each the value of
its rows. A value that every pass writes alike (a table made at the first call) harms nothing, unless the next pass then
does something else. Any other one (a tensor kept for the loss, the number of rows, a counter of calls) is not what one
device would leave there.

Each pass of a trial begins with what was there before the trial. Assignments to layers (`self.scores = ...`) are noted
as they happen, so that one which a later assignment hides is found as well. What happens inside of lists, dicts and
sets, and outside of the layers (`fastdp.program.keras.rows.reached`), is found by comparing before and after each pass.
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
import torch

from fastdp.patching import Patch
from fastdp.program.keras.rows.reached import ABSENT, CONTAINERS, PLAIN, Key, Record, agree, frozen, record_of

_MASKS = frozenset(("_dropout_mask", "_recurrent_dropout_mask"))  # which replicas have of their own


class _Thread(threading.local):
    """What notes the assignments of this thread."""

    writes: Writes | None = None


_thread = _Thread()


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written: a layer and its attribute; without a layer a place outside of all layers."""

    layer: Any
    name: str


@dataclass(slots=True)
class Writes:
    """What the passes of a trial have written.

    Attributes:
        owners: the layers whose attributes are noted, by id.
        record: what the code reaches outside of the layers.
        runs: for each pass that has ended, the values that it has written.
        keeps: whether what a pass writes stays for the next one.
    """

    owners: dict[int, Any]
    record: Record
    runs: list[dict[Key, list[Any]]] = field(default_factory=list)
    keeps: bool = False
    _now: dict[Key, list[Any]] = field(default_factory=dict)
    _before: dict[Key, Any] = field(default_factory=dict)
    _contents: dict[Key, tuple[Any, Any]] = field(default_factory=dict)
    _names: dict[Key, Place] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> Writes:
        """The writes of a model's layers that are not Keras's own, of such metrics of its layers, and of their code."""
        every = [part for layer in model._flatten_layers() for part in (layer, *layer._metrics)]
        own = {id(one): one for one in every if not type(one).__module__.startswith(("keras.", "fastdp."))}
        writes = cls(own, record_of(model))
        for number, owner in writes.owners.items():
            for name, value in vars(owner).items():
                if isinstance(value, CONTAINERS) and name not in _names_of_keras():
                    writes._contents[number, name] = value, copy.copy(value)
        return writes

    def begin(self) -> None:
        """Forget the passes so far: others begin."""
        self.runs.clear()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what one pass writes. One that fails is not noted."""
        self._now = {}
        contents = {place: frozen(value) for place, (value, _) in self._contents.items()}
        before, _thread.writes = _thread.writes, self
        try:
            yield
            for key, (value, _) in self._contents.items():
                after = frozen(value)
                if not agree(contents[key], after):
                    self._add(key, Place(self.owners[key[0]], key[1]), after)
            for key, name, value in self.record.written():
                self._add(key, Place(None, name), value)
            self.runs.append(self._now)
        finally:
            _thread.writes = before
            if not self.keeps:
                self.take_back()

    def assigned(self, owner: Any, name: str, value: Any) -> None:
        """Called before an assignment to an attribute of any layer."""
        number = id(owner)
        if number not in self.owners or name in _names_of_keras() or isinstance(value, torch.nn.Module):
            return
        self._before.setdefault((number, name), vars(owner).get(name, ABSENT))
        self._add((number, name), Place(owner, name), frozen(value))

    def _add(self, key: Key, place: Place, value: Any) -> None:
        self._names.setdefault(key, place)
        self._now.setdefault(key, []).append(value)

    @property
    def wrote(self) -> bool:
        """Whether a pass has written something."""
        return any(self.runs)

    def found(self) -> Place | None:
        """The first place to which the passes have not written the same values; None if there is none.

        They may have added different keys to a dict that keeps what depends on shapes.
        """
        for key in dict.fromkeys(key for run in self.runs for key in run):
            written = [run[key] for run in self.runs if key in run]
            may_lack = key[0] in self.record.caches and self.record.is_new(key)
            if not (may_lack or len(written) == len(self.runs)) or not all(agree(one, written[0]) for one in written):
                return self._names[key]
        return None

    def moved_on(self) -> Place | None:
        """The first place where the latest pass, which began with what the one before it left, wrote something else."""
        first, second = self.runs[-2:]
        for key, written in second.items():
            if key not in first or not agree(first[key][-1], written[-1]):
                return self._names[key]
        return None

    def first(self) -> Place:
        """The first place to which a pass has written."""
        return self._names[next(key for run in self.runs for key in run)]

    def take_back(self) -> None:
        """Give everything the values from before the trial."""
        for (number, name), value in self._before.items():
            attributes = vars(self.owners[number])
            if value is not ABSENT:
                attributes[name] = value
            elif isinstance(attributes.get(name, ABSENT), (*PLAIN, *CONTAINERS, tuple)):
                del attributes[name]
        for value, before in self._contents.values():
            if not agree(frozen(value), frozen(before)):
                _fill(value, before)
        if next(self.record.written(), None) is not None:
            self.record.restore()


@contextmanager
def writes_of(model: Any) -> Iterator[Writes]:
    """Note what the model's own code writes in passes of this thread, and take it back at the end."""
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


def _fill(container: Any, before: Any) -> None:
    """Give a container the contents of another one, past the code of its class, which Keras replaces."""
    kind = next(kind for kind in CONTAINERS if isinstance(container, kind))
    kind.clear(container)
    if kind is list:
        list.extend(container, before)
    else:
        kind.update(container, before)
