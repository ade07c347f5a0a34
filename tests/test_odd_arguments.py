"""Odd arguments of the public functions: named in an error at once (`tests/shared/argument_fuzzer.py` tries more)."""

from __future__ import annotations

import argument_fuzzer
import numpy as np
import pytest
import torch

import fastdp
import fastdp.data
from fastdp.callbacks import Checkpoint, Monitor, TensorBoard
from fastdp.data import Augment, DeviceDataset, Scaled
from fastdp.runtime.select import resolve
from fastdp.utils import HDF5Matrix


@pytest.fixture
def three_devices():
    yield fastdp.set_virtual_devices(3)
    fastdp.set_virtual_devices(0)


def step(**options):
    parallel = fastdp.wrap(torch.nn.Linear(2, 1), 2, compile=None)
    return parallel.train_step(torch.nn.MSELoss(), torch.optim.SGD, **options)


def resident(**options):
    return DeviceDataset([np.ones((4, 2), np.uint8)], resolve(2), **options)


CALLS = {
    "clip_grad_norm": (step, ["1", True, torch.ones(2), -1.0]),
    "merge_device": (lambda merge_device: fastdp.wrap(torch.nn.Linear(2, 1), 2, merge_device=merge_device), [2, 1.5]),
    "outputs": (step, ["no", torch.ones(2), None]),
    "skip_nonfinite": (step, ["no", 2]),
    "folder": (lambda folder: fastdp.Checkpoint(folder, model=torch.nn.Linear(2, 1)), [None, 3, object()]),
    "folder ": (Checkpoint, [None, 3, object()]),
    "bar": (Monitor, ["no", None, 2]),
    "append": (Monitor, ["no", 2]),
    "interval": (Monitor, ["1", True, float("nan"), -1]),
    "log_dir": (TensorBoard, [None, 3]),
    "histogram_freq": (TensorBoard, ["x", None, float("inf"), 1.5, -1]),
    "write_graph": (TensorBoard, ["no"]),
    "profile_batch": (TensorBoard, [float("inf"), "x"]),
    "scale": (Scaled, [None, True, "1", float("nan"), 1e39]),
    "casts": (lambda casts: resident(casts=casts), [[1], "x", {0: 3}, True]),
    "batch_size": (lambda **one: resident().batches(**one), [None, 0, True, 1.5, "2"]),
    "seed": (lambda seed: resident().batches(2, seed=seed), [-1, 1.5, "x"]),
    "shuffle": (lambda shuffle: resident().batches(2, shuffle=shuffle), ["no", None]),
    "drop_last": (lambda drop_last: resident().batches(2, drop_last=drop_last), ["no"]),
    "images": (lambda images: Augment([], images=images), [3, ["x"]]),
    "path": (fastdp.trace, [None, 3, b"x"]),
    "nvtx": (lambda nvtx: fastdp.trace("x.json", nvtx=nvtx), ["no"]),
    "datapath": (lambda datapath: HDF5Matrix(datapath, "x"), [None, 3]),
    "dataset": (lambda dataset: HDF5Matrix("x.h5", dataset), [None, b"x"]),
    "batches": (lambda batches: fastdp.data.prefetch([1], batches), [None, 1.5, "2"]),
    "dtype": (lambda dtype: fastdp.data.prefetch([1], dtype=dtype), ["x", 3, "int32"]),
}


@pytest.mark.usefixtures("three_devices")
@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_no_use_is_named(name):
    call, values = CALLS[name]
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"{name.strip()}.* must be"):
            call(**{name.strip(): value})


def test_odd_arguments_work_or_end_in_a_documented_error(tmp_path, monkeypatch, three_devices):
    monkeypatch.chdir(tmp_path)
    outcomes = argument_fuzzer.main(150, 5)
    assert sum(outcomes.values()) == 150
    assert sum(name.endswith(" right") for name in outcomes) > 3
