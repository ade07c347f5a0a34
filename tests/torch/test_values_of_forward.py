"""Backward passes of loops need the values that forward had, also of what forward itself has written since."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdp

pytestmark = pytest.mark.filterwarnings("ignore:fastdp. gradients of gradients")


class Written(nn.Module):
    """Reads a value, and then or before writes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.kind = nn.Linear(4, 5), nn.Linear(5, 1), kind
        if kind in ("a number", "a tensor"):
            self.value = 1.0 if kind == "a number" else torch.ones(())
        else:
            self.register_buffer("value", torch.ones(5 if kind == "a mean of rows" else ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "a buffer before":
            self.value.mul_(1.5)
        hidden = self.first(x)
        mixed = torch.tanh(hidden * (1 + self.value)) * self.value if self.kind != "a mean of rows" else None
        if self.kind == "a mean of rows":
            mixed = torch.tanh(hidden * (1 + self.value))
            with torch.no_grad():
                self.value += 0.1 * hidden.mean(0)
        elif self.kind != "a buffer before":
            self.value = self.value * 2 + 1
        return self.second(mixed)


KINDS = ["a buffer", "a buffer before", "a mean of rows", "a number", "a tensor"]


@pytest.fixture(autouse=True)
def devices():
    torch.set_default_dtype(torch.float64)
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)
    torch.set_default_dtype(torch.float32)


def found(module: nn.Module) -> list[torch.Tensor]:
    return [*(p.grad.clone() for p in module.parameters()), *(b.clone() for b in module.buffers())]


def penalties(module: nn.Module, model: nn.Module, passes: int) -> list[torch.Tensor]:
    """A penalty on the slope, with other forward passes between the pass and its gradient."""
    rows, values = torch.Generator().manual_seed(1), []
    for _ in range(2):
        x = torch.randn(7, 4, generator=rows).requires_grad_()
        y = model(x)
        for _ in range(passes - 1):
            model(torch.randn(7, 4, generator=rows))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        module.zero_grad()
        ((slope.square().sum(1) - 1).square().mean() + y.mean()).backward()
        values += [y.detach(), slope.detach(), *found(module)]
    return values


def sums(module: nn.Module, model: nn.Module, passes: int) -> list[torch.Tensor]:
    """One backward pass through several forward passes."""
    rows, values = torch.Generator().manual_seed(1), []
    for _ in range(2):
        module.zero_grad()
        sum(model(torch.randn(7, 4, generator=rows)).square().mean() for _ in range(passes)).backward()
        values += found(module)
    return values


@pytest.mark.parametrize("gpus", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("loop", "passes"), [(penalties, 1), (penalties, 2), (sums, 1), (sums, 2)])
def test_gradients_are_those_of_one_device(loop, passes, kind, gpus):
    if kind == "a buffer before" and passes == 2:
        plain = Written(kind)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loop(plain, plain, passes)
        return
    alone, module = Written(kind), Written(kind)
    expected = loop(alone, alone, passes)
    for one, other in zip(expected, loop(module, fastdp.wrap(module, gpus=gpus), passes), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


class HeldBesides(Written):
    """Reads a buffer by other names than its own, and writes it in place."""

    def __init__(self, kind: str) -> None:
        super().__init__("a buffer")
        self.kept = {"an attribute": self.value, "a list": [self.value], "a tuple": (1, self.value)}[kind]
        self.find = lambda: self.kept if kind == "an attribute" else self.kept[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.first(x) * (1 + self.find().clone())) * self.find().clone()
        with torch.no_grad():
            self.value.mul_(1.5).add_(0.1)
        return self.second(mixed)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["an attribute", "a list", "a tuple"])
def test_second_gradients_read_the_value_of_the_pass_by_whatever_name(kind, passes):
    alone, module = HeldBesides(kind), HeldBesides(kind)
    expected = penalties(alone, alone, passes)
    for one, other in zip(expected, penalties(module, fastdp.wrap(module, gpus=2), passes), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    assert module.find() is module.value


class WrittenLate(Written):
    """Writes a buffer for large inputs alone, which no trial sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.value
        y = super().forward(x)
        if float(x.detach().abs().max()) < 50:
            self.value = before
        return y


def test_a_buffer_that_no_trial_saw_written_is_an_error_once_and_not_another_gradient():
    alone, module = WrittenLate("a buffer"), WrittenLate("a buffer")
    model, x = fastdp.wrap(module, gpus=2), torch.ones(8, 4)
    model(x).mean().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x * 60).mean().backward()
    module.zero_grad()
    alone(x), alone(x * 60)
    for one in (alone, model):
        one(x * 60).mean().backward()
    for one, other in zip(found(alone), found(module), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


class HeldTwice(nn.Module):
    """Writes a buffer in place by one name, and reads it by another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.how = nn.Linear(4, 5), how
        self.register_buffer("value", torch.ones(()))
        self.other = nn.Module()
        if how.startswith("buffers"):
            self.other.register_buffer("value", self.value)
        else:
            self.other.value = self.value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written, read = (self.value, self.other.value) if self.how.endswith("first") else (self.other.value, self.value)
        written.add_(1)
        return self.first(x).square() * read


@pytest.mark.parametrize("gpus", [2, 3])
@pytest.mark.parametrize(
    "how", ["buffers, by the first", "buffers, by the second", "an attribute, by the first", "an attribute"]
)
def test_what_is_written_in_place_is_seen_by_whoever_holds_it(how, gpus):
    alone, module = HeldTwice(how), HeldTwice(how)
    expected = sums(alone, alone, 1)
    for one, other in zip(expected, sums(module, fastdp.wrap(module, gpus=gpus), 1), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


class HoldsView(nn.Module):
    def __init__(self, view) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.register_buffer("value", torch.ones(3))
        self.kept = view(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("view", "named"),
    [
        (lambda module: [module.value[1:]], r"`kept\[0\]` shares memory with the buffer `value`"),
        (lambda module: module.layer.weight.t(), "`kept` shares memory with the parameter `layer.weight`"),
        (lambda module: module.layer.bias.detach().numpy(), "`kept` shares memory with the parameter `layer.bias`"),
        (lambda module: module.layer.bias.detach().view(torch.int64), "`kept` shares memory with the parameter"),
    ],
)
def test_a_view_that_would_not_follow_its_parameter_is_refused(view, named):
    with pytest.raises(ValueError, match=named):
        fastdp.wrap(HoldsView(view), gpus=2)(torch.ones(4, 4))


class UsesViews(nn.Module):
    """Computes with views of what is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.turned, self.views = self.layer.weight.detach().t(), {"bias": self.layer.bias.data[1:]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(x) + x @ self.turned.clone())
        return self.out(hidden) + self.views["bias"].sum()


def trained(module: nn.Module, call, how: str) -> list[torch.Tensor]:
    """Weights after some steps; in one of them a parameter gets memory of its own, which its views do not see."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for step in range(5):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(step))
        if how == "steps":
            call = call if callable(call) and step else call.train_step(nn.functional.mse_loss, optimizer)
            call(x, x[:, :3])
        else:
            optimizer.zero_grad()
            nn.functional.mse_loss(call(x), x[:, :3]).backward()
            optimizer.step()
        if step == 3:
            module.layer.bias.data = module.layer.bias.data * 2
    return [*module.state_dict().values(), module.turned, module.views["bias"]]


@pytest.mark.parametrize(("gpus", "how", "traced"), [(2, "loop", "trace"), (3, "loop", None), (3, "steps", "trace")])
def test_views_follow_what_they_are_views_of(gpus, how, traced):
    alone, module = UsesViews(), UsesViews()
    expected = trained(alone, alone, "loop")
    found = trained(module, fastdp.wrap(module, gpus=gpus, compile=traced), how)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_what_torchs_own_hook_replaces_before_each_forward_is_no_view():
    """`spectral_norm` keeps `weight.data` as `weight` until its first forward."""
    layer = torch.nn.utils.spectral_norm(nn.Linear(4, 5))
    assert layer.weight.data_ptr() == layer.weight_orig.data_ptr()
    assert fastdp.wrap(nn.Sequential(layer), gpus=2)(torch.ones(4, 4)).shape == (4, 5)


def test_copies_and_whole_tensors_are_no_views():
    for view in (
        lambda module: module.value[1:].clone(),
        lambda module: module.value,
        lambda module: torch.ones(2)[1:],
    ):
        assert fastdp.wrap(HoldsView(view), gpus=2)(torch.ones(4, 4)).shape == (4, 5)
