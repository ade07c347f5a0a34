"""A diffusion model of handwritten digits: each step draws times and noise, and the network learns to tell the noise.

    python examples/pytorch/diffusion.py
    python examples/pytorch/diffusion.py --devices 8 --steps 200

The draws are made in `forward`. Each row gets the time and the noise that plain torch draws for it, on any number of
devices. It needs scikit-learn. Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fastdp

PIXELS, TIMES = 64, 100


def digits() -> Tensor:
    """1,797 images (rows, 64) between -1 and 1."""
    return torch.tensor(load_digits().data, dtype=torch.get_default_dtype()) / 8 - 1


class Denoiser(nn.Module):
    """Adds noise to images and tells which."""

    kept: Tensor  # how much of an image is left at each time, in variance

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.time = nn.Embedding(TIMES, width)
        self.inner = nn.Linear(PIXELS, width)
        self.outer = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, PIXELS))
        angles = torch.linspace(0.02, 0.98, TIMES) * math.pi / 2
        self.register_buffer("kept", torch.cos(angles) ** 2)

    def noise_in(self, noisy: Tensor, times: Tensor) -> Tensor:
        """The noise in images (rows, PIXELS) at times (rows,)."""
        return self.outer(self.inner(noisy) + self.time(times))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Noise found and noise added, each (rows, PIXELS)."""
        times = torch.randint(TIMES, (len(images),))
        noise = torch.randn_like(images)
        kept = self.kept[times][:, None]
        return self.noise_in(kept.sqrt() * images + (1 - kept).sqrt() * noise, times), noise


@torch.no_grad()
def drawn(module: Denoiser, rows: int) -> Tensor:
    """New images (rows, PIXELS): noise, from which the noise is taken step by step (DDIM's deterministic rule)."""
    images = torch.randn(rows, PIXELS)
    for time in reversed(range(TIMES)):
        noise = module.noise_in(images, torch.full((rows,), time))
        clean = ((images - (1 - module.kept[time]).sqrt() * noise) / module.kept[time].sqrt()).clamp(-1, 1)
        left = module.kept[time - 1] if time else torch.ones(())
        images = left.sqrt() * clean + (1 - left).sqrt() * noise
    return images


def build(**sizes: int) -> Denoiser:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return Denoiser(**sizes)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(parameters, lr=2e-3)


def loss_of(found_and_added: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared difference."""
    return F.mse_loss(*found_and_added)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer = make_optimizer(model.parameters())
    for (images,) in batches:
        optimizer.zero_grad()
        loss = loss_of(model(images))
        loss.backward()
        optimizer.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch. The loss is a mean over rows: each device computes its own part."""
    step = fastdp.wrap(module, **how).train_step(loss_of, make_optimizer, reduction="mean")
    for (images,) in batches:
        yield step(images)


def main() -> None:
    """Train three times, and compare. `drawn(module, 16)` then makes images."""
    options = arguments(__doc__, rows=64, steps=80)
    compare(build, loop, train_step, batches_of((digits(),), options.rows, options.steps), options.devices)


if __name__ == "__main__":
    main()
