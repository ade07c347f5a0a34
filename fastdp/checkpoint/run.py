"""`fastdp.Checkpoint`: exact checkpoints of loops that train torch modules or programs of NumPy functions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastdp.checkpoint import nest, shards
from fastdp.checkpoint.before import Before
from fastdp.checkpoint.generators import check_generators, read_generators, torch_side, write_generators
from fastdp.checkpoint.order import EpochData
from fastdp.checkpoint.signals import EndSignals
from fastdp.checkpoint.store import KEEP, Store
from fastdp.warn import warn_user

MODEL = "model.pt"
EXTRA = "extra "  # begins the names of parts that are given as `extra`
MINUTES = 10.0
T = TypeVar("T")


class Position(NamedTuple):
    """Where a run goes on: the epoch (from 0), the batches of it that are done, and the steps that were made so far."""

    epoch: int
    batch: int
    step: int


class Checkpoint:
    """Saves a run again and again, and lets the same script go on where it was killed, bit for bit.

    Args:
        folder: for this run's checkpoints; made where it is missing. Each is a folder in it, `step-00001234/`.
        model: a torch module, what `fastdp.wrap` has made of it, or a `FunctionProgram`.
        every_steps: save every so many steps.
        every_minutes: save every so many minutes. Without both: every 10 minutes.
        keep: how many of the newest to keep; None: all.
        step: the train step (`model.train_step(...)`), with its optimizers, scaler, counters and waiting gradients.
        optimizer: in a loop of your own: the optimizer, or a list of them.
        scheduler: learning-rate scheduler, or a list of them.
        scaler: in a loop of your own: the GradScaler.
        extra: further objects by name, each with `state_dict` and `load_state_dict`, such as a StatefulDataLoader.

    The states of the generators of Python, NumPy and torch are saved too. A snapshot is copied in the loop; a thread
    writes it while training goes on, at most one at a time. A checkpoint is whole or not there, and one whose files
    have changed is left out, with a warning. `model.pt` is what `torch.save(module.state_dict())` writes, and loads in
    plain torch. Nothing depends on the number of devices, but the bits of a sum: with the same number the run ends with
    the weights of one that was never killed, if captured steps do not change their form by the clock (`compile=None` or
    `deterministic=True`); with `fastdp.wrap(..., shards=8)` on any number. Another number of shards is told.

    Inside `with`, on the main thread, SIGTERM (a machine that is taken away) and Ctrl-C let the step end and save; then
    the process ends with status 143, or KeyboardInterrupt is raised. A second signal does not wait. A handler of your
    own runs after the saving; if it returns, the loop goes on.

    Raises:
        ValueError, TypeError: an argument is of no use.
        RuntimeError: another process writes into the folder.
        OSError: the folder cannot be made or written to. If a checkpoint cannot be written later (the disk is full),
            the next step raises it; caught, the loop can go on, and the next one tries anew. At the end of `with`, and
            after a signal, that is a warning, and the last one is tried.

    Example:
        >>> with fastdp.Checkpoint("run", model=model, step=step, every_minutes=10) as checkpoint:  # doctest: +SKIP
        ...     checkpoint.restore()
        ...     for epoch in checkpoint.epochs(90):
        ...         for x, y in checkpoint.batches(loader):
        ...             step(x, y)
        ...             checkpoint.step()
    """

    def __init__(
        self,
        folder: Any,
        *,
        model: Any,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int | None = KEEP,
        step: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = _stateful("model", model)
        named = {"step": step, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        self._parts = {name: _list_of(name, part) for name, part in named.items() if part is not None}
        for name, part in (extra or {}).items():
            self._parts[f"{EXTRA}{name}"] = [_stateful(f"extra[{name!r}]", part)]
        if every_steps is None and every_minutes is None:
            every_minutes = MINUTES
        self._store = Store(folder, every_steps, every_minutes, keep)
        self._signals = EndSignals()
        self._position = Position(0, 0, 0)
        self._data: EpochData[Any] | None = None
        self._resumed: Mapping[str, Any] = {"data": None, "generators": None}
        self._saved: Position | None = None

    @property
    def position(self) -> Position:
        """Where the run is: epoch, batches done in it, steps so far."""
        return self._position

    def __enter__(self) -> Checkpoint:
        self._signals.hold()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Save the end of the run, and close. After an error nothing is saved: the state may be of half a step."""
        if kind is None:
            try:
                if self._position != self._saved:
                    self._save(last=True)
                self._end_if_told()
            finally:
                self.close()
            return
        try:
            self.close()
        except OSError as error:
            warn_user(str(error))

    def close(self) -> None:
        """Wait until everything is written, and let others have the folder. May be called again.

        Raises:
            OSError: a checkpoint could not be written.
        """
        self._signals.release()
        self._store.close()

    # The loop.

    def restore(self) -> Position | None:
        """Load the newest whole checkpoint, if there is one. Call it before the first step.

        One whose content cannot be loaded, though its checksums are right, is left out with a warning, and the one
        before it is loaded.

        Returns:
            The position where the run goes on; None if there is no checkpoint.

        Raises:
            ValueError, TypeError, RuntimeError: none can be loaded, since they are of another model or other parts than
                this one, or damaged. The model and all parts are as before, but for objects in `extra`.
            OSError: the machine does not let it be read (rights, memory).
        """
        library, before = torch_side(), list[Before]()

        def load(place: Path) -> Mapping[str, Any]:
            state = _read(place, library)
            with nest.loading(place):
                _check_parts(place, state["parts"], self._parts)
                if not before:
                    before.append(Before(self._own_parts(), library))
                self._load(state)
            return {**state, "place": place}

        def undo() -> None:
            for one in before:
                one.give_back()

        state = self._store.restore(load, undo)
        if state is None:
            return None
        shards.warn_of_others(state["place"], state, self._model)
        self._resumed = {"data": state["data"], "generators": state["generators"]}
        self._position = self._saved = state["position"]
        return self._position

    def _own_parts(self) -> list[Any]:
        """The model and what belongs to it. To read the state of other objects may begin something, as workers."""
        named = [parts for name, parts in self._parts.items() if not name.startswith(EXTRA)]
        return [self._model, *(part for parts in named for part in parts)]

    def _load(self, state: Mapping[str, Any]) -> None:
        """Give everything its state."""
        self._model.load_state_dict(state["model"])
        for name, parts in self._parts.items():
            for part, saved in zip(parts, state["parts"][name], strict=True):
                part.load_state_dict(saved)
        write_generators(state["generators"])

    def epochs(self, count: int) -> Iterator[int]:
        """The numbers of the epochs from where the run is, up to `count` in all."""
        while self._position.epoch < count:
            epoch = self._position.epoch
            yield epoch
            if self._position.epoch == epoch:
                self._position = Position(epoch + 1, 0, self._position.step)
                self._data = None

    def batches(self, data: Iterable[T]) -> Iterator[T]:
        """The batches of one epoch, after a restart without those that are done.

        Args:
            data: a DataLoader, or anything that can be iterated anew and whose order is that of torch's, NumPy's or
                Python's generators, or of the loader's own.

        Raises:
            TypeError: an iterator.
            ValueError: there are fewer batches than are done.
        """
        resumed, self._resumed = self._resumed, {"data": None, "generators": None}
        self._data = EpochData(data, resumed["data"], resumed["generators"])
        yield from self._data

    def step(self, *, epoch: int | None = None, batch: int | None = None) -> None:
        """Say that a step is over, and save if it is time.

        Args:
            epoch, batch: the numbers, from 0, of the epoch and of the batch in it that the step has trained on. Not
                needed inside `epochs` and `batches`, which count.

        Raises:
            OSError: the checkpoint before could not be written; its path is in the message.
            ValueError: the folder has checkpoints of another run.
            TypeError: a part's state is no plain data.
        """
        before = self._position
        counted = self._data.taken if self._data is not None else before.batch + 1
        done = counted if batch is None else batch + 1
        self._position = Position(before.epoch if epoch is None else epoch, done, before.step + 1)
        if self._store.due(self._position.step) or self._signals.came:
            self._save(last=self._signals.came)
            self._end_if_told()

    def _end_if_told(self) -> None:
        """After a signal: wait until all is written, and let it end the run."""
        if self._signals.came:
            self._store.settle_all()
            self._signals.deliver(f"saved {self._store.latest}")

    def save(self) -> None:
        """Save now: copy everything, and let a thread write it.

        Raises:
            OSError, ValueError, TypeError: as `step`.
        """
        self._save(last=False)

    def _save(self, *, last: bool) -> None:
        """`last`: as in `Store.save`."""
        self._saved = self._position
        if not self._store.leads:
            return
        library = torch_side()
        model = self._model.state_dict()
        weights, rest = library.split_state(model) if library is not None else ({}, model)
        packed = nest.pack(
            {
                "position": tuple(self._position),
                shards.KEY: shards.shards_of(self._model),
                "model": rest,
                "parts": {name: [part.state_dict() for part in parts] for name, parts in self._parts.items()},
                "generators": read_generators(),
                "data": self._data.state_dict() if self._data is not None else None,
            },
            library,
        )

        def fill(folder: Path) -> None:
            packed.write(folder)
            if weights:
                library.write_state(weights, folder / MODEL)

        self._saved = None
        self._store.save(self._position.step, fill, last=last)
        self._saved = self._position


def _read(place: Path, library: Any) -> dict[str, Any]:
    """What a checkpoint holds, its position as one, the model's state as a whole. Nothing changes.

    Raises:
        ValueError: the content is not what was written.
    """
    with nest.reading(place):
        state = nest.read(place, library)
        weights = _weights(place / MODEL, library) if (place / MODEL).exists() else {}
        position = Position(*(operator.index(number) for number in state["position"]))
        model, parts = {**weights, **state["model"]}, {**state["parts"]}
        check_generators(state["generators"])
        if state["data"] is not None:
            operator.index(state["data"]["taken"])
            check_generators(state["data"]["generators"])
        return {**state, "position": position, "model": model, "parts": parts}


def _weights(path: Path, library: Any) -> Mapping[str, Any]:
    """The tensors of `model.pt`."""
    nest.check_stored(path)
    state: Mapping[str, Any] = library.read_state(path)
    return state


def _stateful(name: str, part: Any) -> Any:
    """Check that an argument has a state."""
    if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
        raise TypeError(
            f"`{name}` must have `state_dict` and `load_state_dict`, as torch's objects have. Received an object of "
            f"type {type(part).__name__}."
        )
    return part


def _list_of(name: str, part: Any) -> list[Any]:
    """One part, or several."""
    parts = list(part) if isinstance(part, (list, tuple)) else [part]
    return [_stateful(name, one) for one in parts]


def _check_parts(place: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the parts of this run, before anything changes."""
    theirs, ours = ({name: len(parts) for name, parts in one.items()} for one in (saved, own))
    if theirs != ours:
        raise ValueError(
            f"The checkpoint {place} has the parts {theirs or 'none'} (names and numbers), and this run has "
            f"{ours or 'none'}. Give `fastdp.Checkpoint` the same parts as before."
        )
