"""A GAN of handwritten digits: two networks, two optimizers, and images that are detached for one of them.

    python examples/pytorch/gan.py
    python examples/pytorch/gan.py --devices 8 --steps 200

In the loop the generator's gradient passes through the discriminator. The losses that are shown are the sums of both.
It needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from models import Discriminator, Generator, fake_loss, real_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastdp

LATENT = 16


def digits_and_noise(rows: int = 1797) -> tuple[Tensor, Tensor]:
    """Images (rows, 64) between 0 and 1, and noise (rows, 16) for as many false ones."""
    images = torch.tensor(load_digits().data[:rows], dtype=torch.get_default_dtype()) / 16
    return images, torch.randn(len(images), LATENT, generator=torch.Generator().manual_seed(0)).to(images.dtype)


def build(**sizes: int) -> tuple[Generator, Discriminator]:
    """The models, with the same weights each time."""
    torch.manual_seed(0)
    return Generator(LATENT, **sizes), Discriminator(**sizes)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, as GANs want it."""
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))


def loop(models: tuple[Any, Any], batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `models` are modules, or what `fastdp.wrap` makes of them."""
    generator, discriminator = models
    of_generator, of_discriminator = (make_optimizer(model.parameters()) for model in models)
    for images, noise in batches:
        made = generator(noise)
        of_discriminator.zero_grad()
        found = real_loss(discriminator(images)) + fake_loss(discriminator(made.detach()))
        found.backward()
        of_discriminator.step()
        of_generator.zero_grad()
        loss = real_loss(discriminator(made))
        loss.backward()
        of_generator.step()
        yield (found + loss).detach()


class Judged(nn.Module):
    """The generator and the judgement of what it makes. The discriminator is lent: it has no part in the training."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, noise: Tensor) -> Tensor:
        """Logits of being real (rows,)."""
        return self.discriminator(self.generator(noise))


class Pairs(nn.Module):
    """The discriminator on one real and one false image a row."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both, each (rows,)."""
        return self.discriminator(images), self.discriminator(made)


def train_step(modules: tuple[nn.Module, nn.Module], batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in two calls per batch: one train step for each network."""
    generator, discriminator = modules
    making, judged = fastdp.wrap(generator, **how), fastdp.wrap(Judged(generator, discriminator), **how)
    pairs = fastdp.wrap(Pairs(discriminator), **how)
    own = len(list(generator.parameters()))
    # The losses are means over rows, and no modules that say so: told, each device computes its rows' part.
    found_out = pairs.train_step(
        lambda logits: real_loss(logits[0]) + fake_loss(logits[1]), make_optimizer, reduction="mean"
    )
    deceive = judged.train_step(real_loss, lambda parameters: make_optimizer(parameters[:own]), reduction="mean")
    for images, noise in batches:
        with torch.no_grad():
            made = making(noise)
        found = found_out((images, made))
        discriminator.requires_grad_(False)  # its gradients would only take time
        deceived = deceive(noise)
        discriminator.requires_grad_(True)
        yield found + deceived


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=64, steps=40)
    compare(build, loop, train_step, batches_of(digits_and_noise(), options.rows, options.steps), options.devices)


if __name__ == "__main__":
    main()
