"""`fit`, `evaluate` and `predict` on a `DeviceDataset` give what they give on the same arrays, to the last bit."""

from __future__ import annotations

import collections

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.data import DeviceDataset, Scaled

L = keras.layers
ROWS = 23


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


def weights(seed=9):
    return np.random.default_rng(seed).uniform(0.1, 2.0, ROWS).astype("float32")


# Models, each with what it is fitted on and how it is compiled.


def plain():
    inputs = keras.Input((6,))
    hidden = L.Dropout(0.3, seed=4)(L.Dense(8, "tanh", kernel_regularizer="l2")(inputs))
    model = keras.Model(inputs, L.Dense(2)(hidden))
    return model, (numbers(6), numbers(2, seed=1)), {"loss": "mse", "metrics": ["mae"]}


def weighted():
    model, (x, y), options = plain()
    return model, (x, y, weights()), {**options, "weighted_metrics": ["mse"]}


def named():
    a, b = keras.Input((6,), name="a"), keras.Input((3, 2), name="b")
    joined = L.Concatenate()([L.Dense(4, "relu")(a), L.Flatten()(b)])
    outputs = {"first": L.Dense(2, name="first")(joined), "second": L.Dense(1, name="second")(joined)}
    x = {"b": numbers(3, 2, seed=1), "a": numbers(6)}
    y = {"second": numbers(1, seed=2), "first": numbers(2, seed=3)}
    w = {"first": weights(), "second": weights(8)}
    options = {"loss": {"first": "mse", "second": "mae"}, "loss_weights": {"first": 1.0, "second": 0.3}}
    return keras.Model([a, b], outputs), (x, y, w), {**options, "metrics": {"first": ["mae"], "second": ["mse"]}}


def listed():
    a, b = keras.Input((6,)), keras.Input((2,))
    outputs = [L.Dense(2)(L.Concatenate()([a, b])), L.Dense(1)(b)]
    return keras.Model([a, b], outputs), ([numbers(6), numbers(2, seed=1)], [numbers(2), numbers(1)]), {"loss": "mse"}


def one_weight_for_two_outputs():
    model, (x, y), options = listed()
    return model, (x, y, weights()), options


def masked():
    inputs = keras.Input((5,), dtype="int64")
    model = keras.Model(inputs, L.LSTM(3, return_sequences=True)(L.Embedding(7, 4, mask_zero=True)(inputs)))
    tokens = np.random.default_rng(0).integers(0, 7, (ROWS, 5))
    # The denominators are unmasked steps and weights: replicas exchange them.
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    of_steps = np.random.default_rng(1).uniform(0.1, 2.0, (ROWS, 5)).astype("float32")
    return model, (tokens, numbers(5, 3), of_steps), {"loss": loss, "metrics": ["mae"]}


def inputs_alone():
    class Energy(L.Layer):
        def call(self, inputs):
            self.add_loss(keras.ops.mean(inputs**2))
            return inputs

    inputs = keras.Input((6,))
    return keras.Model(inputs, Energy()(L.Dense(4)(inputs))), numbers(6), {"loss": None}


def of_the_whole_batch():
    model, data, options = plain()

    def contrastive(y, y_pred):
        return keras.ops.mean((y_pred - keras.ops.roll(y, 1, axis=0)) ** 2) + keras.ops.std(y_pred)

    return model, data, {**options, "loss": contrastive}


class LooksAtInputs(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean((y - y_pred) ** 2) + keras.ops.mean(
            keras.ops.abs(keras.ops.sum(x, axis=1, keepdims=True) - y_pred)
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "seen": float(keras.ops.sum(x))}


def looking_at_inputs():
    inputs = keras.Input((6,))
    return LooksAtInputs(inputs, L.Dense(2)(inputs)), (numbers(6), numbers(2)), {"metrics": ["mae"]}


MODELS = [
    plain, weighted, named, listed, one_weight_for_two_outputs, masked, inputs_alone, of_the_whole_batch,
    looking_at_inputs,
]  # fmt: skip


def made(build, devices=3, compile=None, **options):
    keras.utils.set_random_seed(11)
    model, data, settings = build()
    parallel = fastdp.wrap(model, devices, compile=compile, **options)
    parallel.compile(optimizer="adam", **settings)
    return parallel, data


def as_arguments(data):
    return dict(zip(("x", "y", "sample_weight"), data if isinstance(data, tuple) else (data,), strict=False))


def assert_same(got, want):
    got, want = keras.tree.flatten(got), keras.tree.flatten(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def on_both(build, fit, devices=3, *, sharded=False, **options):
    """History, weights, evaluation and prediction, on the arrays and on a data set."""
    results = []
    for resident in (False, True):
        parallel, data = made(build, devices, **options)
        held = {"x": DeviceDataset(data, parallel, sharded=sharded)} if resident else as_arguments(data)
        keras.utils.set_random_seed(5)
        history = parallel.fit(**held, verbose=0, **fit).history
        assert ("in parts: 0.0 MB on virtual:0" in parallel.report().inputs[0]["how"]) == (resident and sharded)
        evaluated = parallel.evaluate(**held, batch_size=7, verbose=0, return_dict=True)
        predicted = parallel.predict(held["x"], batch_size=7, verbose=0)
        results.append([history, parallel.get_weights(), evaluated, predicted, parallel.report()[0]["how"]])
    assert_same(results[1][:4], results[0][:4])
    assert results[1][4] == results[0][4]
    return results[1]


@pytest.mark.parametrize("compile", [None, "trace"])
@pytest.mark.parametrize("build", MODELS)
def test_it_is_as_on_the_arrays(build, compile, recwarn):
    how = on_both(build, {"batch_size": 5, "epochs": 3}, compile=compile)[4]
    caught = build in (masked, of_the_whole_batch, looking_at_inputs)
    assert how == ("eager" if compile is None or caught else "traced")
    if compile is None or not caught:
        assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("devices", [1, 2])
def test_on_fewer_devices_too(devices):
    on_both(weighted, {"batch_size": 4, "epochs": 2}, devices)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_sharded_over_the_devices_too(devices):
    fastdp.set_virtual_devices(8)
    on_both(weighted, {"batch_size": 5, "epochs": 2, "validation_split": 0.2}, devices, sharded=True)


def test_classes_are_weighted_in_a_sharded_one():
    on_both(classes(False), {"class_weight": {0: 3.0, 2: 0.2}, "batch_size": 5}, sharded=True)


def test_a_compiled_step_takes_its_rows_from_it():
    parallel, data = made(plain, 2, compile="inductor")
    held = DeviceDataset(data, parallel)
    parallel.fit(held, batch_size=23, epochs=3, verbose=0)
    parallel.wait_compiled(120)
    before = parallel.get_weights()
    got = parallel.fit(held, batch_size=23, epochs=1, verbose=0, shuffle=False).history
    assert {entry["how"] for entry in parallel.report()} == {"compiled"}
    other, _ = made(plain, 2, compile=None)
    other.fit(held, batch_size=23, epochs=3, verbose=0)
    for a, b in zip(before, other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.isfinite(got["loss"][0])


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
@pytest.mark.parametrize("ahead", [True, False])
def test_rows_are_shuffled_as_those_of_arrays(shuffle, ahead):
    orders = []
    for resident in (False, True):
        parallel, data = made(weighted)
        parallel.fetch_ahead = ahead
        seen, train = [], parallel._steps.engine.train

        def noted(batch, seen=seen, train=train, **options):
            seen.append(np.array(batch[0]))
            return train(batch, **options)

        parallel._steps.engine.train = noted
        held = {"x": DeviceDataset(data, parallel)} if resident else as_arguments(data)
        keras.utils.set_random_seed(5)
        parallel.fit(**held, batch_size=5, epochs=3, shuffle=shuffle, verbose=0)
        orders.append(seen)
    assert [len(batch) for batch in orders[1]][:5].count(5) == 4
    assert_same(*orders)
    first, second = (np.concatenate(orders[1][start : start + 5]) for start in (0, 5))
    assert (first == second).all() == (shuffle is False)


@pytest.mark.parametrize(
    "fit",
    [
        {"validation_split": 0.3, "batch_size": 5},
        {"validation_split": 0.3, "validation_batch_size": 2, "shuffle": "batch"},
        {"steps_per_epoch": 2, "batch_size": 6, "epochs": 4},
        {"steps_per_epoch": 3, "epochs": 2},  # the batch size is then that of three steps
        {"initial_epoch": 1, "epochs": 3, "batch_size": 40},
        {},
    ],
)
def test_the_other_arguments_of_fit_are_keras_own(fit):
    on_both(weighted, fit)


def test_an_epoch_of_more_steps_than_there_are_says_so_as_for_arrays():
    with pytest.warns(UserWarning, match="ran out of data"):
        on_both(plain, {"steps_per_epoch": 9, "batch_size": 5, "epochs": 1})


def test_validation_on_another_data_set_or_on_arrays():
    histories = []
    for how in ("arrays", "data set", "tuple", "arrays beside"):
        parallel, data = made(weighted)
        other = numbers(6, seed=20)[:9], numbers(2, seed=21)[:9]
        held = {"x": DeviceDataset(data, parallel)} if how != "arrays" else as_arguments(data)
        validation = DeviceDataset(other, parallel) if how in ("data set", "tuple") else other
        keras.utils.set_random_seed(5)
        histories.append(
            parallel.fit(
                **held,
                validation_data=(validation,) if how == "tuple" else validation,
                batch_size=4,
                epochs=2,
                verbose=0,
            ).history
        )
    assert "val_loss" in histories[0]
    for history in histories[1:]:
        assert_same(history, histories[0])


def classes(one_hot):
    labels = np.random.default_rng(3).integers(0, 3, ROWS)
    loss = "categorical_crossentropy" if one_hot else "sparse_categorical_crossentropy"

    def build():
        inputs = keras.Input((6,))
        y = np.eye(3, dtype="float32")[labels] if one_hot else labels
        return keras.Model(inputs, L.Dense(3, "softmax")(inputs)), (numbers(6), y), {"loss": loss}

    return build


@pytest.mark.parametrize("split", [0.0, 0.3])
@pytest.mark.parametrize("one_hot", [True, False])
def test_classes_are_weighted(one_hot, split):
    weighed = {"class_weight": {0: 3.0, 2: 0.2}, "batch_size": 5, "epochs": 2, "validation_split": split}
    history = on_both(classes(one_hot), weighed)[0]
    assert history["loss"] != on_both(classes(one_hot), {**weighed, "class_weight": None})[0]["loss"]


def images():
    inputs = keras.Input((4, 4, 1), name="image")
    model = keras.Model({"image": inputs}, L.Dense(2)(L.Flatten()(inputs)))
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 4, 4, 1)).astype(np.uint8)
    return model, ({"image": pixels}, numbers(2)), {"loss": "mse"}


@pytest.mark.parametrize("name", [0, "image"])
def test_pixels_are_scaled_on_the_way(name):
    results = []
    for resident in (False, True):
        parallel, (x, y) = made(images)
        scaled = {"image": x["image"].astype("float32") * np.float32(1 / 255) + np.float32(-0.5)}
        casts = {name: Scaled(offset=-0.5)}
        held = {"x": DeviceDataset((x, y), parallel, casts)} if resident else {"x": scaled, "y": y}
        keras.utils.set_random_seed(5)
        history = parallel.fit(**held, batch_size=5, epochs=2, verbose=0).history
        results.append([history, parallel.predict(held["x"], verbose=0)])
    assert_same(results[1], results[0])


def test_pixels_stay_whole_numbers_without_a_cast():
    on_both(images, {"batch_size": 5})


def test_arrays_become_what_keras_makes_of_them():
    parallel, _ = made(plain)
    series = torch.arange(ROWS, dtype=torch.float64)
    arrays = numbers(2), numbers(2).astype("float64"), series, np.arange(ROWS, dtype=np.uint16), np.arange(ROWS) > 3
    data = DeviceDataset(arrays, parallel)
    assert [array.dtype.name for array in data.arrays] == ["float32", "float32", "float32", "int32", "bool"]
    assert np.shares_memory(data.arrays[0], arrays[0])
    for ours, theirs in zip(data.arrays, arrays, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype(ours.dtype))
    loose = made(plain)[1]
    x, y = (part.astype("float64") for part in loose)
    results = []
    for held in ({"x": x, "y": y}, {"x": DeviceDataset((x, y), parallel)}):
        again, _ = made(plain)
        results.append(again.fit(**held, batch_size=5, epochs=2, shuffle=False, verbose=0).history)
    assert_same(*results)


def test_nobody_fetches_inputs_to_the_host(monkeypatch):
    """Metrics, and the loss of an evaluation, need targets and weights there."""
    fetched = collections.Counter()
    on_host = DeviceDataset.on_host

    def noted(data, place, index):
        fetched[place] += 1
        return on_host(data, place, index)

    monkeypatch.setattr(DeviceDataset, "on_host", noted)
    parallel, data = made(weighted)
    held = DeviceDataset(data, parallel)
    parallel.fit(held, batch_size=5, epochs=1, verbose=0)
    trial = fetched[0]  # how rows matter is found out on the host, in the first step
    parallel.fit(held, batch_size=5, epochs=2, verbose=0)
    parallel.evaluate(held, batch_size=5, verbose=0)
    assert fetched[0] == trial
    assert fetched[1] >= 20
    before = fetched.copy()
    parallel.predict(held, batch_size=5, verbose=0)
    assert fetched == before
    unmeasured, data = made(inputs_alone)
    held = DeviceDataset(data, unmeasured)
    unmeasured.fit(held, batch_size=5, epochs=1, verbose=0)
    before = fetched.copy()
    unmeasured.fit(held, batch_size=5, epochs=2, verbose=0)
    assert fetched == before


def test_single_batches_are_trained_tested_and_predicted():
    results = []
    for resident in (False, True):
        parallel, (x, y, w) = made(weighted)
        index = np.array([4, 1, 20, 7, 7])
        if resident:
            batch = DeviceDataset((x, y, w), parallel).rows(index)
            found = [parallel.train_on_batch(batch), parallel.test_on_batch(batch), parallel.predict_on_batch(batch)]
        else:
            batch = x[index], y[index], w[index]
            found = [
                parallel.train_on_batch(*batch),
                parallel.test_on_batch(*batch),
                parallel.predict_on_batch(batch[0]),
            ]
        results.append(found)
    assert_same(*results)
    for wrong in ({"y": np.zeros((5, 2))}, {"sample_weight": np.zeros(5)}, {"class_weight": {0: 1.0}}):
        with pytest.raises(ValueError, match=f"A ResidentBatch includes its targets and weights.*{next(iter(wrong))}"):
            parallel.train_on_batch(DeviceDataset((x, y), parallel).rows(index), **wrong)


class OwnStep(keras.Model):
    def train_step(self, data):
        x, y = data
        loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        return {"loss": loss.detach()}


def own_step():
    inputs = keras.Input((6,))
    hidden = L.Dense(4, "tanh")(inputs)
    return OwnStep(inputs, L.Dense(2)(hidden)), (numbers(6), numbers(2)), {"loss": "mse"}


def test_a_train_step_of_the_models_own_gets_arrays_and_that_is_said_once():
    with pytest.warns(UserWarning, match="has its own train_step.*no faster than") as caught:
        on_both(own_step, {"batch_size": 5, "epochs": 2})
    assert len([one for one in caught if "no faster than" in str(one.message)]) == 1


def test_one_data_set_serves_several_models_and_fits():
    first, data = made(plain, 2)
    held = DeviceDataset(data, first)
    first.fit(held, batch_size=5, verbose=0)
    second, _ = made(plain, 3)
    second.fit(held, batch_size=5, verbose=0, callbacks=[keras.callbacks.EarlyStopping("loss")])
    twice = [second.fit(held, batch_size=23, verbose=0, shuffle=False).history["loss"] for _ in range(2)]
    assert twice[1] < twice[0]


def test_what_cannot_be_is_refused():
    parallel, (x, y) = made(plain)
    held = DeviceDataset((x, y), parallel)
    for wrong in ({"y": y}, {"sample_weight": weights()}):
        with pytest.raises(
            ValueError, match=f"includes its targets and weights. Received: {next(iter(wrong))} along with it"
        ):
            parallel.fit(held, **wrong, verbose=0)
        with pytest.raises(ValueError, match="includes its targets and weights"):
            parallel.evaluate(held, **wrong, verbose=0)
    with pytest.raises(
        ValueError, match=r"`validation_data` must be a DeviceDataset alone.*\['DeviceDataset', 'ndarray'\]"
    ):
        parallel.fit(x, y, validation_data=(held, y), verbose=0)
    with pytest.raises(ValueError, match="`class_weight` and `sample_weight` at the same time"):
        parallel.fit(DeviceDataset((x, y, weights()), parallel), class_weight={0: 1.0}, verbose=0)
    with pytest.raises(ValueError, match="Data is expected to be in format"):
        parallel.fit(DeviceDataset((x, y, y, y), parallel), verbose=0)
    with pytest.raises(ValueError, match=r"place 1 of the data set as float32. Received: float64.*arrays, parallel"):
        parallel.fit(DeviceDataset((x, y.astype("float64")), parallel.devices), verbose=0)
    with pytest.raises(ValueError, match="not sufficient to split it"):
        parallel.fit(held, validation_split=0.99, verbose=0)
    with pytest.raises(ValueError, match=r"exactly one uint8 array"):
        DeviceDataset(({"a": x}, y), parallel, {"a": Scaled()})


def test_a_model_without_fastdp_is_told_whose_data_set_it_is():
    parallel, (x, y) = made(plain)
    held = DeviceDataset((x, y), parallel)
    parallel.template.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"DeviceDataset of 23 rows in host memory; only models run by fastdp"):
        parallel.template.fit(held, verbose=0)
    for owner in (parallel.template, 8, []):
        with pytest.raises(
            TypeError, match=r"`devices` must be a model from fastdp.wrap, an engine.*fastdp.wrap\(model"
        ):
            DeviceDataset((x, y), owner)
    with pytest.raises((TypeError, ValueError), match="Invalid dtype: object"):
        DeviceDataset(np.array([["words"]] * 3, object), parallel)
    with pytest.raises(TypeError, match=r"must hold arrays of numbers with rows. Received: ndarray .*U5"):
        DeviceDataset(np.array([["words"]] * 3), parallel.devices)


def test_bfloat16_is_refused_with_what_to_do():
    parallel, (x, y) = made(plain)
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(ValueError, match=r"Received: bfloat16.*mixed_bfloat16"):
            DeviceDataset((x, y), parallel)
    finally:
        keras.config.set_floatx("float32")
