"""Captured passes of a loop give plain torch's numbers on any number of devices, or run eagerly and say why.

In float64, on eleven rows: the first pass of a shape runs eagerly, two more are compared with the captured ones, and
all others are replays.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdp
from fastdp.capture import patience, speed_trial
from fastdp.capture import steps as capture_steps
from fastdp.capture.compile.compiler import missing_compiler
from fastdp.capture.joint import CapturedJoint

ROWS, STEPS, DEVICES = 11, 7, (1, 2, 3, 8)
TOLERANCE = 1e-11
Loop = Callable[[Any, nn.Module, torch.optim.Optimizer, int], Any]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """Dropout, a relu in place, and a buffer that follows the batches."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(rate)
        self.scale = 1.0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().mean()
        return self.last(self.drop(self.relu(self.norm(self.first(x))))) * self.scale


class Heads(nn.Module):
    """Three outputs, of which one is computed from another, and a part of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.policy, self.value = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)
        self.memory, self.drop = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.3), nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.tanh(self.body(x)) * (1.0 + self.seen.clone())
        self.seen += x.detach().mean()
        y = checkpoint(
            lambda h: F.dropout(h, 0.2, self.training), y + self.memory(y[:, None])[0][:, 0], use_reentrant=False
        )
        return {"hidden": y, "policy": self.policy(y), "value": self.value(y).log()}  # with NaNs


def rows(i: int, *shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *(shape or (6,)), generator=torch.Generator().manual_seed(i))


def classes(i: int) -> torch.Tensor:
    return torch.randint(4, (ROWS,), generator=torch.Generator().manual_seed(100 + i))


def usual(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(rows(i)), classes(i))
    loss.backward()
    optimizer.step()
    return loss


def contrastive(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """A loss of all pairs of rows, of two calls, clipped."""
    optimizer.zero_grad()
    one, other = model(rows(i)), model(rows(50 + i))
    loss = F.cross_entropy(one @ other.T, torch.arange(ROWS))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    optimizer.step()
    return loss, norm


def retained(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """Two backward passes through one forward pass, and one forward pass without any."""
    optimizer.zero_grad()
    outputs, _ = model(rows(i)), model(rows(50 + i))
    F.cross_entropy(outputs, classes(i)).backward(retain_graph=True)
    outputs.square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="second time"):
        outputs.square().mean().backward()
    return outputs


def accumulated(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    (F.cross_entropy(model(rows(i)), classes(i)) / 2).backward()
    if i % 2:
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def of_inputs(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """Gradients by an argument that is computed, and hooks: on it, on the outputs and on a parameter, once each."""
    optimizer.zero_grad()
    found: list[torch.Tensor] = []
    x = rows(i).requires_grad_()
    given = x * 2.0
    given.register_hook(found.append)
    handle = module.last.weight.register_hook(lambda gradient: found.append(gradient) or gradient * 0.5)
    outputs = model(given)
    outputs.register_hook(found.append)
    outputs.square().mean().backward()
    handle.remove()
    optimizer.step()
    assert len(found) == 3
    return x.grad, found


def perturbed(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """Sharpness-aware: the gradient at other weights, which are put back."""
    optimizer.zero_grad()
    F.cross_entropy(model(rows(i)), classes(i)).backward()
    before = [one.detach().clone() for one in module.parameters()]
    with torch.no_grad():
        for one in module.parameters():
            one.add_(one.grad, alpha=0.05)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(rows(i)), classes(i))
    loss.backward()
    with torch.no_grad():
        for one, value in zip(module.parameters(), before, strict=True):
            one.copy_(value)
    optimizer.step()
    return loss


def frozen(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """Layers in turn, and an attribute that changes once."""
    module.first.requires_grad_(i % 2 == 0)
    module.scale = 1.0 if i < 6 else 0.5
    return usual(model, module, optimizer, i)


def modes(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    module.train(i % 3 != 2)
    return usual(model, module, optimizer, i)


def changed_outputs(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """Outputs that the script changes in place."""
    optimizer.zero_grad()
    outputs = model(rows(i))
    outputs += 1.0
    loss = F.cross_entropy(outputs.mul_(2.0), classes(i))
    loss.backward()
    optimizer.step()
    return loss


def autocast(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return usual(model, module, optimizer, i)


LOOPS = [usual, contrastive, retained, accumulated, of_inputs, perturbed, frozen, modes, changed_outputs]
KINDS = [(usual, devices) for devices in DEVICES] + [(loop, n) for loop in LOOPS[1:] for n in (1, 3)]


def run(model: Any, module: nn.Module, loop: Loop, steps: int = STEPS) -> tuple[list[Any], torch.Tensor]:
    """The numbers of a loop, and what torch's generator gives after it."""
    optimizer, told = torch.optim.Adam(module.parameters(), lr=0.01), []
    torch.manual_seed(5)
    for i in range(steps):
        found = loop(model, module, optimizer, i)
        told.append(torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: one.detach().clone(), found))
    return told, torch.rand(2)


def check(
    module: nn.Module, loop: Loop, devices: int, steps: int = STEPS, mode: str = "trace", tolerance: float = TOLERANCE
) -> Any:
    """A captured loop gives plain torch's numbers, and draws the same. The parallel module."""
    reference = copy.deepcopy(module)
    expected, drawn = run(reference, reference, loop, steps)
    parallel = fastdp.wrap(module, gpus=devices, compile=mode)
    found, draws = run(parallel, module, loop, steps)
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found, expected, **close)
    assert torch.equal(draws, drawn)
    for (name, value), other in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, **close, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **close)
    return parallel


def hows(parallel: Any) -> set[str]:
    return {entry["how"] for entry in parallel.report().passes}


def whys(parallel: Any) -> str:
    return "; ".join(entry.get("why", "") for entry in parallel.report().passes)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each captured forward pass and each captured backward pass."""
    counted: list[int] = []
    for name in ("run", "gradients"):
        original = getattr(CapturedJoint, name)

        def noted(self: Any, *args: Any, original: Any = original) -> Any:
            counted.append(1)
            return original(self, *args)

        monkeypatch.setattr(CapturedJoint, name, noted)
    return counted


@pytest.mark.parametrize(("loop", "devices"), KINDS)
def test_captured_loops_train_as_plain_torch(loop, devices, replays):
    parallel = check(Net(), loop, devices, 10 if loop in (frozen, modes) else STEPS)
    assert hows(parallel) == {"traced"}
    assert len(replays) > 4 * devices  # more than the comparisons


@pytest.mark.parametrize("devices", [1, 3])
def test_parts_that_backward_runs_again_repeat_their_draws(devices):
    assert hows(check(Checkpointed(), usual, devices)) == {"traced"}


@pytest.mark.parametrize("devices", [1, 3])
def test_autocast_is_in_the_graphs(devices):
    torch.set_default_dtype(torch.float32)
    assert hows(check(Net(0.0), autocast, devices, tolerance=0.05)) == {"traced"}


def test_batch_normalization_moves_its_statistics_as_eager_passes_do():
    torch.manual_seed(1)
    module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    assert hows(check(copy.deepcopy(module), usual, 1)) == {"traced"}
    found = []
    for mode in (None, "trace"):
        own = copy.deepcopy(module)
        found.append(run(fastdp.wrap(own, gpus=3, compile=mode), own, usual)[0])
        found[-1] += own.state_dict().values()
    torch.testing.assert_close(found[0], found[1], rtol=TOLERANCE, atol=TOLERANCE)


def one_head(name: str) -> Loop:
    """Losses of one output; the parts of the others have no gradient."""

    def loop(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
        optimizer.zero_grad()
        model(rows(i))[name].square().mean().backward()
        optimizer.step()
        return [parameter.grad is None for parameter in module.parameters()]

    return loop


def heads_in_turn(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """A backward pass for each output, and all weights at once in between."""
    optimizer.zero_grad()
    found = model(rows(i))
    found["policy"].square().mean().backward(retain_graph=True)
    found["hidden"].mean().backward()
    optimizer.step()
    return [parameter.grad for parameter in module.parameters()]


class Apart(Heads):
    """Heads of which none is computed from another."""

    def forward(self, x):
        return {**super().forward(x), "hidden": torch.tanh(self.body(x) * 2.0)}


@pytest.mark.parametrize(("kind", "devices"), [(Apart, 1), (Heads, 3)])
@pytest.mark.parametrize("name", ["hidden", "policy"])
def test_outputs_that_a_loss_leaves_out_count_nothing_and_their_parts_get_no_gradient(name, kind, devices, replays):
    assert "traced" in hows(check(kind(), one_head(name), devices, 10))
    assert len(replays) > 8 * devices


@pytest.mark.parametrize(("kind", "devices"), [(Apart, 1), (Heads, 3)])
def test_backward_passes_from_other_outputs_each_time_are_exact_and_end_in_eager_passes(kind, devices):
    with pytest.warns(UserWarning, match="begin from other outputs each time"):
        parallel = check(kind(), heads_in_turn, devices, 20)
    assert hows(parallel) == {"eager"}


def penalized(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """A gradient penalty in every second step."""
    optimizer.zero_grad()
    x = rows(i).requires_grad_()
    outputs = model(x)
    loss = outputs.square().mean()
    if i > 4:
        (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        loss = loss + gradient.norm()
    loss.backward()
    optimizer.step()
    return loss, x.grad


@pytest.mark.filterwarnings("ignore:fastdp. gradients of gradients")
@pytest.mark.parametrize("devices", [1, 3])
def test_a_gradient_of_a_gradient_is_that_of_plain_torch(devices):
    if devices > 1:
        assert hows(check(Net(), penalized, devices)) == {"traced"}
        return
    with pytest.warns(UserWarning, match="gradients of gradients"):
        assert hows(check(Net(), penalized, devices)) == {"eager"}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("what", ["weight", "input"])
def test_what_backward_needs_must_not_be_written_to_before_it(what, devices):
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    parallel = fastdp.wrap(module, gpus=devices, compile="trace")
    for i in range(STEPS):
        x = rows(i)
        outputs = parallel(x)
        if i == STEPS - 1:
            with torch.no_grad():
                (x if what == "input" else module[2].weight).mul_(2.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                outputs.mean().backward()
            break
        outputs.mean().backward()
    assert hows(parallel) == {"traced"}


class Auxiliary(Net):
    def forward(self, x):
        self.extra = super().forward(x).square().mean()
        return super().forward(x)


class Checkpointed(Net):
    def forward(self, x):
        return self.last(checkpoint(lambda y: self.drop(self.first(y)), x, use_reentrant=False))


class Scribbles(Net):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class Returns(Net):
    def forward(self, x):
        return super().forward(x), x[:, 1:]


def of_the_first(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    return usual(lambda x: model(x)[0], module, optimizer, i)


def with_extra(model: Any, module: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(rows(i)), classes(i)) + module.extra
    loss.backward()
    optimizer.step()
    return loss


REFUSED = [
    (Auxiliary, with_extra, "extra, a tensor that is no parameter of the module"),
    (Scribbles, usual, "writes to what the step is given"),
]


class Tells(Net):
    def forward(self, x):
        y = super().forward(x)
        return y, y[0]


class Features(Net):
    def forward(self, x):
        features = self.first(x)
        return self.last(features), features


class Replaces(Net):
    def forward(self, x):
        self.seen = self.seen * 0.9
        return self.last(self.first(x))


CALLER_CAN_TELL = [
    (Returns, "share memory"),
    (Tells, "share memory"),
    (Features, "computes another one"),
    (Replaces, "`seen`"),
]


@pytest.mark.parametrize(("kind", "why"), CALLER_CAN_TELL)
def test_what_a_caller_on_one_device_can_tell_from_a_graph_stays_plain_torch(kind, why):
    loop = usual if kind is Replaces else of_the_first
    with pytest.warns(UserWarning, match=why):
        assert hows(check(kind(), loop, 1)) == {"eager"}
    if kind is not Tells:
        assert hows(check(kind(), loop, 3)) == {"traced"}


@pytest.mark.filterwarnings("ignore:fastdp runs")
def test_an_activation_that_is_returned_has_its_gradient_on_one_device():
    parallel = fastdp.wrap(Features(), gpus=1, compile="trace")
    for i in range(STEPS):
        logits, features = parallel(rows(i))
        seen: list[torch.Tensor] = []
        features.register_hook(seen.append)
        features.retain_grad()
        F.cross_entropy(logits, classes(i)).backward()
        assert features.grad is not None
        assert torch.equal(seen[0], features.grad)
        assert features.grad.abs().max() > 0
    assert "computes another one" in whys(parallel)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("kind", "loop", "why"), REFUSED)
def test_what_no_graph_can_repeat_runs_eagerly_and_the_report_says_why(kind, loop, why, devices):
    with pytest.warns(UserWarning, match=why):
        parallel = check(kind(), loop, devices)
    assert hows(parallel) == {"eager"}
    assert why in whys(parallel)


def test_values_that_no_guard_sees_are_found_by_the_comparison(monkeypatch):
    monkeypatch.setattr(CapturedJoint, "gradients", lambda self, *args: [None] * len(self._has_gradient))
    for devices in (1, 2):
        with pytest.warns(UserWarning, match=r"the gradient of `first.weight`, which eager steps alone compute"):
            assert hows(check(Net(), usual, devices)) == {"eager"}


@pytest.mark.skipif(missing_compiler() is not None, reason="no C++ compiler")
def test_compiled_loops_train_as_plain_torch(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 10)  # one shape on two devices
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 4))
    reference = copy.deepcopy(module)
    parallel = fastdp.wrap(module, gpus=2, compile="inductor")
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.01) for one in (module, reference)]
    for part in range(2):
        for i in range(part * STEPS, (part + 1) * STEPS):
            told = []
            for model, own, optimizer in ((parallel, module, optimizers[0]), (reference, reference, optimizers[1])):
                torch.manual_seed(i)
                told.append(usual(model, own, optimizer, i).detach())
            torch.testing.assert_close(*told, rtol=1e-9, atol=1e-9)
        parallel.wait_compiled(timeout=300)
    assert hows(parallel) == {"compiled"}


@pytest.mark.parametrize("devices", [1, 2])
def test_auto_keeps_the_fastest_form_and_only_the_report_says_which(devices, monkeypatch):
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    monkeypatch.setattr(capture_steps, "missing_compiler", lambda: "no compiler")
    monkeypatch.setattr(speed_trial, "STEPS", 2)
    parallel = check(Net(), usual, devices, 14, mode="auto")
    assert hows(parallel) <= {"traced", "eager"}
    assert all("operations" in entry for entry in parallel.report().passes)
