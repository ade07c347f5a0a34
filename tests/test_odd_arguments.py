"""Odd arguments of the public functions: named in an error at once (`tests/shared/argument_fuzzer.py` tries more)."""

from __future__ import annotations

import argument_fuzzer
import pytest
import torch

import fastdp
import fastdp.data
from fastdp.utils import HDF5Matrix


@pytest.fixture
def three_devices():
    yield fastdp.set_virtual_devices(3)
    fastdp.set_virtual_devices(0)


def step(**options):
    parallel = fastdp.wrap(torch.nn.Linear(2, 1), 2, compile=None)
    return parallel.train_step(torch.nn.MSELoss(), torch.optim.SGD, **options)


CALLS = {
    "clip_grad_norm": (step, ["1", True, torch.ones(2), -1.0]),
    "merge_device": (lambda merge_device: fastdp.wrap(torch.nn.Linear(2, 1), 2, merge_device=merge_device), [2, 1.5]),
    "outputs": (step, ["no", torch.ones(2), None]),
    "skip_nonfinite": (step, ["no", 2]),
    "folder": (lambda folder: fastdp.Checkpoint(folder, model=torch.nn.Linear(2, 1)), [None, 3, object()]),
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
        with pytest.raises((ValueError, TypeError), match=f"{name}.* must be"):
            call(**{name: value})


def test_odd_arguments_work_or_end_in_a_documented_error(tmp_path, monkeypatch, three_devices):
    monkeypatch.chdir(tmp_path)
    outcomes = argument_fuzzer.main(150, 5)
    assert sum(outcomes.values()) == 150
    assert sum(name.endswith(" right") for name in outcomes) > 3
