"""Captured steps of Keras models and torch modules: for a known shape the host thread makes nothing anew."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options
from fastdp.runtime.queue import QueueDevice
from fastdp.torch.parallel_module import TorchParallel

ROWS = 12
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(ROWS, 8)).astype("float32")
Y = GENERATOR.normal(size=(ROWS, 1)).astype("float32")


def keras_step(devices, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    parallel = ParallelModel(model, devices, Options(timeout=30.0, compile="trace", **options))
    parallel.compile(keras.optimizers.Adam(0.01), "mse")
    return parallel, lambda: parallel.train_on_batch(X, Y)


def torch_step(devices, **options):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    parallel = TorchParallel(module, devices, Options(timeout=30.0, compile="trace", **options))
    step = parallel.train_step(F.mse_loss, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    return parallel, lambda: step(torch.from_numpy(X), torch.from_numpy(Y))


@pytest.mark.parametrize("graph", ["auto", "step"])
@pytest.mark.parametrize("kind", [keras_step, torch_step])
def test_a_known_step_makes_no_event_and_no_launch_anew_and_wakes_nobody(cards, monkeypatch, kind, graph):
    from fastdp.comm.cuda.one_thread import OneThreadReduction
    from fastdp.runtime.cuda.feed import Feed
    from fastdp.runtime.cuda.streams import CudaEvent

    parallel, step = kind(cards.devices(3, 3), graph=graph)
    for _ in range(8):
        step()
    assert {entry["how"] for entry in parallel.report()} == {"step graph" if graph == "step" else "graph"}
    taken, made = [], []
    take = Feed.take_idle
    monkeypatch.setattr(Feed, "take_idle", lambda *given: taken.append(take(*given)) or taken[-1])
    for owner, name in ((OneThreadReduction, "__init__"), (CudaEvent, "__init__"), (QueueDevice, "_rouse")):
        noted = getattr(owner, name)

        def noting(*given, noted=noted, name=name):
            made.append(name)
            return noted(*given)

        monkeypatch.setattr(owner, name, noting)
    already = CudaEvent.issued_already
    monkeypatch.setattr(CudaEvent, "issued_already", lambda *given: made.append("issued_already") or already(*given))
    for _ in range(3):
        step()
    if kind is torch_step:  # each step begins with copies of the module's weights, which the user may have written
        made = [name for name in made if name != "issued_already"]
    assert made == []
    assert len(taken) == 9
    assert all(rows is not None for rows in taken)
