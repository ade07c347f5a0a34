"""The data of these examples: text, digits, shapes, brackets and graphs, all without a network."""

from __future__ import annotations

import inspect
import textwrap

import torch
from torch import Tensor


def characters(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Pieces of Python's own `textwrap`: characters (rows, tokens), the following ones, and the number of kinds."""
    text = inspect.getsource(textwrap)
    kinds = sorted(set(text))
    numbers = torch.tensor([kinds.index(c) for c in text])
    starts = torch.randint(len(text) - tokens, (rows, 1), generator=torch.Generator().manual_seed(seed))
    places = starts + torch.arange(tokens)
    return numbers[places], numbers[places + 1], len(kinds)


def shapes(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images (rows, 1, size, size) of a disc and a square, and the class of each pixel: 0, 1 or 2."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.rand(rows, 4, 1, 1, generator=generator) * size
    radius = (0.15 + 0.15 * torch.rand(rows, 2, 1, 1, generator=generator)) * size
    disc = (x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < radius[:, 0] ** 2
    square = torch.maximum((x - centre[:, 2]).abs(), (y - centre[:, 3]).abs()) < radius[:, 1]
    classes = torch.where(square, 2, disc.long())
    noise = 0.3 * torch.randn(rows, size, size, generator=generator)
    return ((classes > 0) + noise).to(torch.get_default_dtype())[:, None], classes


def brackets(rows: int, most: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Brackets 1 and 2, padded by 0 (rows, most), the lengths (rows,), and how deep they go, at most 3 (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(most // 3, most + 1, (rows,), generator=generator)
    tokens = torch.randint(1, 3, (rows, most), generator=generator)
    tokens[torch.arange(most) >= lengths[:, None]] = 0
    depth = ((tokens == 1).long() - (tokens == 2).long()).cumsum(1).amax(1)
    return tokens, lengths, depth.clamp(0, 3)


def graphs(rows: int, most: int, features: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random graphs: features of nodes, adjacency, nodes that exist, and the logarithm of 1 + triangles (rows,)."""
    generator, dtype = torch.Generator().manual_seed(seed), torch.get_default_dtype()
    there = torch.arange(most) < torch.randint(most // 2, most + 1, (rows, 1), generator=generator)
    chance = 0.2 + 0.5 * torch.rand(rows, 1, 1, generator=generator)
    half = torch.triu(torch.rand(rows, most, most, generator=generator) < chance, 1)
    edges = ((half | half.mT) & there[:, :, None] & there[:, None, :]).to(dtype)
    triangles = torch.diagonal(edges @ edges @ edges, dim1=1, dim2=2).sum(1) / 6
    nodes = torch.randn(rows, most, features, generator=generator).to(dtype) * there[..., None]
    nodes[..., 0] = edges.sum(2)
    return nodes, edges, there.to(dtype), torch.log1p(triangles)
