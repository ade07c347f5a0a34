"""Captured steps of torch modules as CUDA graphs, on the simulated CUDA: they give what eager steps give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdp.options import Options
from fastdp.torch.parallel_module import TorchParallel


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 4)
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
def test_recorded_steps_give_what_eager_ones_give(gpus, small_buckets, count, graph):
    box = gpus(2)
    expected, _ = train(box.devices(count), compile=None)
    found, parallel = train(box.devices(count), compile="trace", graph=graph)
    assert {entry["how"] for entry in parallel.report()} == {"step graph" if graph == "step" else "graph"}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if graph == "auto":  # those of a step graph are launched as its parts
        assert min(graph.replays for graphs in box.graphs for graph in graphs.graphs) > 0
