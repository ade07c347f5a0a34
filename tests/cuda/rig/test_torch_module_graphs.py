"""Captured steps of torch modules as CUDA graphs, on the rig: they give what eager steps give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdp.options import Options
from fastdp.torch.parallel_module import TorchParallel


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 4)
    return nn.Sequential(*layers)


def train(devices, steps: int = 8, **options) -> tuple[list[torch.Tensor], TorchParallel]:
    module = net()
    parallel = TorchParallel(module, devices, Options(timeout=20.0, **options))
    step = parallel.train_step(F.cross_entropy, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(7, 6, generator=generator), torch.randint(4, (7,), generator=generator)
        losses.append(step(x, y))
    return [*losses, *module.state_dict().values()], parallel


@pytest.mark.parametrize("graph", ["auto", "step"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.usefixtures("small_buckets")
def test_recorded_steps_give_what_eager_ones_give(cards, count, graph):
    expected, _ = train(cards.devices(count, 2), compile=None)
    found, parallel = train(cards.devices(count, 2), compile="trace", graph=graph)
    assert {entry["how"] for entry in parallel.report()} == {"step graph" if graph == "step" else "graph"}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_buckets")
def test_modules_with_parts_in_common_stay_in_one_place_on_a_gpu(cards):
    devices, (part, head, other) = cards.devices(2), (net(), nn.Linear(4, 2), nn.Linear(4, 3))
    modules = part, nn.Sequential(head, part[0:0], nn.Linear(2, 6), part), nn.Sequential(part, other)
    generator = torch.Generator().manual_seed(3)

    def batch(module: nn.Module) -> list[torch.Tensor]:
        width, rows = next(p for p in module.parameters() if p.dim() == 2).shape[1], 7
        return [torch.randn(rows, width, generator=generator), torch.randint(2, (rows,), generator=generator)]

    batches = [[batch(module) for module in modules] for _ in range(5)]
    found = []
    for how in (None, "trace"):
        ours = copy.deepcopy(modules)
        torch.manual_seed(5)
        steps = [
            TorchParallel(module, devices, Options(timeout=20.0, compile=how)).train_step(
                F.cross_entropy, lambda parameters: torch.optim.Adam(parameters, lr=0.01)
            )
            for module in ours
        ]
        places = None
        for several in batches:
            found += [step(*one) for step, one in zip(steps, several, strict=True)]
            found += [p.detach().clone() for p in ours[1].parameters()]
            now = [tensor.data_ptr() for module in ours for tensor in module.state_dict().values()]
            assert places in (None, now)
            places = now
    for one, other in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def predict(devices, calls: int = 8, **options) -> tuple[list[torch.Tensor], TorchParallel]:
    parallel = TorchParallel(net().eval(), devices, Options(timeout=20.0, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        outputs = [parallel(torch.randn(7, 6, generator=generator)) for _ in range(calls)]
    return outputs, parallel


def test_recorded_calls_without_gradients_give_what_eager_ones_give(cards):
    expected, _ = predict(cards.devices(2), compile=None)
    found, parallel = predict(cards.devices(2), compile="trace")
    assert {entry["how"] for entry in parallel.report().passes} == {"graph"}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
