"""A UNet learns to tell discs and squares from noise, pixel by pixel.

    python examples/pytorch/unet.py
    python examples/pytorch/unet.py --devices 8 --steps 100

The rarer classes weigh more. A mean with class weights is no mean over rows, so the train step leaves `reduction` out:
the loss is computed on the merged outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from data import shapes
from models import UNet
from torch import Tensor, nn

import fastdp

SIZE = 16


def build(**sizes: int) -> UNet:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return UNet(**{"width": 8, "depth": 2, **sizes})


def make_loss() -> nn.Module:
    """Cross-entropy in which a pixel of a shape weighs twice as much as one of the ground."""
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 2.0]))


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(parameters, lr=3e-3)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer, criterion = make_optimizer(model.parameters()), make_loss()
    for images, classes in batches:
        optimizer.zero_grad()
        loss = criterion(model(images), classes)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch."""
    step = fastdp.wrap(module, **how).train_step(make_loss(), make_optimizer)
    for images, classes in batches:
        yield step(images, classes)


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=16, steps=30)
    batches = batches_of(shapes(8 * options.rows, SIZE), options.rows, options.steps)
    compare(build, loop, train_step, batches, options.devices)


if __name__ == "__main__":
    main()
