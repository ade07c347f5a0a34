"""A flat list of Python values that must stay as they are, compared in one fast pass.

`fastdp.capture.reach` finds the places. Values that `==` compares reliably are compared by `==`, which checks identity
first. Tensors, arrays and containers are compared by identity, and their contents separately: tensors by version and
address (small ones in host memory also by content), arrays by content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter, methodcaller
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fastdp.capture.snapshots import Snapshot, copied, refill

MOST_PLACES = 20_000
MOST_NBYTES = 1 << 16  # limit for all contents that are compared
SMALL_NBYTES = 1 << 12  # limit for a tensor that is also compared by content
_version, _address, _content = attrgetter("_version"), methodcaller("data_ptr"), methodcaller("tobytes")
# A key, an attribute or the content of a cell is gone, or a value's own `==` gives no bool.
_NO_ANSWER = (LookupError, AttributeError, ValueError, TypeError, RuntimeError)


@dataclass(slots=True)
class _Places:
    """Places of one kind: `read(sources)` returns the present values, `then` holds the expected ones."""

    read: Callable[[list[Any]], list[Any]]
    sources: list[Any] = field(default_factory=list)
    then: list[Any] = field(default_factory=list)
    what: list[str] = field(default_factory=list)

    def add(self, source: Any, what: str) -> None:
        """Add a place with its present value as the expected one."""
        self.sources.append(source)
        self.then += self.read([source])
        self.what.append(what)

    def same(self) -> bool:
        """Whether all values are unchanged."""
        try:
            return self.read(self.sources) == self.then
        except _NO_ANSWER:
            return False

    def changes(self) -> list[int]:
        """The numbers of the places that have changed."""
        own = [_Places(self.read, [source], [then]) for source, then in zip(self.sources, self.then, strict=True)]
        return [i for i, one in enumerate(own) if not one.same()]


class Watch:
    """Places, and their values when they were added.

    `refused` names something that cannot be compared before each step; empty if everything can be. `generators` are
    the random generators that the walk has met, with their names: they are not compared. `by_version` are the tensors
    that are not compared by content, with their names: writes through `.data` or NumPy do not count as versions.
    """

    def __init__(self) -> None:
        self.refused = ""
        self.generators: list[tuple[Any, str]] = []
        self.by_version: list[tuple[torch.Tensor, str]] = []
        self._answers = _Places(lambda sources: [ask() for ask in sources])
        self._marked: dict[int, tuple[Callable[[], Any], Any]] = {}  # by the number of the mark among the answers
        self._values = _Places(lambda sources: [get(owner) for get, owner in sources])
        self._objects = _Places(lambda sources: [id(get(owner)) for get, owner in sources])
        self._sizes = _Places(lambda sources: list(map(len, sources)))
        self._elements = _Places(lambda sources: [[*map(id, source)] for source in sources])
        self._versions = _Places(lambda sources: list(map(_version, sources)))
        self._addresses = _Places(lambda sources: list(map(_address, sources)))
        self._contents = _Places(lambda sources: list(map(_content, sources)))
        self._of_many: dict[str, _Places] = {}  # by the attribute's name
        self._kinds = [
            self._answers,
            self._values,
            self._objects,
            self._sizes,
            self._elements,
            self._versions,
            self._addresses,
            self._contents,
        ]
        self._names: list[Sequence[Any]] = []  # the keys of each place of `_values`
        self._snapshots: list[list[Snapshot]] = []  # of the values of each
        self._held: list[tuple[Any, Any]] = []  # the key and the object of each place of `_objects`
        self._held_in: list[list[Any]] = []  # the objects of each place of `_elements`
        self._keys: list[list[Any]] = []  # of each place of `_sizes`
        self._class_of: dict[int, tuple[Any, type]] = {}  # by the identity of the view of its attributes
        self._count = self._nbytes = 0

    # What to watch.

    def values(self, owner: Any, names: Sequence[Any], what: str) -> None:
        """Watch the values under keys of a mapping by `==`, including the contents of containers."""
        if names and self._has_room(len(names), what):
            self._values.add((itemgetter(*names), owner), what)
            self._names.append(names)
            self._snapshots.append([Snapshot(owner[name]) for name in names])
            self._values.then[-1] = copied(self._values.then[-1])

    def object(self, owner: Any, key: Any, what: str) -> None:
        """Watch that `owner[key]` stays the same object."""
        if self._has_room(1, what):
            self._objects.add((itemgetter(key), owner), what)
            self._held.append((key, owner[key]))

    def attribute(self, owner: Any, name: str, what: str, by_value: bool) -> None:
        """Watch an attribute of an object without a mapping of attributes, by `==` or by identity."""
        if self._has_room(1, what):
            places = self._values if by_value else self._objects
            places.add((attrgetter(name), owner), what)
            if by_value:
                places.then[-1] = copied(places.then[-1])
                self._names.append([name])
                self._snapshots.append([Snapshot(getattr(owner, name))])
            else:
                self._held.append((name, getattr(owner, name)))

    def size(self, owner: Any, what: str) -> None:
        """Watch the number of keys of a mapping."""
        if self._has_room(1, what):
            self._sizes.add(owner, what)
            self._keys.append(list(owner))

    def writable_by(self, attributes: Any, cls: type) -> None:
        """Tell that the values of a mapping, which only reads, are restored as attributes of a class."""
        self._class_of[id(attributes)] = attributes, cls

    def elements(self, container: Any, what: str) -> None:
        """Watch that a list, set or deque holds the same objects."""
        if self._has_room(len(container), what):
            self._elements.add(container, what)
            self._held_in.append(list(container))

    def tensor(self, tensor: torch.Tensor, what: str) -> None:
        """Watch a tensor's version and address; also its content if it is small and in host memory."""
        if tensor.is_inference():
            self.refused = self.refused or (
                f"{what}, a tensor made in torch.inference_mode(), whose changes torch does not count"
            )
        elif tensor.layout == torch.strided and self._has_room(1, what):
            self._versions.add(tensor, what)
            self._addresses.add(tensor, what)
            nbytes = tensor.numel() * tensor.element_size()
            plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
            if 0 < nbytes <= min(SMALL_NBYTES, MOST_NBYTES - self._nbytes) and tensor.device.type == "cpu":
                self._nbytes += nbytes
                if plain:
                    self._contents.add(_bytes_of(tensor), what)
                else:
                    self.answer(lambda: _bytes_of(tensor.contiguous()).tobytes(), what)
            elif nbytes:
                self.by_version.append((tensor, what))

    def array(self, array: np.ndarray, what: str) -> None:
        """Watch an array's content. Skips arrays that nobody can write to, by this one or by another."""
        if not _is_writeable(array):
            return
        if array.dtype.hasobject or self._nbytes + array.nbytes > MOST_NBYTES:
            self.refused = self.refused or (
                f"{what}, an array too large to compare before each step: call array.setflags(write=False) if it "
                "never changes"
            )
        elif self._has_room(1, what):
            self._nbytes += array.nbytes
            self._contents.add(array, what)

    def memory(self, value: Any, what: str) -> None:
        """Watch the content of an object that lends its memory: a bytearray, an array, a number of ctypes."""
        if self._nbytes + memoryview(value).nbytes > MOST_NBYTES:
            self.refused = self.refused or f"{what}, too much memory to compare before each step"
            return
        self._nbytes += memoryview(value).nbytes
        self.answer(lambda: memoryview(value).tobytes(), what)  # a lasting view would keep its owner from growing

    def attribute_of_many(self, owner: Any, name: str, what: str) -> None:
        """Watch an attribute that many objects have, by `==`. Faster than `attribute`, but not restored."""
        if self._has_room(1, what):
            places = self._of_many.get(name)
            if places is None:
                read = attrgetter(name)
                places = self._of_many[name] = _Places(lambda sources: list(map(read, sources)))
                self._kinds.append(places)
            places.add(owner, what)
            places.then[-1] = copied(places.then[-1])

    def answer(self, ask: Callable[[], Any], what: str, mark: Callable[[], Any] | None = None) -> None:
        """Watch the result of a function by `==`; not restored. With a `mark`, it is called only after that changed."""
        if not self._has_room(1, what):
            return
        if mark is not None:
            self._marked[len(self._answers.sources)] = ask, ask()
        self._answers.add(mark or ask, what)

    def _has_room(self, count: int, what: str) -> bool:
        self._count += count
        if self._count > MOST_PLACES:
            self.refused = self.refused or f"{what}: more than {MOST_PLACES} values to compare before each step"
        return self._count <= MOST_PLACES

    @property
    def tensors(self) -> list[tuple[torch.Tensor, str]]:
        """The watched tensors, with their names."""
        return list(zip(self._versions.sources, self._versions.what, strict=True))

    # Comparing.

    def changed(self) -> str:
        """The name of a place that has changed; empty if none has."""
        try:  # inlined: this runs before each step
            for kind in self._kinds:
                if kind.sources and kind.read(kind.sources) != kind.then:
                    break
            else:
                return ""
        except _NO_ANSWER:
            pass
        for kind in self._kinds:
            for i in kind.changes() if not kind.same() else ():
                if kind is not self._answers or not self._has_moved_alone(i):
                    return f"{kind.what[i]}{self._which(i) if kind is self._values else ''}"
        return ""

    def changes(self) -> set[str]:
        """The names of all places that have changed."""
        found: set[str] = set()
        for kind in self._kinds:
            for i in kind.changes() if not kind.same() else ():
                if kind is self._values:
                    found.update(f"{kind.what[i]}.{name}" for name in self._names[i] if self._differs(i, name))
                elif kind is not self._answers or not self._has_moved_alone(i):
                    found.add(kind.what[i])
        return found

    def _differs(self, i: int, name: Any) -> bool:
        """Whether one of the values of a mapping has changed."""
        owner, then = self._values.sources[i][1], dict(zip(self._names[i], self._then(i), strict=True))
        read = self._values.sources[i][0] if len(self._names[i]) == 1 else itemgetter(name)
        return not _Places(self._values.read, [(read, owner)], [then[name]]).same()

    def _has_moved_alone(self, i: int) -> bool:
        """Whether an answer is a mark that has changed while its function's result has not. Then accepts the mark."""
        if i not in self._marked:
            return False
        ask, then = self._marked[i]
        mark = self._answers.sources[i]()
        if ask() != then:
            return False
        self._answers.then[i] = mark
        return True

    def _which(self, i: int) -> str:
        """Which of the values of one mapping has changed."""
        owner, names = self._values.sources[i][1], self._names[i]
        if len(names) == 1:
            return f".{names[0]}"
        for name, then in zip(names, self._then(i), strict=True):
            if not _Places(self._values.read, [(itemgetter(name), owner)], [then]).same():
                return f".{name}"
        return ""

    def _then(self, i: int) -> Sequence[Any]:
        """The expected values under the keys of one mapping."""
        return self._values.then[i] if len(self._names[i]) > 1 else [self._values.then[i]]

    def restore(self) -> None:
        """Restore all expected values that can be written, after a run that must have no effects."""
        for i in self._values.changes():
            values = [snapshot.restored() for snapshot in self._snapshots[i]]
            _put(self._owner(self._values.sources[i][1]), dict(zip(self._names[i], values, strict=True)))
        for i in self._objects.changes():
            _put(self._owner(self._objects.sources[i][1]), dict([self._held[i]]))
        for mapping, keys in zip(self._sizes.sources, self._keys, strict=True):
            owner, known = self._owner(mapping), set(keys)
            if isinstance(owner, dict):
                refill(owner, {key: owner[key] for key in keys if key in owner})
            elif isinstance(owner, type):
                for key in [key for key in mapping if key not in known]:
                    delattr(owner, key)
        for i in self._elements.changes():
            refill(self._elements.sources[i], self._held_in[i])
        for i in self._contents.changes():
            array = self._contents.sources[i]
            array[...] = np.frombuffer(self._contents.then[i], array.dtype).reshape(array.shape)

    def _owner(self, place: Any) -> Any:
        """What to write to in order to restore a place."""
        return self._class_of[id(place)][1] if id(place) in self._class_of else place


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor without gaps; not a copy."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy()


def _is_writeable(array: np.ndarray) -> bool:
    """Whether the values of an array may change: it may be a view that only reads."""
    while isinstance(array, np.ndarray) and not array.flags.writeable:
        if array.base is None:
            return False
        array = array.base
    return not isinstance(array, bytes)


def _put(owner: Any, items: dict[Any, Any]) -> None:
    """Write to the owner of a place: a dict, a list, or an object such as a closure's cell or a class."""
    for key, value in items.items():
        if isinstance(owner, (dict, list)):
            owner[key] = value
        elif isinstance(owner, type):
            if vars(owner).get(key) is not value:  # writing to a class empties the interpreter's caches of it
                setattr(owner, key, value)
        elif not isinstance(owner, MappingProxyType):  # the attributes of a library's class
            setattr(owner, key, value)
