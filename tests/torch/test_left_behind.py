"""Models that are dropped leave nothing in memory: traced ones, and those whose steps have failed."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import suppress

import pytest
import torch
from faults import Fault, injected
from torch import fx, nn

import fastdp

X, Y = torch.ones(4, 3), torch.ones(4, 1)


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def left():
    """How many objects of fastdp there are, by class, and sources that torch keeps."""
    gc.collect()
    classes = [type(one) for one in gc.get_objects()]
    found = Counter(kind.__name__ for kind in classes if str(kind.__module__).startswith("fastdp."))
    found["sources"] = len(fx.graph_module._loader.eval_cache)
    return +found


def grown(train):
    """What every further model leaves behind. Devices keep a few things of the last one."""
    train()
    train()
    before = left()
    for _ in range(3):
        train()
    return {name: count for name, count in (left() - before).items() if count >= 3}


def wrapped(**options):
    return fastdp.wrap(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), 2, **options)


def test_traced_steps_leave_nothing():
    def train():
        parallel = wrapped(compile="trace")
        step = parallel.train_step(nn.MSELoss(), lambda p: torch.optim.SGD(p, 0.1))
        for _ in range(3):
            step(X, Y)
        assert {entry["how"] for entry in parallel.report().steps} == {"traced"}

    assert not grown(train)


@pytest.mark.parametrize("verb", ["run", "reduce"])
def test_a_loop_whose_backward_pass_has_failed_leaves_nothing(verb):
    def train():
        parallel = wrapped(compile=None)
        loss = nn.functional.mse_loss(parallel(X), Y)
        with injected(Fault(verb, None, "raise")) as fault, suppress(RuntimeError):
            loss.backward()
        assert fault.struck

    assert not grown(train)
