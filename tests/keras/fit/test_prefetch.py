"""`fit` fetches a batch ahead while a step runs: whoever looks sees the order and the results of plain Keras."""

from __future__ import annotations

import contextlib
import gc
import weakref

import keras
import numpy as np
import pytest
import torch
from keras.src.backend.torch.core import get_device
from keras.src.backend.torch.trainer import TorchEpochIterator

import fastdp
from fastdp.engine.replicas import Replica
from fastdp.keras.fit.feeding import feed

ROWS = 6


@pytest.fixture(autouse=True)
def _two_devices():
    fastdp.set_virtual_devices(2, kind="host")
    yield
    fastdp.set_virtual_devices(0)


def parallel(ahead=True, metrics=("mae",)):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    template = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(4, activation="tanh")(inputs)))
    model = fastdp.wrap(template, gpus=2)
    assert not model.fetch_ahead  # of devices in host memory
    model.fetch_ahead = ahead
    model.compile(optimizer="adam", loss="mse", metrics=list(metrics))
    return model


def batch(i, rows=ROWS):
    rng = np.random.default_rng(i)
    return rng.normal(size=(rows, 3)).astype("float32"), rng.normal(size=(rows, 2)).astype("float32")


class Log(keras.callbacks.Callback):
    """What happens, in order."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_epoch_begin(self, epoch, logs=None):
        self.events.append(f"epoch {epoch}")

    def on_train_batch_begin(self, step, logs=None):
        self.events.append(f"begin {step}")

    def on_train_batch_end(self, step, logs=None):
        self.events.append(f"end {step}")


class Data(keras.utils.PyDataset):
    """Three batches that write down when they are asked for."""

    def __init__(self, log, fails_at=None, error=OSError):
        super().__init__()
        self._log, self._fails_at, self._error = log, fails_at, error

    def __len__(self):
        return 3

    def __getitem__(self, i):
        self._log.append(f"fetch {i}")
        if i == self._fails_at:
            raise self._error(f"batch {i} is broken")
        return batch(i)


def test_the_next_batch_is_fetched_in_the_step_and_never_one_beyond_the_epoch():
    log = Log()
    parallel().fit(Data(log.events), epochs=2, verbose=0, callbacks=[log], shuffle=False)
    began = log.events.index("epoch 0")
    epoch = ["fetch 0", "begin 0", "fetch 1", "end 0", "begin 1", "fetch 2", "end 1", "begin 2", "end 2"]
    assert log.events[began:] == ["epoch 0", *epoch, "epoch 1", *epoch]


@pytest.mark.parametrize("ahead", [True, False])
def test_keras_puts_batches_into_host_memory_and_not_on_a_gpu_of_its_own(ahead):
    seen, model = [], parallel(ahead)

    class Looking(Data):
        def __getitem__(self, i):
            seen.append(str(get_device()))
            return super().__getitem__(i)

    model.fit(Looking([]), verbose=0, shuffle=False)
    with keras.device("meta"):
        seen.clear()
        adapter = TorchEpochIterator(Looking([]))
        feed(adapter, 60.0)
        (_, _, ((x, y),)) = next(iter(adapter))
    assert set(seen) == {"cpu"}
    assert x.device.type == y.device.type == "cpu"


def test_without_it_the_order_is_keras_own():
    log = Log()
    parallel(ahead=False).fit(Data(log.events), verbose=0, callbacks=[log], shuffle=False)
    began = log.events.index("epoch 0")
    steps = [[f"fetch {i}", f"begin {i}", f"end {i}"] for i in range(3)]
    assert log.events[began + 1 :] == [event for step in steps for event in step]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_the_data_set_raises_comes_where_keras_asks_for_that_batch(error):
    events = {}
    for ahead in (True, False):
        log = Log()
        model = parallel(ahead)
        with pytest.raises(error, match="batch 2 is broken"):
            model.fit(Data(log.events, 2, error), verbose=0, callbacks=[log], shuffle=False)
        events[ahead] = [event for event in log.events if "fetch" not in event]
        model.fit(Data(log.events), verbose=0, shuffle=False)
    assert events[True] == events[False] == ["epoch 0", "begin 0", "end 0", "begin 1", "end 1"]


def test_a_malformed_batch_is_an_error_of_its_own_step():
    def batches():
        for i in range(4):
            x, y = batch(i)
            yield x, (y[:2] if i == 3 else y)

    log = Log()
    with pytest.raises(ValueError, match="same number of rows"):
        parallel().fit(batches(), verbose=0, callbacks=[log], shuffle=False)
    assert log.events[-2:] == ["end 2", "begin 3"]


@pytest.mark.parametrize("steps", [None, 3])
def test_an_endless_generator_is_asked_for_as_many_batches_as_are_trained(steps):
    asked = []

    def batches():
        for i in range(1000 if steps else 9):
            asked.append(i)
            yield batch(i)

    got, want = [], []
    for ahead, results in ((True, got), (False, want)):
        asked.clear()
        model = parallel(ahead)
        epochs = 3 if steps else 1
        with contextlib.nullcontext() if steps else pytest.warns(UserWarning, match="ran out of data"):
            history = model.fit(batches(), steps_per_epoch=steps, epochs=epochs, verbose=0, shuffle=False).history
        results += [history, model.get_weights(), list(asked)]
    assert got[2] == want[2] == list(range(9))
    assert got[0] == want[0]
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_data_set_may_fill_the_same_tensors_again():
    # Not a generator: Keras looks at a generator's first batches, all of them, before it trains on the first.
    class Filled(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self._x, self._y = torch.empty((ROWS, 3)), torch.empty((ROWS, 2))

        def __len__(self):
            return 3

        def __getitem__(self, i):
            for tensor, values in zip((self._x, self._y), batch(i), strict=True):
                tensor.copy_(torch.from_numpy(values))
            return self._x, self._y

    one = parallel().fit(Filled(), verbose=0, shuffle=False).history
    two = parallel(ahead=False).fit(Data([]), verbose=0, shuffle=False).history
    assert one == two


@pytest.mark.parametrize("ahead", [True, False])
def test_a_data_set_may_ask_the_model_itself(ahead):
    model, seen = parallel(ahead), []
    probe = batch(99)[0]

    class Asking(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            seen.append(model.predict(probe, verbose=0))
            return batch(i)

    model.fit(Asking(), epochs=2, verbose=0, shuffle=False)
    reference, expected = parallel(ahead=False), []
    for _ in range(2):
        for i in range(4):
            expected.append(reference.predict(probe, verbose=0))
            reference.train_on_batch(*batch(i))
    # Keras may look at the first batch once more before it trains.
    for a, b in zip(seen[-8:], expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_fails_while_its_data_set_asks_the_model_still_says_so(monkeypatch):
    model = parallel()
    engine_fails = []

    class Asking(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            if i == 1:
                engine_fails.append(model.predict(batch(9)[0], verbose=0))
            return batch(i)

    def fail(replica, *args):
        raise FloatingPointError("no number")

    monkeypatch.setattr(Replica, "train", fail)
    with pytest.raises(FloatingPointError, match="no number"):
        model.fit(Asking(), verbose=0, shuffle=False)
    assert len(engine_fails) == 1
    monkeypatch.undo()
    assert np.isfinite(model.fit(Asking(), verbose=0, shuffle=False).history["loss"][0])


def test_weights_that_a_callback_assigns_count_for_the_next_step():
    class Doubling(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            self.model.set_weights([2 * w for w in self.model.get_weights()])

    results = []
    for ahead in (True, False):
        model = parallel(ahead)
        history = model.fit(Data([]), epochs=2, verbose=0, callbacks=[Doubling()], shuffle=False).history
        results.append((history, model.get_weights()))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_that_a_callback_stops_drops_the_batch_that_was_fetched():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            self.model.stop_training = step == 1

    model, asked = parallel(), []
    model.fit(Data(asked), epochs=3, verbose=0, callbacks=[Stop()], shuffle=False)
    assert asked[-1] == "fetch 2"
    assert model._steps.ahead is None


def test_validation_and_evaluation_in_between_read_their_own_data():
    results = []
    x, y = batch(0, 20)
    for ahead in (True, False):
        model = parallel(ahead)
        history = model.fit(x, y, batch_size=6, epochs=3, validation_split=0.3, verbose=0, shuffle="batch").history
        results.append((history, model.evaluate(x, y, verbose=0)))
    assert results[0] == results[1]


@pytest.mark.parametrize("ahead", [True, False])
def test_no_data_set_is_left_to_the_garbage_collector(ahead):
    model, left = parallel(ahead), []
    gc.collect()
    gc.disable()
    try:
        for method, options in ((model.fit, {"shuffle": False}), (model.evaluate, {}), (model.predict, {})):
            loader = torch.utils.data.DataLoader(Pairs(), batch_size=ROWS)
            method(loader, verbose=0, **options)
            left.append(weakref.ref(loader))
        loader = torch.utils.data.DataLoader(Pairs(), batch_size=ROWS)
        model.fit(*batch(0), validation_data=loader, verbose=0)
        left.append(weakref.ref(loader))
        del loader
        assert [one() for one in left] == [None] * 4
    finally:
        gc.enable()


class Pairs(torch.utils.data.Dataset):
    """Three batches."""

    def __len__(self):
        return 3 * ROWS

    def __getitem__(self, i):
        x, y = batch(i // ROWS)
        return x[i % ROWS], y[i % ROWS]
