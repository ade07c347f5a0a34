"""A bidirectional LSTM over packed sequences of unequal lengths tells how deep their brackets go.

    python examples/pytorch/lstm.py
    python examples/pytorch/lstm.py --devices 8 --steps 200

Rows go to the devices padded to the length of the global batch. `pad_packed_sequence` is told that length by
`total_length=`, since the longest sequence of one device may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from comparison import Batch, arguments, batches_of, compare
from data import brackets
from models import Tagger
from torch import Tensor, nn

import fastdp

MOST = 24


def build(dropout: float = 0.0, **sizes: int) -> Tagger:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return Tagger(vocabulary=3, classes=4, **{"width": 24, **sizes}, dropout=dropout)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(parameters, lr=5e-3)


def loop(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The loop as it is written for one device. `model` is a module, or what `fastdp.wrap` makes of it."""
    optimizer, criterion = make_optimizer(model.parameters()), nn.CrossEntropyLoss()
    for tokens, lengths, depths in batches:
        optimizer.zero_grad()
        loss = criterion(model(tokens, lengths), depths)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.detach()


def train_step(module: nn.Module, batches: Iterable[Batch], **how: Any) -> Iterator[Tensor]:
    """The same in one call per batch. A tuple holds the module's arguments."""
    model = fastdp.wrap(module, **how)
    step = model.train_step(nn.CrossEntropyLoss(), make_optimizer, reduction="mean", clip_grad_norm=1.0)
    for tokens, lengths, depths in batches:
        yield step((tokens, lengths), depths)


def main() -> None:
    """Train three times, and compare."""
    options = arguments(__doc__, rows=32, steps=60)
    batches = batches_of(brackets(8 * options.rows, MOST), options.rows, options.steps)
    compare(build, loop, train_step, batches, options.devices)


if __name__ == "__main__":
    main()
