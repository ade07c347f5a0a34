"""`flush()`: the update of an accumulation window that was cut short is that of the usual loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

each_update = pytest.mark.parametrize(("devices", "update"), [(1, "first"), (2, "each"), (3, "first"), (8, "each")])


def mlp() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 4)).double()


def epoch(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [
        (torch.randn(n, 6, generator=generator).double(), torch.randint(0, 4, (n,), generator=generator)) for n in sizes
    ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def wrapped(module, devices, update="first"):
    return fastdp.wrap(module, gpus=devices, update=update, sync_batch_norm=True, check_replicas=True)


def assert_equal_modules(module, reference):
    for (name, ours), theirs in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def train_plainly(module, epochs, accumulate, clip):
    """The usual loop, as Accelerate and Lightning do it: the last batch of an epoch ends its window."""
    optimizer, norms = adam(module.parameters()), []
    for batches in epochs:
        for i, (x, y) in enumerate(batches, 1):
            (F.cross_entropy(module(x), y) / accumulate).backward()
            if i % accumulate == 0 or i == len(batches):
                norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip))
                optimizer.step()
                optimizer.zero_grad()
    return norms


# The last epoch has windows of one, two and three calls; batches have fewer rows than devices, also the last ones.
EPOCHS = [epoch(24, 9, 16, 5), epoch(16, 3), epoch(8, 24, 4), epoch(24, 17, 5, 16, 2)]


@each_update
def test_windows_that_epochs_cut_short_train_as_the_usual_loop(devices, update):
    module = mlp()
    reference = copy.deepcopy(module)
    step = wrapped(module, devices, update).train_step(F.cross_entropy, adam, accumulate=3, clip_grad_norm=0.3)
    norms, changed = [], []
    for batches in EPOCHS:
        for x, y in batches:
            step(x, y)
            norms += [step.result.grad_norm] * step.result.updated
        changed.append(step.flush())
        norms += [step.result.grad_norm] * changed[-1]
        assert step.result.updated
        assert not step.flush()
    assert changed == [True, True, False, True]
    torch.testing.assert_close(norms, train_plainly(reference, EPOCHS, 3, 0.3), rtol=1e-9, atol=1e-11)
    assert_equal_modules(module, reference)
    assert {float(state["step"]) for state in step.optimizer.state.values()} == {6.0}


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_waits_before_the_first_call_and_without_accumulation(devices):
    module = mlp()
    step = wrapped(module, devices).train_step(F.cross_entropy, adam)
    assert not step.flush()
    assert step.result is None
    step(*EPOCHS[0][0])
    before = copy.deepcopy(module)
    result = step.result
    assert not step.flush()
    assert step.result is result
    assert_equal_modules(module, before)


class Choosing(nn.Module):
    """Uses one of its two layers, as the sign of the first number says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.below, self.above = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        return self.below(x) if x[0, 0] < 0 else self.above(x)


@each_update
def test_layers_without_a_gradient_in_the_window_are_left_alone(devices, update):
    module = Choosing()
    reference = copy.deepcopy(module)
    decays = lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5)  # noqa: E731
    step = fastdp.wrap(module, gpus=devices, update=update).train_step(F.cross_entropy, decays, accumulate=3)
    x, y = torch.rand(9, 6, dtype=torch.float64) + 0.1, torch.randint(0, 4, (9,))
    optimizer = decays(reference.parameters())
    for sign in (1, -1):
        step(sign * x, y)
        assert step.flush()
        optimizer.zero_grad()
        (F.cross_entropy(reference(sign * x), y) / 3).backward()
        optimizer.step()
    assert_equal_modules(module, reference)


@each_update
def test_a_window_with_a_loss_that_is_not_finite_is_skipped_whole(devices, update):
    module = mlp()
    before = copy.deepcopy(list(module.parameters()))
    loss_fn = lambda out, y: F.cross_entropy(out, y) * (float("inf") if len(y) == 9 else 1.0)  # noqa: E731
    step = wrapped(module, devices, update).train_step(loss_fn, adam, accumulate=3, skip_nonfinite=True)
    step(*EPOCHS[0][1])
    step(*EPOCHS[0][0])
    assert not step.flush()
    assert step.result.skipped
    torch.testing.assert_close(list(module.parameters()), before, rtol=0, atol=0)
    step(*EPOCHS[0][0])
    assert step.flush()
    assert not step.result.skipped


class FailsOnce(torch.optim.Adam):
    """Fails in the middle of its first step."""

    fails = True

    def step(self, closure=None):
        if FailsOnce.fails:
            FailsOnce.fails = False
            with torch.no_grad():
                self.param_groups[0]["params"][0].zero_()
            raise ArithmeticError("not today")
        return super().step(closure)


@each_update
def test_a_flush_that_fails_changes_nothing_and_works_the_next_time(devices, update):
    FailsOnce.fails = True
    module = mlp()
    reference = copy.deepcopy(module)
    step = wrapped(module, devices, update).train_step(
        F.cross_entropy, lambda p: FailsOnce(p, lr=0.01), accumulate=3, clip_grad_norm=0.3
    )
    for x, y in EPOCHS[1]:
        step(x, y)
    before, result = copy.deepcopy(module), step.result
    with pytest.raises(ArithmeticError, match="not today") as failed:
        step.flush()
    assert "no replica's weights were changed" in str(failed.value)
    assert step.result is result
    assert_equal_modules(module, before)
    assert step.flush()
    train_plainly(reference, [EPOCHS[1]], 3, 0.3)
    assert_equal_modules(module, reference)
