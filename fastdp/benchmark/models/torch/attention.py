"""Self-attention and the blocks of transformers as torch modules, without dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention; `causal`: each token sees itself and those before it."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads`. Received: width={width}, heads={heads}")
        self.heads, self.causal = heads, causal
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (rows, tokens, width) to the same shape."""
        rows, tokens, width = x.shape
        parts = self.projections(x).view(rows, tokens, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))


class Block(nn.Module):
    """Attention and two dense layers, each beside a sum.

    Args:
        width, heads: of the attention.
        wide: width of the hidden dense layer.
        causal: as in `Attention`.
        norm_first: normalize before attention and dense layers (ViT, GPT-2), else after the sums (BERT).
        approximate: GELU's form: "none" is exact, "tanh" is GPT-2's.
        epsilon: of the normalization.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        wide: int,
        *,
        causal: bool = False,
        norm_first: bool = True,
        approximate: str = "none",
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads, causal=causal)
        self.dense = nn.Sequential(nn.Linear(width, wide), nn.GELU(approximate), nn.Linear(wide, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (rows, tokens, width) to the same shape."""
        if self.norm_first:
            x = x + self.attention(self.norms[0](x))
            return x + self.dense(self.norms[1](x))
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + self.dense(x))


def normal_weights(module: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of dense layers and embeddings from a normal distribution, and set biases to zero."""

    def initialize(part: Any) -> None:
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)

    module.apply(initialize)
