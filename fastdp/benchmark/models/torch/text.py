"""Language models as torch modules: BERT as a classifier, and GPT-2."""

from __future__ import annotations

import torch
from torch import nn

from fastdp.benchmark.models.torch.attention import Block, normal_weights

BERT_EPSILON, GPT2_EPSILON = 1e-12, 1e-5


class Bert(nn.Module):
    """BERT (Devlin et al., 2019), fine-tuned as a classifier: the pooled first token, and a dense layer."""

    def __init__(
        self,
        *,
        tokens: int,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        wide: int,
        positions: int,
        classes: int,
    ) -> None:
        super().__init__()
        if tokens > positions:
            raise ValueError(f"`tokens` must be at most `positions`={positions}. Received: tokens={tokens}")
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.segments, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, eps=BERT_EPSILON)
        blocks = (Block(width, heads, wide, norm_first=False, epsilon=BERT_EPSILON) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        normal_weights(self)

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """Map numbers of words, and of the sentence that each is in, to logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places) + self.segments(segments))
        return self.head(torch.tanh(self.pooler(self.blocks(x)[:, 0])))


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019). The head is the embedding of the words."""

    def __init__(self, *, tokens: int, vocabulary: int, width: int, depth: int, heads: int, positions: int) -> None:
        super().__init__()
        if tokens > positions:
            raise ValueError(f"`tokens` must be at most `positions`={positions}. Received: tokens={tokens}")
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(
            *(
                Block(width, heads, 4 * width, causal=True, approximate="tanh", epsilon=GPT2_EPSILON)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width, eps=GPT2_EPSILON)
        normal_weights(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map numbers of words to the logits of the next word, at each token."""
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return nn.functional.linear(self.norm(self.blocks(x)), self.words.weight)
