"""Small torch modules: a multilayer perceptron, a convolutional network and an LSTM."""

from __future__ import annotations

import torch
from torch import nn


def mlp(*, features: int, width: int, classes: int) -> nn.Module:
    """Three dense layers."""
    return nn.Sequential(
        *(nn.Linear(features, width), nn.ReLU()), *(nn.Linear(width, width), nn.ReLU()), nn.Linear(width, classes)
    )


def cnn(*, size: int, channels: int, classes: int) -> nn.Module:
    """Two convolutions of 3x3, each with pooling, and two dense layers."""
    left = ((size - 2) // 2 - 2) // 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * left * left, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


class LSTM(nn.Module):
    """An LSTM over a sequence, and a classifier of its last state.

    torch's LSTM has two bias vectors per gate, which are only ever added. The second one is zero and not trained, so
    that the module trains as many numbers as Keras's layer.
    """

    def __init__(self, *, steps: int, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.steps = steps
        self.lstm = nn.LSTM(features, width, batch_first=True)
        nn.init.zeros_(self.lstm.bias_hh_l0)
        self.lstm.bias_hh_l0.requires_grad_(False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map sequences of shape (rows, steps, features) to logits."""
        return self.head(self.lstm(x)[0][:, -1])
