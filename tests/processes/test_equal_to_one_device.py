"""Several processes by torchrun train what one device trains on the whole batch."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import process_cases
import pytest
import torch
from torchrun import torchrun

import fastdp

CASES = [name for name in process_cases.CASES if name not in ("halves", "shards")]
IN_FLOAT64 = ("train_step", "loop")


@pytest.fixture(scope="module")
def alone():
    """What one device finds."""
    fastdp.set_virtual_devices(1)
    return process_cases.run(1, list(process_cases.CASES))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of two processes with two devices finds."""
    folder = tmp_path_factory.mktemp("two")
    ended = torchrun(Path(process_cases.__file__), 2, folder, processes=2)
    assert ended.returncode == 0, ended.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_of_two_devices_equal_one_device(case, alone, together):
    # Keras adds losses and metrics up in float32, whatever the model's dtype.
    close = {"rtol": 1e-9, "atol": 1e-12} if case in IN_FLOAT64 else {"rtol": 1e-6, "atol": 1e-7}
    for rank, found in enumerate(together):
        assert found[case].keys() == alone[case].keys()
        for name, value in alone[case].items():
            np.testing.assert_allclose(found[case][name], value, err_msg=f"process {rank}: {name}", **close)


@pytest.mark.parametrize("case", process_cases.CASES)
def test_processes_end_with_the_same_bits(case, together):
    for name, value in together[0][case].items():
        assert np.array_equal(value, together[1][case][name]), name


def test_shards_have_the_same_bits_on_two_processes_of_two_devices_as_on_one_device(alone, together):
    for found in together:
        for name, value in alone["shards"].items():
            assert np.array_equal(found["shards"][name], value), name


def test_the_generator_goes_on_as_on_one_device(alone, together):
    assert together[1]["train_step"]["after"] == alone["train_step"]["after"] != float(torch.rand(()))


def test_gradients_that_travel_as_bfloat16_are_rounded_twice_and_no_more(alone, together):
    for name, exact in alone["halves"].items():
        wrong = np.abs(together[0]["halves"][name] - exact)
        assert 0 < wrong.max() <= np.abs(exact).max() / 64, name
