"""on_nonfinite of a torch module: steps and loops leave weights, optimizer and buffers as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdp


@pytest.fixture(autouse=True)
def three_devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def rows(bad=None):
    x = torch.linspace(-1, 1, 27).reshape(9, 3)
    if bad is not None:
        x[bad, 0] = float("inf")
    return x, x.nan_to_num(0, 0, 0).sum(1, keepdim=True)


def values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("how", ["raise", "skip"])
@pytest.mark.parametrize("devices", [1, 3])
def test_a_train_step_changes_nothing(how, devices):
    module = model()
    step = fastdp.wrap(module, devices, on_nonfinite=how, compile=None).train_step(nn.MSELoss(), torch.optim.Adam)
    step(*rows())
    before = values(module)
    if how == "raise":
        with pytest.raises(FloatingPointError, match=r"\(rows \d to 9 of the batch's 9\).*loss is nan"):
            step(*rows(7))
    else:
        with pytest.warns(UserWarning, match="a step changed nothing"):
            step(*rows(7))
        assert step.result.skipped
        assert not step.result.updated
    assert same(module, before)
    steps = [int(state["step"]) for state in step.optimizer.state.values()]
    assert set(steps) == {1}
    step(*rows())
    assert not same(module, before)


def test_a_loop_gets_an_error_from_backward_or_no_gradients():
    for how in ("raise", "skip"):
        module = model()
        dp = fastdp.wrap(module, 3, on_nonfinite=how, compile=None)
        x, y = rows(4)
        loss = ((dp(x) - y) ** 2).mean()
        if how == "raise":
            with pytest.raises(FloatingPointError, match=r"virtual:1 \(rows 3 to 6.*gradient of '0.weight'"):
                loss.backward()
        else:
            with pytest.warns(UserWarning, match="a step changed nothing"):
                loss.backward()
        assert [p.grad for p in module.parameters()] == [None] * 6
        x, y = rows()
        ((dp(x) - y) ** 2).mean().backward()
        assert all(p.grad is not None for p in module.parameters())


def test_with_a_scaler_the_scaler_skips():
    module = model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = fastdp.wrap(module, 3, on_nonfinite="raise", compile=None).train_step(
        nn.MSELoss(), torch.optim.Adam, scaler=scaler
    )
    step(*rows(4))
    assert step.result.skipped
    assert scaler.get_scale() == 2.0**9
