"""`fastdp.data.prefetch`: the batches of any loader, read ahead in a thread where results stay what they are."""

from __future__ import annotations

import contextlib
import operator
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from fastdp.data.ahead_guard import Guard, why_not_ahead
from fastdp.data.batch_copies import Repeats, each_copied
from fastdp.data.read_ahead import AHEAD
from fastdp.data.ring import Ring
from fastdp.data.thread_settings import modes_of_caller

T = TypeVar("T")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class PrefetchedLoader(Generic[T]):
    """A loader whose batches are read ahead; see `prefetch`. Attributes that it lacks are the loader's."""

    def __init__(
        self, loader: Iterable[T], batches: int, timeout: float, dtype: str | None, name: str, why: str | None
    ) -> None:
        self.loader = loader
        self._count, self._timeout, self._dtype, self._name = batches, timeout, dtype, name
        self._own = makes_new_batches(loader)
        self._repeats = Repeats()
        self._guard: Guard | None = Guard(why)
        self._held: Iterator[T] = iter(())
        self._entry: dict[str, Any] = {"array": "", "batches": 0, "read_ahead": 0, "waited_seconds": 0.0}
        self._seconds = 0.0

    def trust(self) -> None:
        """From now on, nothing is looked at: batches are read ahead in any case."""
        self._guard = None

    def __len__(self) -> int:
        """The loader's number of batches.

        Raises:
            TypeError: it does not tell.
        """
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def is_iterator(self) -> bool:
        """Whether the loader is an iterator, which goes on where the last loop has left it."""
        return isinstance(self.loader, Iterator)

    def __iter__(self) -> Iterator[T]:
        """One pass over the loader. The thread ends with the loop, also by `break` or an error."""
        source = iter(self.loader)
        held = self._held if self.is_iterator else iter(())
        taken = each_copied(source, self._dtype, self._repeats, copies=not self._own)
        ring = Ring(chain(held, taken), self._count, self._name, self._timeout)
        total, guard, began = _length(self.loader), self._guard, time.perf_counter()
        if guard is not None:
            guard.begin()
            guard.why = guard.why or modes_of_caller()

        def further() -> int:
            if guard is not None:
                guard.why = guard.why or self._repeats.found
                if not guard.allows():
                    return 0
            return self._count if total is None else max(0, total - ring.taken)

        try:
            while True:
                try:
                    batch = ring.take(further)
                except StopIteration:
                    return
                yield batch
                del batch
        finally:
            self._note(ring, time.perf_counter() - began)
            if self.is_iterator:
                self._held = ring.leave() or held
            else:
                ring.close()

    def report(self) -> dict[str, Any]:
        """How all passes so far got their batches.

        Returns:
            `how`: by whom, and why not ahead, if so; `batches`, of which a thread took `read_ahead`;
            `waited_seconds` in which the loop waited, `wait_per_step`, and the `share` of the loops' time.
        """
        return {**self._entry, **waiting(self._entry, self._seconds), "how": self._how()}

    def _how(self) -> str:
        if not self._count:
            workers = getattr(self.loader, "num_workers", 0)
            return f"{self._name}: by its {workers} worker processes" if workers else f"{self._name}: not ahead"
        if self._guard is not None and self._guard.why is not None:
            return f"{self._name}: not ahead, since {self._guard.why}"
        return f"{self._name}: by a thread, {self._count} batches ahead"

    def _note(self, ring: Ring[T], seconds: float) -> None:
        self._seconds += seconds
        for name, value in (("batches", ring.taken), ("read_ahead", ring.read_ahead), ("waited_seconds", ring.waited)):
            self._entry[name] += value


def waiting(entry: dict[str, Any], seconds: float) -> dict[str, float]:
    """`wait_per_step` in seconds, and the `share` of so many seconds that went into waiting."""
    waited = entry["waited_seconds"]
    return {
        "wait_per_step": waited / max(1, entry["batches"]),
        "share": min(1.0, waited / seconds) if seconds > 0 else 0.0,
    }


def _length(loader: Any) -> int | None:
    """The number of batches; None if the loader does not tell."""
    try:
        return len(loader)
    except TypeError:  # no `__len__`, or one of an iterable data set without a length
        return None


def _torch_data() -> Any:
    return sys.modules.get("torch.utils.data")


def is_loader(loader: Any) -> bool:
    data = _torch_data()
    return data is not None and isinstance(loader, data.DataLoader)


def makes_new_batches(loader: Any) -> bool:
    """Whether each batch is made of new tensors: by torch's own function, or in another process."""
    if not is_loader(loader):
        return False
    return loader.num_workers > 0 or (
        loader.batch_size is not None and loader.collate_fn is _torch_data().default_collate
    )


def runs_no_code_of_users(loader: Any) -> bool:
    """Whether a DataLoader only picks rows from tensors, in an order by torch: nothing of the user's runs for it."""
    if type(loader) is not _torch_data().DataLoader or not makes_new_batches(loader):
        return False
    samplers = (loader.sampler, loader.batch_sampler)
    return _is_tensors(loader.dataset) and all(type(one).__module__ == "torch.utils.data.sampler" for one in samplers)


def _is_tensors(dataset: Any) -> bool:
    data = _torch_data()
    if type(dataset) is data.Subset:
        return _is_tensors(dataset.dataset)
    return type(dataset) is data.TensorDataset


def described(loader: Any) -> str:
    """What a source of batches is, in words."""
    if is_loader(loader):
        return f"a DataLoader of {type(loader.dataset).__name__}"
    name = getattr(loader, "__qualname__", None) or type(loader).__qualname__
    return f"the generator {name}" if hasattr(loader, "gi_frame") else f"{type(loader).__module__}.{name}"


def prefetch(
    loader: Iterable[T],
    batches: int = AHEAD,
    *,
    timeout: float = 1800.0,
    dtype: Any = None,
    trust: bool = False,
) -> PrefetchedLoader[T]:
    """The batches of a loader, in its order, of which a thread reads the next ones while the loop works.

    For loops of your own; `fit`, `evaluate` and `predict` of a parallel model do this by themselves.

    Args:
        loader: a DataLoader, a grain, Hugging Face or WebDataset data set or loader, a generator: any iterable of
            batches. One iterator of it is used for each loop, and only one thread at a time runs its code.
        batches: how many are read ahead at most; 0 reads each when it is asked for. So many more are in memory.
        timeout: seconds that one batch may take.
        dtype: a floating dtype (`"float32"`, `torch.bfloat16`) to which floating arrays and tensors are cast in the
            thread. Others stay as they are: images in uint8 are cast on the devices.
        trust: read ahead without looking whether results stay the same: you know that making a batch draws from no
            generator of the process, and reads nothing that the loop changes.

    Returns:
        An iterable with the loader's length and attributes, and `report()`. A pass that ends early, by `break` or an
        error, ends its thread. If the loader is an iterator, the next loop over this object begins with the batches
        that were read and not used.

    Batches come one by one as they would without it, with the same bits. Not read ahead are: a DataLoader with
    workers, which read ahead themselves; code that refers to a model or an optimizer; and all while a generator of
    random numbers (Python's, NumPy's, torch's) moves between the first batch of a pass and the next ones, by data or
    by the loop. `report()` says so. Batches of the user's code are copies, so it may fill the same arrays again.

    Raises:
        TypeError: `loader` is no iterable, or `batches` no int.
        ValueError: negative `batches`, a `timeout` that is not above 0, or a `dtype` that is not floating.
        DeviceTimeoutError: in the loop: a batch took longer than `timeout`.

    What the loader raises comes in the loop in place of its batch, with its own traceback.

    Example:
        >>> from fastdp.data import prefetch
        >>> [sum(batch) for batch in prefetch([[1, 2], [3]])]
        [3, 3]
    """
    if not any(hasattr(type(loader), method) for method in ("__iter__", "__getitem__")):
        raise TypeError(f"`loader` must be an iterable of batches. Received: a {type(loader).__name__}.")
    if not hasattr(type(batches), "__index__"):
        raise TypeError(
            f"`batches` must be a whole number: how many are read ahead. Received: {type(batches).__name__}."
        )
    count = operator.index(batches)
    if count < 0:
        raise ValueError(f"`batches` must be 0 or more: how many are read ahead. Received: batches={batches}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"`timeout` must be a number of seconds above 0. Received: timeout={timeout!r}")
    cast = None if dtype is None else _name_of(dtype)
    works = is_loader(loader) and loader.num_workers > 0  # type: ignore[attr-defined]
    count = 0 if works else count
    own = count and is_loader(loader) and runs_no_code_of_users(loader)
    why = why_not_ahead([loader]) if count and not own and not trust else None
    made = PrefetchedLoader(loader, count, timeout, cast, described(loader), why)
    if own or trust:
        made.trust()
    return made


def _name_of(dtype: Any) -> str:
    """The name of a floating dtype of NumPy or torch.

    Raises:
        ValueError: it is another one.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOATS:
        with contextlib.suppress(TypeError):  # NumPy knows no type of that name
            name = np.dtype(dtype).name if isinstance(dtype, (str, type, np.dtype)) else name
    if name not in _FLOATS:
        raise ValueError(f"`dtype` must be one of {', '.join(_FLOATS)}. Received: dtype={dtype!r}")
    return name
