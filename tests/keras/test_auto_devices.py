"""`gpus="auto"`: one script for machines with GPUs and without, whatever kind of model it wraps."""

from __future__ import annotations

import keras
import numpy as np
import pynvml
import pytest
import torch

import fastdp
from fastdp.runtime import select

x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    def no_driver():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    monkeypatch.delenv("FASTDP_VIRTUAL_DEVICES", raising=False)
    monkeypatch.setattr(select._default, "told", False)
    yield
    fastdp.set_virtual_devices(0)


def keras_model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def test_a_keras_model_trains_on_the_cpu(capsys):
    model = keras_model()
    parallel = fastdp.wrap(model, gpus="auto", compile=None)
    assert [device.name for device in parallel.devices] == ["cpu:0"]
    parallel.compile("sgd", "mse")
    before = model.get_weights()[0].copy()
    parallel.fit(x, x[:, :1], batch_size=5, verbose=0)
    assert not np.array_equal(model.get_weights()[0], before)
    np.testing.assert_array_equal(parallel.predict(x, verbose=0), model.predict(x, verbose=0))
    assert capsys.readouterr().err.count("runs on one device on the CPU") == 1


def test_a_torch_module_and_an_engine_run_on_the_cpu_and_it_is_told_once(capsys):
    module = torch.nn.Linear(3, 1)
    parallel = fastdp.wrap(module, gpus="auto")
    torch.testing.assert_close(parallel(torch.tensor(x)), module(torch.tensor(x)))
    (device,) = select.devices_of_engine("auto", 0)
    assert device is parallel.devices[0]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.filterwarnings("error")
def test_with_virtual_devices_auto_is_all_of_them_and_nothing_is_said(capsys):
    fastdp.set_virtual_devices(2)
    assert len(fastdp.wrap(keras_model(), gpus="auto").devices) == 2
    assert len(fastdp.wrap(torch.nn.Linear(3, 1), gpus="auto").devices) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("devices", [0, 4])
def test_multi_gpu_model_keeps_the_rules_of_keras(devices):
    fastdp.set_virtual_devices(devices)
    with pytest.raises(ValueError, match="gpus='auto'"):
        fastdp.multi_gpu_model(keras_model(), gpus="auto")
