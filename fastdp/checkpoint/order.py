"""The order of the data: an epoch's batches come again, from the generators' states at its beginning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from fastdp.checkpoint.generators import read_generators, write_generators

T = TypeVar("T")


class EpochData(Generic[T]):
    """The batches of one epoch, counted.

    Args:
        data: what can be iterated anew: a DataLoader, a list.
        resumed: what `state_dict` has returned in the run before, to go on after the batches that it had taken. They
            are fetched again and dropped.
        after: the states of the process's generators to set then.

    Raises:
        TypeError: an iterator, which cannot be iterated anew.
        ValueError: there are fewer batches than were taken.
    """

    def __init__(self, data: Any, resumed: Mapping[str, Any] | None, after: Mapping[str, Any]) -> None:
        if isinstance(data, Iterator) or getattr(data, "is_iterator", False):  # a `PrefetchedLoader` of one
            raise TypeError(
                "`data` must be something that can be iterated anew, such as a DataLoader. Received an iterator of "
                f"type {type(data).__name__}, whose batches cannot come again after a restart."
            )
        self.taken = 0
        self._own = own_generators(data)
        if resumed is None:
            self._begin = self._read()
            self._batches: Iterator[T] = iter(data)
            return
        self._begin = {"generators": resumed["generators"], "own": resumed["own"]}
        write_generators(resumed["generators"])
        for generator, state in zip(self._own, resumed["own"], strict=True):
            generator.set_state(state)
        self._batches = iter(data)
        self._skip(resumed["taken"])
        write_generators(after)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        batch = next(self._batches)
        self.taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What the same batches need to come again."""
        return {"taken": self.taken, **self._begin}

    def _read(self) -> dict[str, Any]:
        return {"generators": read_generators(), "own": [generator.get_state() for generator in self._own]}

    def _skip(self, count: int) -> None:
        for _ in range(count):
            try:
                next(self)
            except StopIteration:
                raise ValueError(
                    f"`data` has {self.taken} batches, and the checkpoint was made after {count} of them: it is other "
                    "data than before, or is cut into other batches."
                ) from None


def own_generators(data: Any) -> list[Any]:
    """The generators that a DataLoader and its sampler have for themselves."""
    found = (getattr(data, "generator", None), getattr(getattr(data, "sampler", None), "generator", None))
    own = {id(one): one for one in found if hasattr(one, "get_state") and hasattr(one, "set_state")}
    return list(own.values())
