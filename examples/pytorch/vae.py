"""A variational autoencoder of handwritten digits, whose noise is drawn in `forward`.

    python examples/pytorch/vae.py
    python examples/pytorch/vae.py --devices 8 --steps 200

Each row gets the numbers that plain torch draws for it, whatever the number of devices. It needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from models import VAE, vae_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastdp


def digits() -> Tensor:
    """1,797 images (rows, 64) between 0 and 1."""
    return torch.tensor(load_digits().data, dtype=torch.get_default_dtype()) / 16


def build(**sizes: int) -> VAE:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return VAE(**sizes)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(parameters, lr=2e-3)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer = make_optimizer(model.parameters())
    for (images,) in batches:
        optimizer.zero_grad()
        loss = vae_loss(model(images), images)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch. `vae_loss` is a mean over images: each device computes its own part."""
    step = fastdp.wrap(module, **how).train_step(vae_loss, make_optimizer, reduction="mean")
    for (images,) in batches:
        yield step(images, images)


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=64, steps=60)
    compare(build, loop, train_step, batches_of((digits(),), options.rows, options.steps), options.devices)


if __name__ == "__main__":
    main()
