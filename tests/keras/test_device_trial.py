"""`install(always=False)`, as in `fastdp run`: steps that are faster on one device run there, with equal results."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.engine.data_parallel import DataParallel
from fastdp.keras.steps import device_trial
from fastdp.keras.steps.device_trial import BLOCK_STEPS, BLOCKS, WARM_STEPS, DeviceTrial

L, ops = keras.layers, keras.ops
DECIDED = WARM_STEPS + BLOCKS * BLOCK_STEPS


class Own(keras.Model):
    """A model with a `train_step` and a layer of its own."""

    def __init__(self):
        super().__init__()
        layers = [L.Dense(4, "tanh"), L.Dropout(0.3, seed=2), L.Dense(1)]
        self.body = keras.Sequential(layers)

    def call(self, inputs, training=None):
        return self.body(inputs, training=training)

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        loss = ops.mean(ops.square(y - self(x, training=True)))
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        return {"loss": loss}


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


@pytest.fixture
def forward(monkeypatch):
    """The number of calls of layers on all devices so far."""
    seen = []
    call = DataParallel.call
    monkeypatch.setattr(DataParallel, "call", lambda self, *a, **k: seen.append(1) or call(self, *a, **k))
    return seen


def takes(monkeypatch, on_all, alone=1.0):
    """Let trials see these seconds."""
    note = DeviceTrial.note
    monkeypatch.setattr(DeviceTrial, "note", lambda self, _, rows: note(self, on_all if self.on_all else alone, rows))


def trained(steps, make=Own, rows=(7,)):
    keras.utils.set_random_seed(0)
    model = make()
    x = np.random.default_rng(0).normal(size=(7, 3))
    model(x[:2])
    model.compile(keras.optimizers.Adam(0.01), "mse")

    def batches():
        for step in range(steps):
            count = rows[step % len(rows)]
            yield x[:count], x[:count].sum(axis=1, keepdims=True)

    model.fit(batches(), steps_per_epoch=steps, shuffle=False, verbose=0)
    return model


def test_steps_that_are_faster_on_one_device_run_there_with_the_same_result(monkeypatch, forward, capsys):
    expected = trained(DECIDED + 6).get_weights()
    takes(monkeypatch, on_all=1.2)
    fastdp.install(gpus=2, always=False)
    model = trained(DECIDED)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fastdp: training steps of 'own")
    assert "take 1000.0 ms on one device and 1200.0 on 2, so they run on one from now on" in said
    assert "--always" in said
    on_all = len(forward)
    assert on_all == 2 * (WARM_STEPS + BLOCKS * BLOCK_STEPS // 2)  # forward and backward
    model = trained(DECIDED + 6)
    assert len(forward) == 2 * on_all
    for found, wanted in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_all", [0.5, 1.05])
def test_steps_stay_on_all_devices_where_one_is_not_clearly_faster(on_all, monkeypatch, forward, capsys):
    takes(monkeypatch, on_all)
    fastdp.install(gpus=2, always=False)
    trained(DECIDED + 6)
    assert len(forward) == 2 * (DECIDED + 6 - BLOCKS * BLOCK_STEPS // 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [{}, {"always": False, "deterministic": True}])
def test_nothing_goes_by_the_clock_where_that_was_not_asked_for(options, monkeypatch, forward):
    takes(monkeypatch, on_all=9.0)
    fastdp.install(gpus=2, **options)
    trained(DECIDED + 2)
    assert len(forward) == 2 * (DECIDED + 2)


def test_steps_that_are_captured_later_are_not_timed(monkeypatch):
    takes(monkeypatch, on_all=9.0)
    steps = []
    train = DataParallel.train
    monkeypatch.setattr(DataParallel, "train", lambda self, *a, **k: steps.append(1) or train(self, *a, **k))

    def known():
        return keras.Sequential([keras.Input((3,)), L.Dense(2), L.Dense(1)])

    def mixed():
        return keras.Sequential([keras.Input((3,)), L.Dense(2), L.Lambda(lambda x: x * 2.0, (2,)), L.Dense(1)])

    fastdp.install(gpus=2, always=False, compile="auto")
    trained(DECIDED + 2, known)
    assert len(steps) == DECIDED + 2
    trained(DECIDED + 2, mixed)  # code of the user's: never captured by "auto"
    assert len(steps) == 2 * (DECIDED + 2) - BLOCKS * BLOCK_STEPS // 2 - 2


def test_a_last_batch_with_fewer_rows_is_not_counted():
    trial = DeviceTrial()
    for _ in range(WARM_STEPS):
        assert trial.note(9.0, 8) == ""
    assert not trial.on_all
    said = ""
    while not trial.is_over:
        assert trial.note(1e6, 5) == ""
        said = trial.note(3.0 if trial.on_all else 1.0, 8)
    assert said == "take 1000.0 ms on one device and 3000.0"
    assert trial.note(1.0, 8) == ""


def test_plain_steps_between_those_of_all_devices_are_seen_by_all(monkeypatch):
    monkeypatch.setattr(device_trial, "BLOCKS", 10)
    fastdp.install(gpus=2, always=False)
    found = trained(WARM_STEPS + 9 * BLOCK_STEPS, rows=(7, 7, 7, 4)).get_weights()
    fastdp.uninstall()
    for one, other in zip(found, trained(WARM_STEPS + 9 * BLOCK_STEPS, rows=(7, 7, 7, 4)).get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
