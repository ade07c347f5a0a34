"""Image classifiers as torch modules: ResNet50, Xception and ViT, channels first.

The convolutional networks have the layers of keras.applications, so that both forms do the same work: ResNet50's
convolutions have biases, and the first convolution of a block has the stride.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fastdp.benchmark.models.torch.attention import Block

RESNET_EPSILON, XCEPTION_EPSILON = 1.001e-5, 1e-3


def resnet50(*, size: int, classes: int) -> nn.Module:
    """ResNet50 (He et al., 2016): a stem, then 3, 4, 6 and 3 bottlenecks. Takes images of any `size`."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1, project=number == 0))
            inputs = 4 * width
    stem = [*_normalized(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, *_head(2048, classes))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 beside a shortcut, which is a projection where `project` is true."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(*_normalized(inputs, width, 1, stride), nn.ReLU()),
            *(*_normalized(width, width, 3), nn.ReLU()),
            *_normalized(width, 4 * width, 1),
        )
        self.shortcut = nn.Sequential(*(_normalized(inputs, 4 * width, 1, stride) if project else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to images, smaller by the stride."""
        return torch.relu(self.path(x) + self.shortcut(x))


def _normalized(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with biases, and batch normalization."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    return [convolution, nn.BatchNorm2d(outputs, eps=RESNET_EPSILON)]


def _head(width: int, classes: int) -> list[nn.Module]:
    """The mean over each channel, and a classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def xception(*, size: int, classes: int) -> nn.Module:
    """Xception (Chollet, 2017): 36 convolutions, most of them separable. Takes images of any `size`."""

    def stem(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        return [convolution, nn.BatchNorm2d(outputs, eps=XCEPTION_EPSILON), nn.ReLU()]

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
        *_head(2048, classes),
    )


class XceptionBlock(nn.Module):
    """Separable convolutions of these widths beside a shortcut, which is a projection where `pool` halves the size."""

    def __init__(self, *widths: int, pool: bool, activate_first: bool = True) -> None:
        super().__init__()
        path: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            path += [*([nn.ReLU()] if number or activate_first else []), *_separable(inputs, outputs)]
        self.path = nn.Sequential(*path, *([nn.MaxPool2d(3, 2, 1)] if pool else []))
        project = [nn.Conv2d(widths[0], widths[-1], 1, 2, bias=False)] if pool else []
        project += [nn.BatchNorm2d(widths[-1], eps=XCEPTION_EPSILON)] if pool else []
        self.shortcut = nn.Sequential(*project)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to images, half as large where the block pools."""
        return self.path(x) + self.shortcut(x)


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    """A depthwise and a pointwise convolution without biases, and batch normalization."""
    return [
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs, eps=XCEPTION_EPSILON),
    ]


class ViT(nn.Module):
    """The vision transformer (Dosovitskiy et al., 2021): patches as tokens, with a class token before them."""

    def __init__(self, *, size: int, patch: int, width: int, depth: int, heads: int, wide: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, heads, wide) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images of shape (rows, 3, size, size) to logits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        return self.head(self.norm(self.blocks(x + self.positions))[:, 0])
