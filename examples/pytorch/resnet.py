"""A small ResNet learns handwritten digits, with batch normalization over the rows of all devices.

    python examples/pytorch/resnet.py
    python examples/pytorch/resnet.py --devices 8 --steps 100

`sync_batch_norm=True` makes the result that of one device, running statistics included. It needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from models import ResNet
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastdp


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images (rows, 1, 8, 8) between -0.5 and 0.5, and their digits."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.get_default_dtype()) / 16 - 0.5
    return images[:, None], torch.tensor(found.target)


def build(**sizes: int) -> ResNet:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return ResNet(**{"width": 8, "stages": 2, **sizes})


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, labels in batches:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch. The schedule changes the rates of the step's own optimizer."""
    model = fastdp.wrap(module, **how)
    step = model.train_step(nn.CrossEntropyLoss(label_smoothing=0.1), make_optimizer, reduction="mean")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, T_max=100)
    for images, labels in batches:
        yield step(images, labels)
        schedule.step()


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=64, steps=40)
    compare(build, loop, train_step, batches_of(digits(), options.rows, options.steps), options.devices)


if __name__ == "__main__":
    main()
