"""The models of the comparison as plain torch modules: the layers of `keras_models.py`, channels first."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

CLASSES = 10


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def cnn() -> nn.Module:
    """Two convolutions and two dense layers on 28x28 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


class LSTM(nn.Module):
    """An LSTM(64) over 80 steps of 32 features. It has a second bias: 256 parameters more than Keras's LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits from the last step."""
        return self.head(self.lstm(x)[0][:, -1])


class Block(nn.Module):
    """An encoder block that normalizes after each sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.wide, self.narrow = nn.Linear(128, 512), nn.Linear(512, 128)
        self.norms = nn.ModuleList([nn.LayerNorm(128), nn.LayerNorm(128)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of 64 vectors to the same."""
        x = self.norms[0](x + self.attention(x, x, x, need_weights=False)[0])
        return self.norms[1](x + self.narrow(torch.relu(self.wide(x))))


class Transformer(nn.Module):
    """Two encoder blocks, 128 wide, 4 heads, on 64 tokens of a vocabulary of 1,000."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits from the mean over tokens."""
        return self.head(self.blocks(self.embedding(x)).mean(1))


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with bias, and batch normalization, as in keras.applications' ResNet50."""
    return [nn.Conv2d(inputs, outputs, size, stride, padding=size // 2), nn.BatchNorm2d(outputs, eps=1.001e-5)]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the first of a stack has a projection, and strides in its first convolution."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(*_convolution(inputs, width, 1, stride), nn.ReLU()),
            *(*_convolution(width, width, 3), nn.ReLU()),
            *_convolution(width, 4 * width, 1),
        )
        self.shortcut = nn.Sequential(*(_convolution(inputs, 4 * width, 1, stride) if project else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A residual block."""
        return torch.relu(self.path(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet50 as in keras.applications: with biases, and strides in the first convolution of a block."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1, project=i == 0))
            inputs = 4 * width
    stem = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, CLASSES))


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    """A depthwise and a pointwise convolution without biases, and batch normalization."""
    return [
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]


class XceptionBlock(nn.Module):
    """Separable convolutions of these widths and a shortcut, which is a projection if `pool` halves the size."""

    def __init__(self, *widths: int, pool: bool, activate_first: bool = True) -> None:
        super().__init__()
        path: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            path += [*([nn.ReLU()] if i or activate_first else []), *_separable(inputs, outputs)]
        self.path = nn.Sequential(*path, *([nn.MaxPool2d(3, 2, 1)] if pool else []))
        project = [nn.Conv2d(widths[0], widths[-1], 1, 2, bias=False), nn.BatchNorm2d(widths[-1], eps=1e-3)]
        self.shortcut = nn.Sequential(*(project if pool else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A residual block."""
        return self.path(x) + self.shortcut(x)


def xception() -> nn.Module:
    """Xception, as in keras.applications."""

    def stem(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, bias=False), nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU()]

    return nn.Sequential(
        *stem(3, 32, 2),
        *stem(32, 64, 1),
        XceptionBlock(64, 128, 128, pool=True, activate_first=False),
        XceptionBlock(128, 256, 256, pool=True),
        XceptionBlock(256, 728, 728, pool=True),
        *(XceptionBlock(728, 728, 728, 728, pool=False) for _ in range(8)),
        XceptionBlock(728, 728, 1024, pool=True),
        *(*_separable(1024, 1536), nn.ReLU()),
        *(*_separable(1536, 2048), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, CLASSES)),
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "lstm": LSTM,
    "transformer": Transformer,
    "resnet50": resnet50,
    "xception": xception,
}
