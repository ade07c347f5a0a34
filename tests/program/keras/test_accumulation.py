"""Gradient accumulation: the gradients of inner steps wait on their replicas, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.comm.host.communicator import HostCommunicator

optimizers = keras.optimizers
SIZES = [12, 7, 10, 2, 9, 11, 1, 8]  # with 2 rows and 1 row some replicas have none


@pytest.fixture(autouse=True)
def _five_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(5)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sources of each all-reduce so far."""
    calls: list[int] = []
    original = HostCommunicator.begin

    def spy(self: Any, sources: Any, *args: Any, **more: Any) -> Any:
        calls.append(len(sources))
        return original(self, sources, *args, **more)

    monkeypatch.setattr(HostCommunicator, "begin", spy)
    return calls


@keras.saving.register_keras_serializable(package="accumulation")
class Failing(keras.layers.Layer):
    """Passes values on, and fails where one is above 100."""

    def call(self, x: Any) -> Any:
        if keras.ops.convert_to_numpy(x).max() > 100:
            raise ArithmeticError("a value above 100")
        return x


def build(**dense: Any) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            Failing(),
            layers.Dense(8, activation="tanh", **dense),
            layers.BatchNormalization(momentum=0.7),
            layers.Dropout(0.3, seed=9),
            layers.Dense(3),
        ]
    )


def compiled(gpus: int | None, make: Callable[[], Any], dense: Any = None, **options: Any) -> tuple[Any, Any]:
    """The model, and what trains it: itself, or fastdp."""
    model = build(**(dense or {}))
    options = {"sync_batch_norm": True, "check_replicas": True, **options}
    trained = model if gpus is None else fastdp.wrap(model, gpus=gpus, **options)
    trained.compile(optimizer=make(), loss="mse", metrics=["mae"])
    return model, trained


def batches(sizes: list[int] = SIZES) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(2)
    return [
        (generator.normal(size=(n, 6)).astype("float32"), generator.normal(size=(n, 3)).astype("float32"))
        for n in sizes
    ]


def train(trained: Any, data: Any) -> list[list[float]]:
    return [trained.train_on_batch(x, y) for x, y in data]


def state(model: Any, trained: Any) -> dict[str, np.ndarray]:
    """Weights and the optimizer's variables."""
    values = {f"weight {i}": np.array(v) for i, v in enumerate(model.variables)}
    return values | {f"slot {i}": np.array(v) for i, v in enumerate(trained.optimizer.variables)}


def assert_same(one: dict[str, np.ndarray], many: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    assert list(one) == list(many)
    for name, value in one.items():
        scale = max(1.0, float(np.abs(value).max(initial=0)))
        np.testing.assert_allclose(many[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


def waiting(trained: Any) -> int:
    """On how many replicas gradients wait."""
    return trained.engine._accumulation.count


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3),
    "adamw": lambda: optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3, gradient_accumulation_steps=3),
    "averages": lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8, gradient_accumulation_steps=3),
    "clipvalue": lambda: optimizers.SGD(0.1, clipvalue=0.02, gradient_accumulation_steps=3),
    "clipnorm": lambda: optimizers.SGD(0.1, clipnorm=0.05, gradient_accumulation_steps=3),
    "global_clipnorm": lambda: optimizers.SGD(0.1, global_clipnorm=0.1, gradient_accumulation_steps=3),
    "loss scale": lambda: optimizers.SGD(0.1, loss_scale_factor=64.0, gradient_accumulation_steps=3),
    "lamb": lambda: optimizers.Lamb(0.01, epsilon=1e-3, gradient_accumulation_steps=3),
}


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_cycle_is_reduced_once_and_equals_one_device(kind: str, update: str, reduced: list[int]) -> None:
    one, many = compiled(None, OPTIMIZERS[kind]), compiled(3, OPTIMIZERS[kind], update=update)
    logs = [train(trained, batches()) for _, trained in (one, many)]
    assert reduced == [3, 3], "eight steps: two whole cycles, and one that is not over"
    np.testing.assert_allclose(logs[1], logs[0], rtol=2e-5, atol=1e-6)
    assert_same(state(*one), state(*many))
    assert reduced == [3, 3, 3], "who looks at the slots gets what waits"
    assert many[1].engine.program.accumulation.how == "on the replicas, all-reduced once in a cycle"


@pytest.mark.parametrize("gpus", [1, 2, 3, 5])
def test_every_number_of_devices_equals_one_at_every_step_that_somebody_looks_at(gpus: int) -> None:
    one, many = compiled(None, OPTIMIZERS["adamw"]), compiled(gpus, OPTIMIZERS["adamw"])
    for i, batch in enumerate(batches()):
        train(one[1], [batch])
        train(many[1], [batch])
        if i in (1, 3, 4, 7):
            # With 2 rows or 1 the gradient through BatchNormalization is a difference of nearly equal numbers, and Adam
            # divides by what is left of it: processors round that differently for a replica's rows and for the batch's.
            assert_same(state(*one), state(*many), tolerance=1e-4)


@pytest.mark.parametrize("gpus", [2, 5])
def test_replicas_without_rows_in_the_last_step_still_give_what_waits_there(gpus: int, reduced: list[int]) -> None:
    data = batches([10, 2, 1, 1, 9, 1])
    one, many = compiled(None, OPTIMIZERS["sgd"]), compiled(gpus, OPTIMIZERS["sgd"])
    for _, trained in (one, many):
        train(trained, data)
    assert reduced == [gpus, gpus]
    assert_same(state(*one), state(*many))


def test_a_cycle_goes_on_over_the_ends_of_epochs_and_of_fit(reduced: list[int]) -> None:
    x, y = batches([22])[0]
    one, many = compiled(None, OPTIMIZERS["sgd"]), compiled(3, OPTIMIZERS["sgd"])
    for _, trained in (one, many):
        for _ in range(2):
            trained.fit(x, y, batch_size=5, epochs=2, shuffle=False, verbose=0)  # 10 steps, the last of 2 rows each
    assert waiting(many[1]) == 0, "fit leaves nothing on the replicas"
    assert len(reduced) == 6 + 2
    assert_same(state(*one), state(*many))


@pytest.mark.parametrize("through", ["template", "parallel"])
def test_a_file_saved_in_the_middle_of_a_cycle_resumes_as_if_never_interrupted(through: str, tmp_path: Any) -> None:
    data = batches()
    model, whole = compiled(3, OPTIMIZERS["adamw"])
    train(whole, data[:5])
    assert waiting(whole) == 3
    seed = np.array(model.layers[3].seed_generator.state)
    path = str(tmp_path / "middle.keras")
    {"template": model, "parallel": whole}[through].save(path)
    train(whole, data[5:])

    loaded = keras.models.load_model(path)
    accumulated = [np.array(v) for v in loaded.optimizer.variables if "accumulator" in v.path]
    assert len(accumulated) == 6
    assert all(np.abs(v).max() > 0 for v in accumulated)
    resumed = fastdp.wrap(loaded, gpus=2, sync_batch_norm=True)
    resumed.compile(optimizer=loaded.optimizer, loss="mse", metrics=["mae"])
    assert resumed.engine.program.accumulation.how.startswith("on the replicas")
    loaded.layers[3].seed_generator.state.assign(seed)  # a loaded model draws from the start again
    train(resumed, data[5:])
    assert_same(state(model, whole), state(loaded, resumed))


def test_an_h5_file_saved_in_the_middle_of_a_cycle_has_the_accumulators(tmp_path: Any) -> None:
    found: list[dict[str, np.ndarray]] = []
    for gpus in (None, 3):
        _, trained = compiled(gpus, OPTIMIZERS["sgd"])
        train(trained, batches()[:5])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained.save(str(tmp_path / f"{gpus}.h5"))
        with h5py.File(tmp_path / f"{gpus}.h5") as file:
            slots = next(iter(file["optimizer_weights"].values()))
            found.append({name: value[()] for name, value in slots.items() if "accumulator" in name})
    assert len(found[0]) == 6
    assert all(value.any() for value in found[0].values())
    assert_same(*found)


def test_a_checkpoint_after_every_batch_has_what_one_device_would_have_written(tmp_path: Any) -> None:
    x, y = batches([20])[0]
    files = {}
    for name, gpus in (("one", None), ("many", 3)):
        _, trained = compiled(gpus, OPTIMIZERS["sgd"])
        saver = keras.callbacks.ModelCheckpoint(str(tmp_path / (name + "{batch}.keras")), save_freq=1)
        trained.fit(x, y, batch_size=5, epochs=1, shuffle=False, verbose=0, callbacks=[saver])
        files[name] = [keras.models.load_model(tmp_path / f"{name}{batch}.keras") for batch in (1, 2, 3, 4)]
    for one, many in zip(files["one"], files["many"], strict=True):
        assert_same(state(one, one), state(many, many))


@pytest.mark.parametrize("when", [1, 2], ids=["inner step", "last step"])
def test_a_step_that_fails_leaves_the_sums_of_the_others(when: int) -> None:
    data = batches([12] * 6)
    bad = (data[0][0].copy(), data[0][1])
    bad[0][7, 0] = 1000.0  # a row of the second replica
    runs = []
    for fails in (False, True):
        model, trained = compiled(3, OPTIMIZERS["sgd"])
        for i, batch in enumerate(data):
            if fails and i % 3 == when:
                before = waiting(trained)
                with pytest.raises(fastdp.ReplicaError, match="a value above 100"):
                    trained.train_on_batch(*bad)
                assert waiting(trained) == before == 3
            train(trained, [batch])
        assert waiting(trained) == 0
        runs.append(state(model, trained))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], value, err_msg=name)


def test_an_update_that_fails_in_an_inner_step_is_taken_back_with_its_gradients(monkeypatch: Any) -> None:
    data = batches([12] * 6)
    runs = []
    for fails in (False, True):
        model, trained = compiled(3, OPTIMIZERS["sgd"])
        train(trained, data[:1])
        engine = trained.engine
        if fails:
            # An update that is not relied on saves a copy.
            monkeypatch.setattr(type(engine.program), "update_is_reliable", False)
            original = type(engine.program).update

            def update(self: Any, own: Any, totals: Any, engine: Any = engine, original: Any = original) -> None:
                original(self, own, totals)
                if own is engine.replicas[1]._state:
                    raise ArithmeticError("the second update")

            monkeypatch.setattr(type(engine.program), "update", update)
            with pytest.raises(fastdp.ReplicaError, match="the second update"):
                train(trained, data[1:2])
            monkeypatch.undo()
            assert waiting(trained) == 3
        train(trained, data[1:])
        runs.append(state(model, trained))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], value, err_msg=name)


def test_weights_and_slots_assigned_in_the_middle_count_as_on_one_device() -> None:
    data, runs = batches(), []
    for gpus in (None, 3):
        model, trained = compiled(gpus, OPTIMIZERS["sgd"])
        train(trained, data[:1])
        trained.set_weights([0.5 * w for w in trained.get_weights()])
        train(trained, data[1:4])
        for variable in trained.optimizer.variables[2:]:  # not the counter and the rate
            variable.assign(keras.ops.ones_like(variable))
        train(trained, data[4:])
        runs.append(state(model, trained))
    assert_same(*runs)


def test_plain_keras_and_another_parallel_model_go_on_with_the_same_cycle() -> None:
    data, runs = batches([12] * 6), []
    for gpus in (None, 3):
        model, trained = compiled(gpus, OPTIMIZERS["sgd"])
        other = model
        if gpus:
            other = fastdp.wrap(model, gpus=2, sync_batch_norm=True)
            other.compile(optimizer=trained.optimizer, loss="mse", metrics=["mae"])
        for turn in (trained, other, model, trained, other, trained):
            train(turn, [data.pop(0)] if gpus else [batches([12] * 6)[6 - len(data)]])
            if not gpus:
                data = data[1:]
        data = batches([12] * 6)
        runs.append(state(model, trained))
    assert_same(*runs)


def test_another_model_that_predicted_in_between_has_what_was_folded_on_all_its_replicas() -> None:
    data = batches([12] * 6)
    one, (model, first) = compiled(None, OPTIMIZERS["sgd"]), compiled(3, OPTIMIZERS["sgd"], update="each")
    second = fastdp.wrap(model, gpus=2, sync_batch_norm=True, check_replicas=True, update="each")
    second.compile(optimizer=first.optimizer, loss="mse", metrics=["mae"])
    for _ in range(2):  # the second time its engine is there already, and making it does not fold
        train(first, data[:1])
        second.predict_on_batch(data[0][0])
    train(second, data[1:2])  # checks that its replicas have the same slots
    train(first, data[2:])
    train(one[1], [data[0], *data])
    assert_same(state(*one), state(model, first))


def test_an_engine_on_which_nothing_waits_goes_with_its_parallel_model() -> None:
    _, trained = compiled(3, OPTIMIZERS["sgd"])
    train(trained, batches([12] * 3))
    optimizer, engine = trained.optimizer, weakref.ref(trained.engine)
    assert waiting(trained) == 0
    del trained
    gc.collect()
    assert engine() is None
    assert optimizer.built


@pytest.mark.parametrize("looked", [False, True])
def test_an_unfinished_cycle_keeps_nothing_alive_without_its_optimizer(looked: bool) -> None:
    model, trained = compiled(3, OPTIMIZERS["sgd"])
    train(trained, batches([12] * 2))
    if looked:
        state(model, trained)
    engine = weakref.ref(trained.engine)
    del model, trained
    keras.utils.clear_session()
    gc.collect()
    assert engine() is None


def test_what_waits_survives_the_parallel_model() -> None:
    data = batches([12] * 6)
    one, (_, trained) = compiled(None, OPTIMIZERS["sgd"]), compiled(3, OPTIMIZERS["sgd"])
    train(one[1], data[:4])
    train(trained, data[:4])
    optimizer, engine = trained.optimizer, weakref.ref(trained.engine)
    del trained
    gc.collect()
    assert engine() is not None, "gradients wait on its replicas"
    copied = copy.deepcopy(optimizer._accumulated_gradients[-1])
    np.testing.assert_array_equal(np.array(copied), np.array(optimizer._accumulated_gradients[-1]))
    found = {f"slot {i}": np.array(v) for i, v in enumerate(optimizer.variables)}
    assert_same({name: v for name, v in state(*one).items() if name.startswith("slot")}, found)


def test_another_thread_that_looks_waits_for_the_step_in_flight() -> None:
    model, trained = compiled(3, OPTIMIZERS["sgd"])
    one = compiled(None, OPTIMIZERS["sgd"])
    data = batches([12] * 30)
    stop, seen, ended = threading.Event(), [], []

    def look() -> None:
        try:
            while not stop.is_set():
                seen.append(np.array(trained.optimizer._accumulated_gradients[-1]).copy())
        finally:
            ended.append(stop.is_set())

    train(trained, data[:1])
    thread = threading.Thread(target=look)
    thread.start()
    try:
        train(trained, data[1:])
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert ended == [True], "an error would have ended it before"
    assert len(seen) > 1
    train(one[1], data)
    assert_same(state(*one), state(model, trained))


def test_captured_steps_accumulate_too(reduced: list[int]) -> None:
    data = batches([12] * 9)
    one, many = (compiled(3, OPTIMIZERS["adamw"], sync_batch_norm=False, compile=how) for how in (None, "trace"))
    for model, trained in (one, many):
        model.layers[0].call = lambda x: x  # a layer that looks at values cannot be traced
        train(trained, data)
    assert [entry["how"] for entry in many[1].report()] == ["traced"]
    assert len(reduced) == 3 + 3
    assert_same(state(*one), state(*many))


def scaled() -> Any:
    return optimizers.LossScaleOptimizer(optimizers.SGD(0.1, gradient_accumulation_steps=3), initial_scale=4.0)


class Own(optimizers.SGD):
    """An optimizer of the user's."""


EVERY_STEP: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "own class": (lambda: Own(0.1, gradient_accumulation_steps=3), {}, "Own does with the gradient"),
    "constraints": (OPTIMIZERS["sgd"], {"kernel_constraint": keras.constraints.MaxNorm(0.5)}, "constraints"),
    "averages that overwrite": (
        lambda: optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=1, gradient_accumulation_steps=3),
        {},
        "averages overwrite",
    ),
}


@pytest.mark.parametrize("kind", EVERY_STEP)
def test_what_changes_in_inner_steps_is_reduced_in_each_and_says_so(kind: str, reduced: list[int]) -> None:
    make, dense, why = EVERY_STEP[kind]
    one, many = compiled(None, make, dense), compiled(3, make, dense)
    for _, trained in (one, many):
        train(trained, batches([12] * 7))
    assert len(reduced) == 7
    how = many[1].engine.program.accumulation.how
    assert how.startswith("all-reduced in each step: ")
    assert why in how
    assert_same(state(*one), state(*many))


def test_a_wrapped_optimizer_is_reduced_in_each_step(reduced: list[int]) -> None:
    _, trained = compiled(3, scaled)
    train(trained, batches([12] * 4))
    assert len(reduced) == 4
    assert np.isfinite(np.array(trained.template.layers[1].kernel)).all()


def test_an_optimizer_without_accumulation_is_left_alone(reduced: list[int]) -> None:
    _, trained = compiled(2, lambda: optimizers.SGD(0.1))
    train(trained, batches([12] * 2))
    assert len(reduced) == 2
    assert trained.engine.program.accumulation.how == ""
    assert {type(v) for v in trained.optimizer.variables} == {keras.Variable}


def test_gradients_of_closed_devices_are_said_to_be_lost_once() -> None:
    _, trained = compiled(2, OPTIMIZERS["sgd"])
    train(trained, batches([12]))
    for device in trained.devices:
        device.close()
    with pytest.raises(RuntimeError, match="closed"):
        np.array(trained.optimizer._accumulated_gradients[-1])
    assert not np.array(trained.optimizer._accumulated_gradients[-1]).any()
    assert torch.isfinite(trained.template.layers[1].kernel.value).all()
