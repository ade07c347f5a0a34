"""With `shards=` a run goes on from its checkpoint on fewer or more devices, bit for bit; `fastdp verify` sees it."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import torch
from faults import Fault, injected
from torch import nn
from torch.nn import functional

import fastdp
from fastdp.callbacks import Checkpoint
from fastdp.cli import main

X = np.random.default_rng(0).normal(size=(44, 4)).astype("float32")
Y = X.sum(1, keepdims=True)


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


class Stop(Exception):
    """Ends a run in the middle of an epoch."""


class StopsAt(keras.callbacks.Callback):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise Stop


def fitted(folder, devices, stops_at=99, **options):
    """A part of a run of Keras's `fit`."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    options = {"shards": 8, "compile": None, "fingerprint": folder.with_suffix(".jsonl"), **options}
    parallel = fastdp.wrap(model, gpus=devices, **options)
    parallel.compile(keras.optimizers.Adam(0.01), "mse")
    callbacks = [StopsAt(stops_at), Checkpoint(folder, every_steps=2)]
    try:
        parallel.fit(X, Y, batch_size=16, epochs=3, verbose=0, callbacks=callbacks)
    except Stop:
        callbacks[1].close()


def trained(folder, devices, stops_at=99, **options):
    """A part of a run of a torch train step, which accumulates gradients."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
    options = {"shards": 8, "fingerprint": folder.with_suffix(".jsonl"), **options}
    parallel = fastdp.wrap(module, gpus=devices, **options)
    step = parallel.train_step(
        functional.mse_loss, lambda p: torch.optim.Adam(p, lr=0.01), reduction="mean", accumulate=2
    )
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    try:
        with fastdp.Checkpoint(folder, model=parallel, step=step, every_steps=3) as checkpoint:
            checkpoint.restore()
            for _epoch in checkpoint.epochs(3):
                for batch in checkpoint.batches(loader):
                    stops_at -= 1
                    if stops_at < 0:
                        raise Stop
                    step(*batch)
                    checkpoint.step()
    except Stop:
        pass


@pytest.mark.parametrize("run", [fitted, trained])
def test_a_run_goes_on_with_other_devices_to_the_same_bits(run, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 3)
    run(parts, 8, stops_at=4)  # a checkpoint is of step 2 or 3
    run(parts, 1, stops_at=3)
    run(parts, 5)
    assert main(["verify", str(whole), str(parts)]) == 0
    assert "to the last bit" in capsys.readouterr().out
    assert main(["verify", str(whole.with_suffix(".jsonl")), str(parts.with_suffix(".jsonl"))]) == 0
    assert "The same in all 9 steps" in capsys.readouterr().out
    assert main(["verify", "--json", str(parts.with_suffix(".jsonl"))]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == 3


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("run", [fitted, trained])
def test_a_run_that_has_lost_a_device_goes_on_on_others_to_the_same_bits(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 2)
    with injected(Fault("run", "virtual:2 (part 0)", "lose")) as fault:
        run(parts, 3, stops_at=4, on_device_loss="continue")
    assert fault.struck
    run(parts, [4, 5])
    assert main(["verify", str(whole), str(parts)]) == 0
    assert main(["verify", str(whole.with_suffix(".jsonl")), str(parts.with_suffix(".jsonl"))]) == 0


def test_another_number_of_shards_is_told_and_verify_finds_the_first_step(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fitted(whole, 2)
    fitted(parts, 2, stops_at=5)
    with pytest.warns(UserWarning, match=r"is of a model with shards=8, and the run goes on with shards=4"):
        fitted(parts, 2, shards=4)
    assert main(["verify", str(whole), str(parts), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differ"] > 1
    assert any(name["name"].startswith("model/") and name["ulps"] > 0 for name in found["differences"])
    assert main(["verify", str(whole.with_suffix(".jsonl")), str(parts.with_suffix(".jsonl")), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["steps"][0]) == (4, 9)  # the checkpoint's
    assert found["what"] in ("losses", "gradients")
