"""A `fit` that is killed at any moment and started again ends with the weights of one that was never killed."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import keras
import pytest
import torch
from killed_runs import Moment, run

SCRIPT = Path(__file__).with_name("keras_run.py")


def differences(one, other, place=""):
    """The places where two nests differ."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [found for key in one for found in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list):
        assert len(one) == len(other)
        return [
            found
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{place}.{i}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [place]


def batches(printed):
    return sum(line.startswith("batch") for line in printed.splitlines())


@pytest.mark.parametrize(("devices", "how"), [(1, "plain"), (2, "wrapped"), (2, "installed"), (2, "steps")])
def test_a_killed_fit_ends_with_the_bits_of_one_that_was_never_killed(tmp_path, devices, how):
    steps = batches(run(SCRIPT, devices, how, tmp_path / "whole", tmp_path / "whole.pt"))
    command = (SCRIPT, devices, how, tmp_path / "run", tmp_path / "run.pt")
    moments = random.Random(f"{devices} {how}")
    for line in (13, moments.randrange(2, 8), moments.randrange(2, 8)):
        run(*command, moment=Moment(line, moments.uniform(0, 0.1)), status=-9)
    assert 0 < batches(run(*command)) <= steps - 2
    whole = torch.load(tmp_path / "whole.pt")
    assert differences(torch.load(tmp_path / "run.pt"), whole) == []
    assert len(whole["history"]["val_loss"]) == 3
    assert "is over, after epoch 3" in run(*command)
    assert differences(torch.load(tmp_path / "run.pt")["state"], whole["state"]) == []


def test_a_checkpoint_of_two_devices_goes_on_with_three_and_loads_in_plain_keras(tmp_path):
    run(SCRIPT, 2, "wrapped", tmp_path / "run", tmp_path / "2.pt", moment=Moment(13, 0.03), status=-9)
    run(SCRIPT, 3, "wrapped", tmp_path / "run", tmp_path / "3.pt")
    run(SCRIPT, 1, "wrapped", tmp_path / "one", tmp_path / "1.pt")
    with_three, with_one = torch.load(tmp_path / "3.pt"), torch.load(tmp_path / "1.pt")
    torch.testing.assert_close(with_three["state"], with_one["state"], rtol=1e-3, atol=1e-4)
    path = tmp_path / "run" / "step-00000015" / "model.keras"
    with zipfile.ZipFile(path) as archive:
        assert b"fastdp" not in archive.read("config.json")  # loads without it
    loaded = keras.models.load_model(path)
    assert int(loaded.optimizer.iterations) == 15
    for i, value in enumerate(loaded.get_weights()):
        assert torch.equal(torch.tensor(value), with_three["state"][f"{i}"])
