"""A Keras model on a `DeviceDataset` of simulated GPUs: what it computes, and that row numbers alone go there."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from fastdp.data import DeviceDataset, Scaled
from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options
from fastdp.runtime.host.device import HostDevice

L = keras.layers
LIMIT = 30.0
ROWS = 22


def arrays():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (ROWS, 3, 2)).astype(np.uint8)
    more = rng.normal(size=(ROWS, 4)).astype("float32")
    labels = rng.integers(0, 3, ROWS)
    return {"pixels": pixels, "more": more}, labels, rng.uniform(0.5, 2.0, ROWS).astype("float32")


def wrapped(devices, loss="sparse_categorical_crossentropy", **options):
    keras.utils.set_random_seed(5)
    pixels, more = keras.Input((3, 2), name="pixels"), keras.Input((4,), name="more")
    joined = L.Concatenate()([L.Flatten()(pixels), more])
    hidden = L.Dropout(0.3, seed=1)(L.Dense(6, "tanh")(joined))
    model = keras.Model({"pixels": pixels, "more": more}, L.Dense(3, "softmax")(hidden))
    parallel = ParallelModel(model, devices, Options(timeout=LIMIT, check_replicas=True, **options))
    parallel.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], weighted_metrics=["accuracy"])
    return parallel


def resident(parallel, sharded=False):
    return DeviceDataset(arrays(), parallel, {"pixels": Scaled()}, sharded=sharded)


def results(parallel, data, fit):
    """History, evaluation and predictions; `data` as fit takes it."""
    keras.utils.set_random_seed(7)
    history = parallel.fit(**data, verbose=0, **fit).history
    predicted = parallel.predict(data["x"], batch_size=8, verbose=0)
    return history, parallel.evaluate(**data, batch_size=8, verbose=0), predicted


def on_the_host(fit, count=2, **options):
    """The same from arrays, whose pixels were scaled beforehand, on devices in host memory."""
    hosts = [HostDevice(i) for i in range(count)]
    x, y, w = arrays()
    x = {**x, "pixels": x["pixels"].astype("float32") * np.float32(1 / 255)}
    parallel = wrapped(hosts, compile=None, **options)
    found = results(parallel, {"x": x, "y": y, "sample_weight": w}, fit)
    for host in hosts:
        host.close(LIMIT)
    return found


def assert_close(got, want):
    for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


FIT = {"batch_size": 8, "epochs": 4}  # batches of 8, 8 and 6 rows


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(("count", "cards"), [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize(("compile", "how"), [(None, "eager"), ("trace", "graph")])
def test_it_computes_what_arrays_in_host_memory_give(gpus, compile, how, count, cards, seed):
    box = gpus(cards, seed=seed)
    parallel = wrapped(box.devices(count, cards), compile=compile)
    assert parallel.fetch_ahead
    data = resident(parallel)
    assert len(data._copies) == cards
    assert_close(results(parallel, {"x": data}, FIT), on_the_host(FIT, count))
    assert {entry["how"] for entry in parallel.report()} == {how}
    parallel = data = None


def test_it_may_be_sharded_over_the_cards(gpus):
    box = gpus(2, seed=1)
    parallel = wrapped(box.devices(4, 2), compile="trace")
    data = resident(parallel, sharded=True)
    assert_close(results(parallel, {"x": data}, FIT), on_the_host(FIT, 4))
    (entry,) = parallel.report().inputs
    assert entry["how"].endswith("whose rows the devices have in parts: 0.0 MB on cuda:0, 0.0 MB on cuda:1")
    parallel = data = None


def test_the_loss_of_merged_outputs_is_that_of_the_host(gpus):
    def spread(y, y_pred):
        return keras.ops.mean((keras.ops.one_hot(y, 3) - y_pred) ** 2) + keras.ops.std(y_pred)

    box = gpus(2)
    parallel = wrapped(box.devices(2), compile=None, loss=spread)
    assert_close(results(parallel, {"x": resident(parallel)}, FIT), on_the_host(FIT, loss=spread))
    parallel = None


def watched_copies(box, devices, work):
    """What is sent to each of the devices' batch buffers meanwhile, in bytes; and how CUDA's memory calls grew."""
    sent, copy, before = [], box.runtime.copy_async, dict(box.sim.calls)
    feeding = [device.copy_in.handle for device in devices]

    def noted(target, source, nbytes, stream):
        if stream in feeding:
            sent.append(nbytes)
        copy(target, source, nbytes, stream)

    box.runtime.copy_async = noted
    try:
        work()
    finally:
        box.runtime.copy_async = copy
    grown = {
        name: box.sim.calls[name] - before.get(name, 0) for name in ("malloc", "free", "hostAlloc", "moduleLoadData")
    }
    return sent, grown


@pytest.mark.parametrize("compile", [None, "trace"])
def test_a_step_gets_row_numbers_alone_and_allocates_nothing(gpus, compile):
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(devices, compile=compile)
    data = resident(parallel)
    every = {"sample_weight", "x", "y"}
    assert set(dict(zip(("x", "y", "sample_weight"), data.nest, strict=True))) == every
    parallel.fit(data, **FIT, verbose=0)
    parallel.evaluate(data, batch_size=8, verbose=0)
    parallel.predict(data, batch_size=8, verbose=0)
    numbers = [8 * 4] * 4 + [8 * 3] * 2  # int64, of two batches of 4 rows and one of 3 for each device
    two_epochs, grown = watched_copies(box, devices, lambda: parallel.fit(data, batch_size=8, epochs=2, verbose=0))
    assert two_epochs == numbers * 2
    assert set(grown.values()) == {0}
    for work in (parallel.evaluate, parallel.predict):
        sent, grown = watched_copies(box, devices, lambda work=work: work(data, batch_size=8, verbose=0))
        assert sent == numbers
        assert set(grown.values()) == {0}
    # What arrays send instead: rows.
    x, y, w = arrays()
    sent, _ = watched_copies(box, devices, lambda: parallel.fit(x, y, sample_weight=w, batch_size=8, verbose=0))
    assert min(sent) > 3 * 4 * 4
    parallel = data = work = None


def test_class_weights_are_put_there_once(gpus):
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(devices, compile=None)
    x, y, _ = arrays()
    data = DeviceDataset((x, y), parallel, {"pixels": Scaled()})
    fit = {"class_weight": {0: 2.0, 1: 0.3}, "batch_size": 8, "epochs": 2, "verbose": 0}
    parallel.fit(data, **fit)
    sent, _ = watched_copies(box, devices, lambda: parallel.fit(data, **fit))
    assert sent == ([8 * 4] * 4 + [8 * 3] * 2) * 2
    assert [len(copies) for copies in data._copies.values()] == [3, 3]  # its own are as they were
    parallel = data = None


def test_a_data_set_of_other_devices_is_refused_before_any_step(gpus):
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(devices, compile=None)
    host = HostDevice(0)
    elsewhere = [(DeviceDataset(arrays(), devices[:1]), r"on gpu:1: it was made for \['cuda:0'\]")]
    elsewhere.append((DeviceDataset(arrays(), [host]), "on gpu:0: it was made in host memory"))
    for data, said in elsewhere:
        for work in (parallel.fit, parallel.evaluate, parallel.predict):
            with pytest.raises(ValueError, match=f"{said}.*DeviceDataset.arrays, parallel"):
                work(data, verbose=0)
        with pytest.raises(ValueError, match=said):
            parallel.fit(resident(parallel), validation_data=data, verbose=0)
        with pytest.raises(ValueError, match=said):
            parallel.train_on_batch(data.rows([1, 2]))
    assert parallel._steps.made_engine is None
    host.close(LIMIT)
    parallel = data = elsewhere = work = None
