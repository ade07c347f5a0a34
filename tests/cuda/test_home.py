"""cpu_relocation on GPUs: the model's own weights live in host memory, and follow what the replicas train."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from least_squares import line, rows

import fastdp
from fastdp.options import Options
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("update", ["each", "first"])
@pytest.mark.parametrize(("count", "cards"), [(1, 1), (2, 2), (4, 1)])
def test_a_programs_parameters_lie_in_host_memory_and_follow(gpus, count, cards, update, seed):
    box = gpus(cards, seed=seed)
    ours, theirs = line(), line()
    hosts = [HostDevice(i) for i in range(count)]
    engine = fastdp.DataParallel(
        ours, box.devices(count, cards), timeout=LIMIT, update=update, cpu_relocation=True, check_replicas=True
    )
    reference = fastdp.DataParallel(theirs, hosts, timeout=LIMIT)
    assert type(ours.parameters["w"]) is np.ndarray
    for step in range(4):
        if step == 2:
            for program in (ours, theirs):
                program.set_parameters({"w": 0.5 * program.parameters["w"]})
        batch = rows(7, step)
        np.testing.assert_allclose(engine.train(batch).sums, reference.train(batch).sums, rtol=1e-5)
        np.testing.assert_allclose(ours.parameters["w"], theirs.parameters["w"], rtol=1e-5, atol=1e-6)
        first = engine.replicas[0].device.to_host(engine.replicas[0].memory.variables.buffers["float32"])
        np.testing.assert_array_equal(first, engine.group.home.home.variables.buffers["float32"])
    for host in hosts:
        host.close()
    del engine, ours, program


def test_a_failed_step_leaves_them_as_they_were(gpus):
    box = gpus(2)
    program = line()
    engine = fastdp.DataParallel(program, box.devices(2), timeout=LIMIT, cpu_relocation=True, check_replicas=True)
    engine.train(rows(8, 0))
    before, good = program.parameters["w"].copy(), (program._train, program._update)

    def fail(*args):
        raise FloatingPointError("no number")

    for place in ("_train", "_update"):
        setattr(program, place, fail)
        with pytest.raises(FloatingPointError, match="no number"):
            engine.train(rows(8, 1))
        program._train, program._update = good
        np.testing.assert_array_equal(program.parameters["w"], before)
    engine.train(rows(8, 2))
    assert (program.parameters["w"] != before).any()
    del engine, program


def template():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(4, activation="tanh")(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 6)).astype("float32"), rng.normal(size=(20, 2)).astype("float32")


class Halving(keras.callbacks.Callback):
    """Assigns the template's weights in the middle of training."""

    def on_train_batch_end(self, step, logs=None):
        if step == 1:
            self.model.template.set_weights([0.5 * w for w in self.model.template.get_weights()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_template_keeps_its_weights_and_goes_on_sharing_them(gpus, optimizer, tmp_path):
    from fastdp.keras.parallel_model import ParallelModel

    box = gpus(2)
    x, y = data()
    results = []
    hosts = [HostDevice(i) for i in range(2)]
    for devices in (hosts, box.devices(2)):
        model = template()
        loaded = [w + 1 for w in model.get_weights()]
        model.set_weights(loaded)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parallel = ParallelModel(model, devices, Options(timeout=LIMIT, cpu_relocation=True, check_replicas=True))
        parallel.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
        for a, b in zip(parallel.get_weights(), loaded, strict=True):
            np.testing.assert_array_equal(a, b)
        history = parallel.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[Halving()]).history
        # What the template computes by itself is what the replicas have been trained to.
        np.testing.assert_allclose(model.predict(x, verbose=0), parallel.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
        model.save_weights(tmp_path / "some.weights.h5")
        results.append((history, model.get_weights()))
        pinned = [tuple(v.value.shape) for v in model.variables if in_pinned_memory(box.sim, v)]
        assert len(pinned) == (len(model.variables) if devices is not hosts else 0)
    for key in results[0][0]:
        np.testing.assert_allclose(results[0][0][key], results[1][0][key], rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for host in hosts:
        host.close()
    del parallel, model, results, history


def in_pinned_memory(sim, variable):
    found = sim.memory._find(variable._value.data_ptr())
    return found is not None and found.device is None


def test_weights_that_live_on_a_gpu_already_stay_there_and_it_is_said(gpus):
    box = gpus(2)
    program, devices = line(), box.devices(2)
    first = fastdp.DataParallel(program, devices, timeout=LIMIT)
    with pytest.warns(UserWarning, match="`cpu_relocation=True` has no effect here"):
        second = fastdp.DataParallel(program, devices, timeout=LIMIT, cpu_relocation=True)
    second.train(rows(8, 0))
    del first, second, program


def test_an_engine_without_it_goes_on_with_weights_in_host_memory(gpus):
    box = gpus(2)
    program, devices = line(), box.devices(2)
    first = fastdp.DataParallel(program, devices, timeout=LIMIT, cpu_relocation=True, check_replicas=True)
    second = fastdp.DataParallel(program, devices[::-1], timeout=LIMIT, check_replicas=True)
    sums = []
    for turn in range(4):
        engine = first if turn % 2 else second
        sums.append(float(engine.train(rows(8, 0)).sums[0]))
    assert sums == sorted(sums, reverse=True)  # each goes on from the other's weights
    assert len(set(sums)) == 4
    del first, second, program, engine
