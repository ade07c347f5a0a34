"""deterministic=True for torch modules: torch's deterministic algorithms while a step runs, and only then."""

from __future__ import annotations

import queue
from typing import ClassVar

import pytest
import torch

import fastdp


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


class Noting(torch.nn.Module):
    seen: ClassVar[queue.SimpleQueue] = queue.SimpleQueue()  # no list: forward must not change what devices share

    def __init__(self, puts=False):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.puts = puts

    def forward(self, x):
        self.seen.put(torch.are_deterministic_algorithms_enabled())
        if self.puts:
            x = torch.zeros_like(x).put(torch.arange(x.numel()), x.reshape(-1), accumulate=False)
        return self.linear(x)


def noted():
    """What was noted since the last call."""
    return {Noting.seen.get() for _ in range(Noting.seen.qsize())}


def step_of(module, **options):
    parallel = fastdp.wrap(module, gpus=3, **options)
    return parallel, parallel.train_step(torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1))


def test_steps_and_calls_are_deterministic_and_leave_torchs_settings_alone():
    parallel, step = step_of(Noting(), deterministic=True)
    step(torch.ones(7, 4), torch.ones(7, 2))
    parallel(torch.ones(7, 4))
    assert noted() == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_it_they_are_as_the_user_has_set_torch():
    _, step = step_of(Noting())
    step(torch.ones(7, 4), torch.ones(7, 2))
    assert noted() == {False}


def test_an_operation_without_a_deterministic_form_is_an_error_that_names_the_module():
    _, step = step_of(Noting(puts=True), deterministic=True)
    with pytest.raises(RuntimeError, match="deterministic implementation") as caught:
        step(torch.ones(7, 4), torch.ones(7, 2))
    assert "Noting" in " ".join(caught.value.__notes__)
    assert not torch.are_deterministic_algorithms_enabled()
