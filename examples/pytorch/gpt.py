"""A small GPT learns to continue Python's own source text, character by character.

    python examples/pytorch/gpt.py                              # four virtual devices, or GPUs
    python examples/pytorch/gpt.py --devices 8 --steps 200

The output layer shares its weight with the embedding. With `DROPOUT` above 0 the same numbers are dropped on any number
of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from data import characters
from models import GPT, token_loss
from torch import Tensor, nn

import fastdp

TOKENS, DROPOUT = 32, 0.0


def build(vocabulary: int = 96, dropout: float = DROPOUT, **sizes: int) -> GPT:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return GPT(vocabulary, **{"tokens": TOKENS, **sizes}, dropout=dropout)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with weight decay for matrices alone."""
    parameters = list(parameters)
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer = make_optimizer(model.parameters())
    for tokens, following in batches:
        optimizer.zero_grad()
        loss = token_loss(model(tokens), following)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch: each device computes the loss of its own rows, and nothing is merged."""
    model = fastdp.wrap(module, **how)
    step = model.train_step(token_loss, make_optimizer, reduction="mean", clip_grad_norm=1.0)
    for tokens, following in batches:
        yield step(tokens, following)


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=32, steps=60)
    tokens, following, _ = characters(8 * options.rows, TOKENS)
    batches = batches_of((tokens, following), options.rows, options.steps)
    compare(build, loop, train_step, batches, options.devices)


if __name__ == "__main__":
    main()
