"""`shard_optimizer=True`: each device updates its part of the weights, with the bits and files of one optimizer."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from faults import Fault, injected
from least_squares import line

import fastdp
from fastdp.engine.replicas import Replica
from fastdp.engine.rollback import Rollback
from fastdp.options import Options
from fastdp.program.keras.program import KerasProgram

optimizers, layers = keras.optimizers, keras.layers
MADE: dict[str, Any] = {
    "SGD": lambda: optimizers.SGD(0.1, 0.9),
    "Adam": lambda: optimizers.Adam(0.01),
    "AdamW": lambda: without_bias(optimizers.AdamW(0.01, weight_decay=0.1)),
    "Nadam, whose scalars move": lambda: optimizers.Nadam(0.01),
    "clipvalue": lambda: optimizers.RMSprop(0.01, centered=True, clipvalue=0.05),
    "global_clipnorm": lambda: optimizers.Adam(0.01, global_clipnorm=0.1),
    "averages": lambda: optimizers.Adam(0.01, use_ema=True, ema_momentum=0.6, ema_overwrite_frequency=2),
    "accumulation": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss scale": lambda: optimizers.Adam(0.01, loss_scale_factor=8.0),
    "loss scaling": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01, global_clipnorm=0.1)),
}


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


def without_bias(optimizer: Any) -> Any:
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def wrapped(count: int, optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(3)
    parts = [layers.Dense(37, activation="tanh"), layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(3)]
    model = keras.Sequential([keras.Input((19,)), *parts])
    parallel = fastdp.wrap(model, gpus=count, **{"compile": None, **options})
    parallel.compile(optimizer, "mse")
    return parallel


def step(parallel: Any, *numbers: int) -> list[float]:
    """Train on these batches, of which the last rows are fewer than devices."""
    losses = []
    for number in numbers:
        rng = np.random.default_rng(number)
        rows = 5 if number % 3 == 2 else 24
        batch = rng.normal(size=(rows, 19)).astype("f4"), rng.normal(size=(rows, 3)).astype("f4")
        losses.append(float(parallel.train_on_batch(*batch)))
    return losses


def bits(parallel: Any) -> list[bytes]:
    """Of weights, statistics, and all that the optimizer has."""
    values = [*parallel.template.variables, *parallel.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable).tobytes() for variable in values]


def trained(count: int, make: Any, *numbers: int, **options: Any) -> tuple[list[float], list[bytes]]:
    parallel = wrapped(count, make(), **options)
    return step(parallel, *numbers), bits(parallel)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("count", [3])
def test_the_bits_are_those_of_one_optimizer(name, count):
    assert trained(count, MADE[name], 0, 1, 2, shard_optimizer=True) == trained(count, MADE[name], 0, 1, 2)


@pytest.mark.parametrize("count", [2, 8])
def test_the_bits_are_those_of_one_optimizer_on_any_number_of_devices(count):
    assert trained(count, MADE["Adam"], 0, 1, 2, shard_optimizer=True) == trained(count, MADE["Adam"], 0, 1, 2)


@pytest.mark.parametrize("count", [3])
def test_with_shards_neither_the_devices_nor_the_parts_change_a_bit(count):
    alone = trained(8, MADE["Adam"], 0, 1, 2, shards=8)
    assert trained(count, MADE["Adam"], 0, 1, 2, shards=8, shard_optimizer=True) == alone


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_device_has_its_part_of_the_slots_and_no_more(count):
    parallel = wrapped(count, optimizers.Adam(0.01), shard_optimizer=True)
    step(parallel, 0)
    weights = sum(variable.value.numel() for variable in parallel.template.trainable_variables)
    held = [replica.memory.parts.nbytes for replica in parallel.engine.replicas]
    scalars = parallel.engine.replicas[0].memory.slots.nbytes
    gap = 64 * 2 * len(parallel.template.trainable_variables)
    assert 8 * weights <= sum(held) <= 8 * weights + gap
    assert max(held) <= 8 * weights / count + 2 * 64 * count + gap
    assert scalars <= 4 * 64
    assert [device.nbytes["slots"] for device in parallel.report().devices] == [part + scalars for part in held]
    assert "for its part of the weights: flat, in parts" in str(parallel.report())


def test_a_file_is_that_of_one_optimizer(tmp_path: Path):
    parts = wrapped(8, MADE["Adam"](), shard_optimizer=True, shards=8)
    step(parts, 0, 1)
    parts.save(tmp_path / "parts.keras")
    loaded = keras.saving.load_model(tmp_path / "parts.keras")
    slots = (parts.optimizer.variables, loaded.optimizer.variables)
    for ours, theirs in zip(*slots, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))


def resumed(path: Path, first: int, then: int, *, parts: bool) -> list[bytes]:
    """Train on some devices, and on others from the file."""
    options: dict[str, Any] = {"shards": 6, "shard_optimizer": parts}
    begun = wrapped(first, optimizers.Adam(0.01, use_ema=True), **options)
    step(begun, 0, 1)
    begun.save(path)
    loaded = keras.models.load_model(path)
    again = fastdp.wrap(loaded, gpus=then, compile=None, **options)
    again.compile(loaded.optimizer, "mse")
    step(again, 3, 4)
    return bits(again)


@pytest.mark.parametrize(("first", "then"), [(3, 2), (1, 3)])
def test_a_file_is_resumed_on_another_number_of_devices_with_the_same_bits(first, then, tmp_path: Path):
    expected = resumed(tmp_path / "one.keras", 3, 3, parts=False)
    assert resumed(tmp_path / "parts.keras", first, then, parts=True) == expected


def test_slots_may_be_read_written_and_used_by_keras_itself_between_steps():
    def run(**options: Any) -> list[bytes]:
        parallel = wrapped(3, MADE["Adam"](), **options)
        step(parallel, 0)
        slots = parallel.optimizer._momentums
        slots[0].assign(slots[0] * 2)
        slots[1].value.data.add_(1)
        step(parallel, 1)
        gradients = [torch.ones_like(v.value) for v in parallel.template.trainable_variables]
        parallel.optimizer.apply(gradients, parallel.template.trainable_variables)
        step(parallel, 3)
        return bits(parallel)

    assert run(shard_optimizer=True) == run()


def test_accumulated_gradients_may_be_read_in_the_middle_of_a_cycle():
    def run(**options: Any) -> tuple[list[bytes], list[bytes]]:
        parallel = wrapped(3, MADE["accumulation"](), **options)
        step(parallel, 0)
        middle = bits(parallel)
        step(parallel, 1)
        return middle, bits(parallel)

    assert run(shard_optimizer=True) == run()


def test_a_failed_update_leaves_weights_and_all_parts_as_they_were():
    class Late(optimizers.schedules.LearningRateSchedule):
        broken = False

        def __call__(self, step: Any) -> Any:
            if Late.broken:
                raise ArithmeticError("of the schedule")
            return 0.01

    parallel = wrapped(3, optimizers.Adam(Late()), shard_optimizer=True)
    step(parallel, 0)
    before, Late.broken = bits(parallel), True
    with pytest.raises(ArithmeticError, match="no replica's weights were changed"):
        step(parallel, 1)
    assert bits(parallel) == before
    Late.broken = False
    step(parallel, 1)
    twin = wrapped(3, optimizers.Adam(Late()))
    step(twin, 0, 1)
    assert bits(parallel) == bits(twin)


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize(
    "options", [{"shard_optimizer": True}, {"update": "each"}], ids=lambda options: next(iter(options))
)
def test_the_update_of_one_device_that_fails_leaves_all_devices_as_they_were(call, options):
    calls = itertools.count()

    class Failing(optimizers.schedules.LearningRateSchedule):
        strikes: Any = ()

        def __call__(self, step: Any) -> Any:
            if next(calls) in Failing.strikes:
                raise ArithmeticError("of the schedule")
            return 0.01

    parallel = wrapped(3, optimizers.Adam(Failing()), check_replicas=True, **options)
    step(parallel, 0)
    before, Failing.strikes = bits(parallel), [next(calls) + 1 + call]
    with pytest.raises(ArithmeticError, match="no replica's weights were changed"):
        step(parallel, 1)
    assert bits(parallel) == before
    step(parallel, 1)
    twin = wrapped(3, optimizers.Adam(Failing()))
    step(twin, 0, 1)
    assert bits(parallel) == bits(twin)


def test_no_device_trusts_its_first_update_because_that_of_another_has_succeeded(monkeypatch):
    done, save, update = threading.Event(), Rollback.save, Replica.update

    def late(rollback: Rollback, replica: Replica, generation: int) -> bool:
        assert replica.rank != 1 or done.wait(60)
        time.sleep(0.05)  # whoever is done has noted it
        return save(rollback, replica, generation)

    def failing(replica: Replica, totals: Any) -> None:
        update(replica, totals)
        if replica.rank == 0:
            done.set()
        if replica.rank == 1:
            raise ArithmeticError("of a device")

    monkeypatch.setattr(KerasProgram, "rehearse_update", lambda *_: False)  # as on GPUs
    parallel = wrapped(3, MADE["Adam"](), shard_optimizer=True)
    parallel.make_train_function()
    before = bits(parallel)
    with monkeypatch.context() as patched:
        patched.setattr(Rollback, "save", late)
        patched.setattr(Replica, "update", failing)
        with pytest.raises(ArithmeticError, match="no replica's weights were changed"):
            step(parallel, 0)
    assert bits(parallel) == before
    step(parallel, 0)
    twin = wrapped(3, MADE["Adam"]())
    step(twin, 0)
    assert bits(parallel) == bits(twin)


def test_a_batch_that_is_not_finite_is_skipped_on_all_parts():
    parallel = wrapped(3, MADE["Adam"](), shard_optimizer=True, on_nonfinite="skip", check_replicas=True)
    step(parallel, 0)
    before = bits(parallel)[-4:]
    with pytest.warns(UserWarning, match="a step changed nothing"):
        parallel.train_on_batch(np.full((6, 19), np.nan, "f4"), np.zeros((6, 3), "f4"))
    assert bits(parallel)[-4:] == before


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("verb", ["run", "update"])
def test_the_slots_of_a_lost_device_go_on_on_the_others(verb):
    parallel = wrapped(3, MADE["Adam"](), shard_optimizer=True, shards=6, on_device_loss="continue")
    step(parallel, 0)
    with injected(Fault(verb, "virtual:1 (part 0)", "lose")) as fault:
        step(parallel, 1)
    assert fault.struck
    step(parallel, 3)
    twin = wrapped(3, MADE["Adam"](), shards=6)
    step(twin, 0, 1, 3)
    assert bits(parallel) == bits(twin)
    assert {replica.device.part_of.name for replica in parallel.engine.replicas} == {"virtual:0", "virtual:2"}
    assert all(replica.memory.parts.nbytes for replica in parallel.engine.replicas)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_parts_of_a_full_device_have_parts_of_the_slots():
    def run(**options: Any) -> list[np.ndarray]:
        parallel = wrapped(2, MADE["SGD"](), sync_batch_norm=True, **options)
        step(parallel, 0)
        with injected(Fault("run", "virtual:0", "memory" if options else "delay")):
            step(parallel, 1)
        step(parallel, 3)
        assert len(parallel.engine.replicas) == 2 + bool(options)
        return [keras.ops.convert_to_numpy(v) for v in [*parallel.template.variables, *parallel.optimizer.variables]]

    for ours, theirs in zip(run(shard_optimizer=True, on_oom="split"), run(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(1)
        self.build((None, 19))

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.Adafactor(0.01), "Adafactor updates variable by variable: Adafactor is not known to be"),
        (lambda: optimizers.Adam(0.01, clipnorm=1.0), "Adam updates variable by variable: clipnorm is a norm of each"),
        (
            lambda: optimizers.Adam(0.01, global_clipnorm=1.0, gradient_accumulation_steps=2),
            "Adam clips accumulated gradients by their global norm.*use `clipvalue`",
        ),
    ],
)
def test_an_optimizer_without_parts_is_refused_by_name(make, message):
    parallel = wrapped(2, make(), shard_optimizer=True)
    with pytest.raises(ValueError, match=message):
        step(parallel, 0)


def test_a_setting_that_comes_later_is_refused_before_anything_changes():
    parallel = wrapped(2, optimizers.Adam(0.01), shard_optimizer=True)
    step(parallel, 0)
    before = bits(parallel)
    parallel.optimizer.clipnorm = 1.0
    with pytest.raises(ValueError, match="clipnorm is a norm of each variable"):
        step(parallel, 1)
    parallel.optimizer.clipnorm = None
    assert bits(parallel)[-4:] == before[-4:]
    step(parallel, 1)


def test_what_has_no_parts_is_refused():
    own = fastdp.wrap(Own(), gpus=2, shard_optimizer=True)
    own.compile("adam", "mse")
    with pytest.raises(ValueError, match="Own has a `train_step` of its own"):
        own.train_on_batch(np.zeros((4, 19), "f4"), np.zeros((4, 1), "f4"))
    with pytest.raises(ValueError, match=r"`shard_optimizer` is for Keras models.*for a FunctionProgram"):
        fastdp.DataParallel(line(), 2, options=Options(shard_optimizer=True))
    with pytest.raises(ValueError, match="`update` says where one optimizer runs"):
        Options(shard_optimizer=True, update="first")
    with pytest.raises(TypeError, match="`shard_optimizer` must be True or False"):
        Options(shard_optimizer="yes")
