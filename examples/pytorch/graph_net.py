"""A graph network learns to count the triangles of small graphs.

    python examples/pytorch/graph_net.py
    python examples/pytorch/graph_net.py --devices 8 --steps 200

One graph is one row: its nodes, its adjacency matrix and a mask, padded to the same size. Lists of edges that number
the nodes of a whole batch cannot be split by rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from data import graphs
from models import GraphNet
from torch import Tensor, nn

import fastdp

MOST, FEATURES = 12, 4


def build(**sizes: int) -> GraphNet:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return GraphNet(FEATURES, **sizes)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """RMSprop."""
    return torch.optim.RMSprop(parameters, lr=1e-3)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer, criterion = make_optimizer(model.parameters()), nn.SmoothL1Loss()
    for nodes, edges, there, triangles in batches:
        optimizer.zero_grad()
        loss = criterion(model(nodes, edges=edges, there=there), triangles)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch. A dict holds the module's arguments by name."""
    step = fastdp.wrap(module, **how).train_step(nn.SmoothL1Loss(), make_optimizer, reduction="mean")
    for nodes, edges, there, triangles in batches:
        yield step({"nodes": nodes, "edges": edges, "there": there}, triangles)


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=32, steps=60)
    batches = batches_of(graphs(8 * options.rows, MOST, FEATURES), options.rows, options.steps)
    compare(build, loop, train_step, batches, options.devices)


if __name__ == "__main__":
    main()
