"""`fastdp.callbacks.Checkpoint`: a `fit` that is killed at any moment goes on bit for bit."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdp.checkpoint import nest, shards
from fastdp.checkpoint.generators import check_generators, read_generators, torch_side, write_generators
from fastdp.checkpoint.run import MINUTES
from fastdp.checkpoint.signals import EndSignals
from fastdp.checkpoint.store import KEEP, Store, check_arguments
from fastdp.keras.checkpoint import model_file
from fastdp.keras.checkpoint.callback_states import CallbackStates
from fastdp.keras.checkpoint.epochs import FitLoop
from fastdp.keras.fit.callbacks import WritesFiles
from fastdp.warn import warn_user


class Checkpoint(WritesFiles):
    """Saves a `fit` again and again: of a parallel model, of a plain one, and under `fastdp run`.

    The same script, started again, goes on where it was: weights, optimizer, loss scale, epoch, place in the epoch and
    order of its data, metrics, history, states of callbacks and of all generators. With `compile=None` or
    `deterministic=True`, on as many devices as before, the run ends with the bits of one that was never killed; with
    `fastdp.wrap(..., shards=8)` on any number of devices.

    Args:
        folder: for this run's checkpoints; made where it is missing. Each is a folder in it, `step-00001234/`, with a
            plain `model.keras`.
        every_steps: save every so many steps.
        every_minutes: save every so many minutes. Without both: every 10 minutes.
        keep: how many of the newest to keep; None: all.

    Put it behind the other callbacks: what these do at the end of `fit` is then saved too. The model must be built and
    compiled as before. A snapshot is copied between two batches; a thread writes it while training goes on. `fit` ends
    with a last one, so another start of a run that is over trains no more. Batches that are done are fetched again and
    dropped, without a step. Data that cannot come again (generators, an IterableDataset, a PyDataset that changes from
    epoch to epoch and has no `state_dict`) let the epoch begin anew, with a warning. `on_epoch_begin` of callbacks is
    called again in the epoch that goes on. States of callbacks: those of Keras, and what others give by `state_dict`.

    On the main thread, SIGTERM (a machine that is taken away) and Ctrl-C let the step end, and validation if it runs,
    and save; then the process ends with status 143, or KeyboardInterrupt is raised. A second signal does not wait. A
    handler of your own runs after the saving; if it returns, `fit` goes on.

    Raises:
        ValueError, TypeError: an argument is of no use, the run is over, or the checkpoint is of another model.
        RuntimeError: another process writes into the folder; the model is not built.
        OSError: the folder cannot be written to. If a checkpoint cannot be written (the disk is full), `fit` ends with
            it at the next step. At its end, and after a signal, that is a warning, and the last one is tried.

    Example:
        >>> checkpoint = fastdp.callbacks.Checkpoint("run", every_minutes=10)  # doctest: +SKIP
        >>> parallel.fit(x, y, epochs=90, callbacks=[checkpoint])  # doctest: +SKIP
    """

    writes_alone = False  # all processes read and end together

    def __init__(
        self,
        folder: Any,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int | None = KEEP,
    ) -> None:
        super().__init__()
        check_arguments(folder, every_steps, every_minutes, keep)
        if every_steps is None and every_minutes is None:
            every_minutes = MINUTES
        self._folder, self._options = folder, (every_steps, every_minutes, keep)
        self._store: Store | None = None
        self._loop: FitLoop | None = None
        self._epoch = self._step = self._begun = 0
        self._over = False
        self._signals = EndSignals()

    def close(self) -> None:
        """Wait until everything is written, and let others have the folder.

        Raises:
            OSError: a checkpoint could not be written.
        """
        self._signals.release()
        store, self._store, self._loop = self._store, None, None
        if store is not None:
            self._release.detach()
            store.close()

    # What Keras calls.

    def on_train_begin(self, logs: Any = None) -> None:
        """Load the newest checkpoint, if there is one."""
        if self._over:
            raise ValueError(
                f"`callbacks` has a Checkpoint whose run is over: {self._folder}. A folder belongs to one `fit`: give "
                "each `fit` of a script its own fastdp.callbacks.Checkpoint, with a folder of its own."
            )
        self.close()
        self._store = Store(self._folder, *self._options)
        self._release = weakref.finalize(self, _abandon, self._store, self._signals)
        me = weakref.ref(self)  # Keras keeps the loop's iterator
        self._loop = FitLoop(self.model, lambda batch: _alive(me)._before_batch(batch))
        self._signals.hold(self._loop.code)
        self._states: CallbackStates | None = None
        self._epoch = self._step = self._begun = 0
        try:
            self._restore(self._store)
        except BaseException:
            self.close()
            raise

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note the epoch. Another `fit` begins where it is told to."""
        self._epoch = epoch
        self.model._initial_epoch = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Note that the epoch is over."""
        self._epoch = epoch + 1
        assert self._loop is not None
        self._step += self._loop.latest  # the last ones of the epoch

    def on_train_end(self, logs: Any = None) -> None:
        """Save the end of the run, and close."""
        self.model._initial_epoch = None
        if self._step > self._begun:
            self._save(0, last=True)
        self._over = True
        try:
            self._end_if_told()
        finally:
            self.close()

    # Saving and restoring.

    def _before_batch(self, batch: int) -> None:
        """Between two batches, or executions of several: save if it is time."""
        if self._states is None:
            self._begin_states()
        assert self._store is not None
        assert self._loop is not None
        if batch:
            self._step += self._loop.latest
        if self._signals.came or (self._step > self._begun and self._store.due(self._step)):
            self._save(batch, last=self._signals.came)
            self._end_if_told()

    def _end_if_told(self) -> None:
        """After a signal: wait until all is written, and let it end the run."""
        if self._signals.came and self._store is not None:
            self._store.settle_all()
            self._signals.deliver(f"saved {self._store.latest}")

    def _begin_states(self) -> CallbackStates:
        assert self._loop is not None
        self._states = CallbackStates(self._loop.callbacks, self)
        return self._states

    def _save(self, batch: int, *, last: bool) -> None:
        """Copy everything, and let a thread write it. `last`: as in `Store.save`."""
        assert self._store is not None
        assert self._loop is not None
        if not self._store.leads:
            return
        snapshot = model_file.ModelSnapshot(self.model)
        states = self._states or self._begin_states()
        packed = nest.pack(
            {
                shards.KEY: shards.shards_of(self.model),
                "epoch": self._epoch,
                "batch": batch,
                "step": self._step,
                "stopped": bool(self.model.stop_training),
                "variables": model_file.read_variables(self.model),
                "global seed": model_file.read_global_seed(),
                "callbacks": states.state_dict(),
                "data": self._loop.state_dict(),
                "generators": read_generators(),
            },
            torch_side(),
        )

        def fill(folder: Path) -> None:
            packed.write(folder)
            snapshot.write(folder)

        self._store.save(self._step, fill, last=last)

    def _restore(self, store: Store) -> None:
        """Load the newest checkpoint. What `fit` and callbacks set at their beginning is set before the next batch."""
        before: list[model_file.ModelValues] = []

        def load(place: Path) -> dict[str, Any]:
            state = _read(place)
            with nest.loading(place):
                if not before:
                    before.append(model_file.ModelValues(self.model))
                model_file.load_into(self.model, place)
                model_file.write_variables(self.model, state["variables"], "seeds")
            return {**state, "place": place}

        def undo() -> None:
            for one in before:
                one.give_back()

        state = store.restore(load, undo)
        if state is not None:
            shards.warn_of_others(state["place"], state, self.model)
            self._go_on(state)

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Have `fit` go on where a checkpoint was made."""
        assert self._loop is not None
        self._step = self._begun = state["step"]
        self._epoch = self.model._initial_epoch = state["epoch"]
        epochs = self.params.get("epochs") or 0
        if state["stopped"] or state["epoch"] >= epochs:  # it is over: there is no next batch
            warn_user(f"The run in {self._folder} is over, after epoch {state['epoch']}: this `fit` trains no more.")
            self.model._initial_epoch = max(state["epoch"], epochs)
            self._begin_states().load_state_dict(state["callbacks"])
            return
        self._loop.resume(state["batch"], state["data"], lambda batch: self._restore_rest(state, batch))

    def _restore_rest(self, state: Mapping[str, Any], batch: int) -> None:
        """Set callbacks, metrics, seeds and generators, right before the next batch."""
        self._begin_states().load_state_dict(state["callbacks"])
        model_file.write_variables(self.model, state["variables"], "seeds")
        if batch:
            model_file.write_variables(self.model, state["variables"], "metrics")
        model_file.write_global_seed(state["global seed"])
        write_generators(state["generators"])


def _read(place: Path) -> dict[str, Any]:
    """What a checkpoint holds beside the model's file. Nothing changes.

    Raises:
        ValueError: the content is not what was written.
    """
    with nest.reading(place):
        state = nest.read(place, torch_side())
        numbers = {name: operator.index(state[name]) for name in ("step", "epoch", "batch")}
        data, variables, seed = (state[name] for name in ("data", "variables", "global seed"))
        operator.index(data["taken"])
        for generators in (state["generators"], data["generators"]):
            check_generators(generators)
        arrays = [*variables["seeds"], *variables["metrics"]]
        found = isinstance(state["callbacks"], dict) and all(isinstance(one, np.ndarray) for one in arrays)
        if not found or not (seed is None or np.shape(seed) == (2,)):
            raise ValueError("states of callbacks, seeds or metrics are none")
        nest.check_stored(place / model_file.NAME)
        return {**state, **numbers, "stopped": bool(state["stopped"])}


def _abandon(store: Store, signals: EndSignals) -> None:
    """Plain Keras tells callbacks of no error: let go of what one has that is gone."""
    store.abandon()
    signals.release()


def _alive(reference: weakref.ref[Checkpoint]) -> Checkpoint:
    found = reference()
    assert found is not None  # `fit` holds it
    return found
