"""Modules with parts in common are trained in turn as by plain torch, and their parts stay in one place."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.errors import DeviceTimeoutError

ROWS = 9


class Head(nn.Module):
    """A head on an encoder that others use too, with a buffer of its own."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.encoder = encoder
        self.after = nn.Linear(4, width)
        self.register_buffer("scale", torch.full((width,), 0.5))

    def forward(self, x):
        return self.after(self.encoder(self.before(x))).mul(self.scale).mean(1, keepdim=True)


class Both(nn.Module):
    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.last = nn.Linear(1, 1)
        self.heads = nn.ModuleList(heads)

    def forward(self, x):
        return self.last(sum(head(x) for head in self.heads))


def build() -> dict[str, nn.Module]:
    """A head, another one on the same encoder, the encoder alone, and a module of both heads."""
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))
    first, second = Head(encoder, 3), Head(encoder, 5)
    return {"first": first, "encoder": encoder, "both": Both(first, second), "second": second}


class Plain:
    """What `fastdp.wrap` makes, by plain torch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def train_step(self, loss_fn: Callable[..., torch.Tensor], make: Callable[..., torch.optim.Optimizer]) -> Any:
        optimizer = make(list(self.module.parameters()))

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_fn(self.module(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step.optimizer = optimizer
        return step


def sgd(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def by(devices: dict[str, int]) -> Callable[[str, nn.Module], Any]:
    """Wraps each module for its number of devices; for none of them it is plain torch."""

    def wrap(name: str, module: nn.Module) -> Any:
        if not devices:
            return Plain(module)
        return fastdp.wrap(module, gpus=devices[name], sync_batch_norm=True, compile=None)

    return wrap


def written(modules: dict[str, nn.Module], steps: dict[str, Any], wrap: Any, number: int) -> None:
    weight = modules["encoder"][0].weight
    if number == 1:
        weight.data.mul_(0.5)
    elif number == 2:
        weight.data = weight.data * 1.5
        modules["encoder"][1].running_mean = torch.full((4,), 0.25, dtype=torch.float64)
    else:
        state = {key: value.double() * 0.5 for key, value in modules["both"].state_dict().items()}
        modules["both"].load_state_dict(state)


def swapped_and_dropped(modules: dict[str, nn.Module], steps: dict[str, Any], wrap: Any, number: int) -> None:
    """Another optimizer; then the engine that had the memory first is gone, with its module."""
    if number == 1:
        steps["both"] = wrap("both", modules["both"]).train_step(F.mse_loss, lambda p: torch.optim.Adam(p, 0.01))
    elif number == 2:
        del steps["first"], modules["first"]
        gc.collect()


def copied(modules: dict[str, nn.Module], steps: dict[str, Any], wrap: Any, number: int) -> None:
    """Copies, which share with each other and not with what they are copies of."""
    if number == 2:
        copies = pickle.loads(pickle.dumps(modules)) if "second" in steps else copy.deepcopy(modules)
        for name in ("both", "encoder"):
            modules[f"copied {name}"] = copies[name]
            steps[f"copied {name}"] = wrap(name, copies[name]).train_step(F.mse_loss, sgd)


def trained(change: Callable[..., None] | None, order: str, devices: dict[str, int]) -> dict[str, torch.Tensor]:
    """Everything that training modules in turn has changed, in float64."""
    modules = {name: module.double() for name, module in build().items()}
    wrap = by(devices)
    steps = {name: wrap(name, modules[name]).train_step(F.mse_loss, sgd) for name in order.split()}
    found = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        if number and change is not None:
            change(modules, steps, wrap, number)
        for name in list(steps):
            x = torch.randn(ROWS, 4, dtype=torch.float64, generator=generator)
            y = torch.randn(ROWS, 4 if name.endswith("encoder") else 1, dtype=torch.float64, generator=generator)
            found[f"{name} {number}"] = steps[name](x, y)
    for name, module in modules.items():
        found.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
    return found


@pytest.mark.parametrize(
    ("order", "change", "devices"),
    [
        ("first encoder both", None, (1, 1, 1, 1)),
        ("both second encoder first", None, (1, 2, 2, 2)),
        ("first encoder both", written, (2, 3, 8, 2)),
        ("first both encoder", swapped_and_dropped, (2, 3, 8, 2)),
        ("encoder both", copied, (1, 8, 2, 3)),
        ("encoder second both", copied, (2, 1, 3, 2)),
    ],
)
def test_modules_with_parts_in_common_train_as_by_plain_torch(order, change, devices):
    want = trained(change, order, {})
    got = trained(change, order, dict(zip(("first", "encoder", "both", "second"), devices, strict=True)))
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("order", ["first encoder both", "both encoder", "encoder both first second"])
def test_parts_in_common_stay_in_one_place_whoever_trains_them(order, devices):
    modules = build()
    batch = torch.randn(4, 4), torch.zeros(4, 1)
    steps = [
        fastdp.wrap(modules[name], gpus=devices).train_step(lambda y, t: (y - t).square().mean(), sgd)
        for name in order.split()
    ]
    tensors = [*modules["both"].parameters(), *modules["both"].buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    for step in steps:
        step(*batch)
        assert [tensor.data_ptr() for tensor in tensors] == places


class Halfway(torch.optim.SGD):
    """Updates the first parameter; then it waits for the event, and fails."""

    event: threading.Event | None = None
    fails = False

    def step(self, closure: Any = None) -> None:
        if not self.fails:
            super().step()
            return
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(100)
        if self.event is not None:
            assert self.event.wait(60)
        raise FloatingPointError("halfway")


@pytest.mark.parametrize("given_up", [False, True], ids=["failed", "given up"])
def test_an_update_that_fails_is_taken_back_where_no_other_engine_went_on(given_up):
    def run(fails: bool) -> dict[str, torch.Tensor]:
        modules = {name: module.double() for name, module in build().items()}
        x = torch.linspace(-1, 1, 4 * ROWS, dtype=torch.float64).reshape(ROWS, 4)
        wrapped = [
            fastdp.wrap(modules[name], gpus=2, sync_batch_norm=True, compile=None) for name in ("first", "encoder")
        ]
        step = wrapped[0].train_step(F.mse_loss, lambda p: Halfway(p, lr=0.05, momentum=0.9))
        encode = wrapped[1].train_step(F.mse_loss, sgd)
        step(x, x[:, :1])
        encode(x, x)
        if fails:
            step.optimizer.fails = True
            if given_up:
                step.optimizer.event = threading.Event()
                step._engine.timeout = 0.5
            with pytest.raises(DeviceTimeoutError if given_up else FloatingPointError):
                step(x, x[:, :1])
            step.optimizer.fails = False
            step._engine.timeout = 60.0
            if given_up:
                step.optimizer.event.set()
        encode(x, x)
        step(x, x[:, :1])
        return modules["first"].state_dict()

    want, got = run(False), run(True)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=lambda text, at=name: f"{at}: {text}")
