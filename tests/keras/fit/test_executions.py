"""`fit` runs several steps in one call of Keras's loop: nobody who looks can tell, but by `steps_per_execution`."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fastdp
from fastdp.capture.shapes import Shape
from fastdp.capture.steps import Captures
from fastdp.keras.fit import executions
from fastdp.keras.fit.executions import looks_at_batches
from fastdp.keras.steps.standard import Steps

RNG = np.random.default_rng(0)
ROWS = 22
X = RNG.normal(size=(ROWS, 3)).astype("float32")
Y = RNG.integers(0, 2, ROWS)
WEIGHTS = RNG.random(ROWS).astype("float32")


@pytest.fixture(autouse=True, scope="module")
def _two_devices():
    fastdp.set_virtual_devices(2, kind="host")
    yield
    fastdp.set_virtual_devices(0)


def template():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2)(hidden))


def compiled(model, metrics=(), **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=list(metrics) or None, **options)
    return model


def parallel(metrics=(), devices=1, **options):
    return compiled(fastdp.wrap(template(), gpus=devices, compile=None), metrics, **options)


class Epochs(keras.callbacks.Callback):
    """Writes down epochs. Has no hook for batches."""

    def __init__(self, stops_after=None):
        super().__init__()
        self.events, self._stops_after = [], stops_after

    def on_train_begin(self, logs=None):
        self.events.append(("train begin", logs))

    def on_epoch_begin(self, epoch, logs=None):
        self.events.append((f"epoch {epoch} begin", logs))

    def on_epoch_end(self, epoch, logs=None):
        self.events.append((f"epoch {epoch} end", dict(logs)))
        if epoch == self._stops_after:
            self.model.stop_training = True

    def on_test_batch_end(self, batch, logs=None):
        self.events.append((f"test {batch}", dict(logs)))

    def on_train_end(self, logs=None):
        self.events.append(("train end", dict(logs)))


class Batches(Epochs):
    """Writes down batches too."""

    def on_train_batch_begin(self, batch, logs=None):
        self.events.append((f"begin {batch}", logs))

    def on_train_batch_end(self, batch, logs=None):
        self.events.append((f"end {batch}", dict(logs)))


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def data_of(kind):
    """The arguments of `fit` for a kind of data."""
    if kind == "generator":
        return {
            "x": ((X[i % 5 : 7 + i % 3], Y[i % 5 : 7 + i % 3]) for i in itertools.count()),
            "steps_per_epoch": 5,
            "shuffle": False,
        }
    return {"x": Data()} if kind == "data set" else {"x": X, "y": Y, "batch_size": 4}


KINDS = ("arrays", "weighted", "classes", "split", "validation", "steps", "generator", "data set")
EXTRA = {
    "weighted": {"sample_weight": WEIGHTS},
    "classes": {"class_weight": {0: 1.0, 1: 3.0}},
    "split": {"validation_split": 0.3},
    "validation": {"validation_data": (X[:7], Y[:7]), "validation_freq": 2},
    "steps": {"steps_per_epoch": 3},
}


def fit(model, kind, callback, **options):
    keras.utils.set_random_seed(2)
    told = {"epochs": 3, "verbose": 0, "callbacks": [callback], **data_of(kind), **EXTRA.get(kind, {}), **options}
    history = model.fit(**told)
    return callback.events, history.history, [np.array(one) for one in model.get_weights()]


def assert_equal(one, other):
    """The same events, with logs to the last digit, history and weights."""
    for a, b in zip(one[:2], other[:2], strict=True):
        assert a == b
    for a, b in zip(one[2], other[2], strict=True):
        np.testing.assert_array_equal(a, b)


def without_batches(result):
    events, history, weights = result
    return [event for event in events if event[0].split()[0] not in ("begin", "end")], history, weights


METRICS = st.sampled_from([(), ("accuracy",), ("accuracy", keras.losses.SparseCategoricalCrossentropy(True))])


SOME = hypothesis_settings(
    max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)


@SOME
@given(
    kind=st.sampled_from(KINDS),
    metrics=METRICS,
    stops=st.sampled_from([None, 1]),
    devices=st.sampled_from([1, 2]),
    verbose=st.sampled_from([0, 2]),
    ahead=st.booleans(),
)
def test_steps_that_nobody_looks_at_give_what_those_give_that_somebody_looks_at(
    kind, metrics, stops, devices, verbose, ahead
):
    results = []
    for callback in (Batches(stops), Epochs(stops)):
        model = parallel(metrics, devices)
        model.fetch_ahead = ahead
        results.append(fit(model, kind, callback, verbose=verbose))
    assert any(name.startswith("begin") for name, _ in results[0][0])
    assert_equal(without_batches(results[0]), results[1])


@SOME
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "steps"]),
    several=st.sampled_from([2, 3, 7]),
    metrics=METRICS,
    devices=st.sampled_from([1, 2]),
    looks=st.booleans(),
    ahead=st.booleans(),
)
def test_callbacks_come_once_per_execution_with_what_plain_keras_gives_after_its_last_step(
    kind, several, metrics, devices, looks, ahead
):
    """Plain Keras trains one step at a time, as it must on torch; the events of an execution are those of its last."""
    steps = {"generator": 5, "data set": 5, "split": 4}.get(kind, 6)
    of_epoch = -(-steps // several)
    trained = of_epoch * several if kind == "generator" else steps  # Keras takes whole executions of endless data
    plain = Batches()
    _, history, weights = fit(compiled(template(), metrics), kind, plain, **_steps_of(kind, trained))
    model = parallel(metrics, devices, steps_per_execution=several)
    model.fetch_ahead = ahead
    got, got_history, got_weights = fit(model, kind, Batches() if looks else Epochs())
    want = []
    for name, logs in plain.events:
        what, *number = name.split()
        if what == "begin" and int(number[0]) % several == 0 and looks:
            want.append((name, logs))
        elif what == "end" and (int(number[0]) % several == several - 1 or int(number[0]) == trained - 1):
            if looks:
                want.append((f"end {int(number[0]) // several * several + several - 1}", logs))
        elif what not in ("begin", "end", "test"):
            want.append((name, logs))
    got = [event for event in got if not event[0].startswith("test")]
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, logs), (_, wanted) in zip(got, want, strict=True):
        assert logs == pytest.approx(wanted, rel=2e-5), name
    assert got_history.keys() == history.keys()
    for a, b in zip(got_weights, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def _steps_of(kind, trained):
    return {"steps_per_epoch": trained} if kind == "generator" else {}


def test_evaluate_and_predict_run_several_steps_too():
    one, several = parallel(("accuracy",)), parallel(("accuracy",), steps_per_execution=4)
    seen = []
    looking = keras.callbacks.LambdaCallback(on_test_batch_end=lambda batch, logs: seen.append(batch))
    looking.on_predict_batch_end = lambda batch, logs: seen.append(batch)
    want = [model.evaluate(X, Y, batch_size=4, verbose=0, callbacks=[looking]) for model in (one, several)]
    assert want[0] == want[1]
    predicted = [model.predict(X, batch_size=4, verbose=0, callbacks=[looking]) for model in (one, several)]
    np.testing.assert_array_equal(*predicted)
    assert seen == [*range(6), 3, 7, *range(6), 3, 7]


def test_logs_are_made_only_where_a_callback_reads_them(monkeypatch):
    made = []
    results = Steps.results
    monkeypatch.setattr(Steps, "results", lambda self: made.append(0) or results(self))
    for callbacks, verbose, count in (
        ([], 0, 2),
        ([Epochs()], 2, 2),
        ([keras.callbacks.EarlyStopping("loss"), keras.callbacks.ModelCheckpoint("no.keras", save_freq=99)], 0, 12),
        ([Batches()], 0, 12),
        ([], 1, 12),
    ):
        made.clear()
        parallel().fit(X, Y, batch_size=4, epochs=2, verbose=verbose, callbacks=callbacks)
        assert len(made) == count, callbacks


class Own(keras.metrics.Metric):
    """A metric that counts how often it is asked."""

    asked = 0

    def update_state(self, *_, **__):
        """Nothing."""

    def result(self):
        """How often."""
        Own.asked += 1
        return Own.asked


def test_a_metric_of_the_users_own_is_asked_after_each_step():
    Own.asked = 0
    parallel([Own(name="own")]).fit(X, Y, batch_size=4, verbose=0)
    assert Own.asked >= 6


@pytest.mark.parametrize(("several", "trained"), [(1, 4), (3, 6)])
def test_who_stops_the_training_between_two_batches_is_heard_after_the_execution(several, trained):
    class Stopping(Data):
        def __getitem__(self, i):
            if i == 3:
                model.stop_training = True
            return super().__getitem__(i)

        def __len__(self):
            return 9

    for callback in (Epochs(), Batches()):
        model = parallel(steps_per_execution=several)
        model.fit(Stopping(), epochs=3, verbose=0, shuffle=False, callbacks=[callback])
        assert int(model.optimizer.iterations) == trained, callback
        assert [name for name, _ in callback.events if "epoch" in name] == ["epoch 0 begin", "epoch 0 end"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_in_the_midst_leaves_the_steps_before_it(error):
    class Failing(Data):
        fails = True

        def __getitem__(self, i):
            if i == 3 and self.fails:
                raise error("batch 3")
            return super().__getitem__(i)

    weights = []
    for callback in (Epochs(), Batches()):
        model, data = parallel(), Failing()
        with pytest.raises(error, match="batch 3"):
            model.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[callback])
        assert int(model.optimizer.iterations) == 3
        data.fails = False
        model.fit(data, epochs=1, verbose=0, shuffle=False, callbacks=[callback])
        assert int(model.optimizer.iterations) == 8
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("callback", [Epochs, Batches])
def test_data_that_end_early_are_told_of_once(callback):
    model, log = parallel(), callback()
    batches = ((X[:4], Y[:4]) for _ in range(5))
    with pytest.warns(UserWarning, match="ran out of data") as told:
        model.fit(batches, epochs=2, steps_per_epoch=4, verbose=0, shuffle=False, callbacks=[log])
    assert len([one for one in told if "ran out of data" in str(one.message)]) == 1
    assert int(model.optimizer.iterations) == 5


def test_unknown_lengths_are_told_to_callbacks_at_the_end(capsys):
    for verbose in (0, 2):
        with pytest.warns(UserWarning, match="ran out of data"):
            parallel().fit(((X[:4], Y[:4]) for _ in range(5)), verbose=verbose, shuffle=False)
    assert "5/5" in capsys.readouterr().out


def test_what_cannot_have_changed_is_not_compared_before_each_step(monkeypatch):
    """Here traced steps pass for settled ones: what is compared does not depend on it, and compiling takes long."""
    prepare, prepared, weights = Captures.prepare, [], []
    monkeypatch.setattr(Captures, "prepare", lambda self, *a, **k: prepared.append(0) or prepare(self, *a, **k))
    monkeypatch.setattr(Shape, "is_settled", property(lambda self: self.is_replayed))
    for seconds, callback, options, most in (
        (1e9, Epochs, {}, 9),  # the first step of an epoch, and those of another number of rows
        (1e9, Batches, {"steps_per_execution": 3}, 10),
        (0.0, Epochs, {}, 18),
        (1e9, Batches, {}, 18),
        (1e9, Epochs, {"metrics": [lambda y, outputs: outputs[:, 0]]}, 18),
    ):
        monkeypatch.setattr(executions, "LOOK_SECONDS", seconds)
        model = fastdp.wrap(template(), gpus=1, compile="trace")
        prepared.clear()
        weights.append(fit(compiled(model, **options), "arrays", callback())[2])
        assert most / 2 < len(prepared) <= most, callback
    prepared.clear()
    fit(compiled(fastdp.wrap(template(), gpus=1, compile="trace")), "data set", Epochs())
    assert len(prepared) == 15  # its code may change anything
    for every in zip(*weights, strict=True):
        for one in every:
            np.testing.assert_array_equal(one, every[0])


def test_who_looks():
    looking = (
        Batches(),
        keras.callbacks.ProgbarLogger(),
        keras.callbacks.LambdaCallback(on_train_batch_end=print),
        keras.callbacks.CallbackList([Batches()]),
        [keras.callbacks.History(), [Batches()]],
    )
    for callbacks in looking:
        assert looks_at_batches(callbacks, 0)
    for callbacks in (None, [], Epochs(), keras.callbacks.ReduceLROnPlateau(), keras.callbacks.CallbackList([])):
        assert not looks_at_batches(callbacks, 0)
        assert not looks_at_batches(callbacks, 2)
    assert looks_at_batches(None, 1)
    assert looks_at_batches(None, "auto")
