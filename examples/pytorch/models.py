"""The models of these examples, with their losses: GPT, ResNet, UNet, VAE, LSTM, graph network and GAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class CausalBlock(nn.Module):
    """A transformer block that normalizes first and sees only what came before."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, width) to the same."""
        rows, tokens, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.project(seen.transpose(1, 2).reshape(rows, tokens, width)))
        return x + self.drop(self.mlp(self.norms[1](x)))


class GPT(nn.Module):
    """A decoder whose output layer shares its weight with the embedding."""

    def __init__(
        self, vocabulary: int, tokens: int, width: int = 64, heads: int = 4, blocks: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads, dropout) for _ in range(blocks)))
        self.drop, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, tokens) to logits (rows, tokens, vocabulary)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.embedding(tokens) + self.positions(places))
        return self.head(self.norm(self.blocks(x)))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each next token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Residual(nn.Module):
    """Two convolutions with batch normalization, and a projection where width or size change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        project = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*(project if stride > 1 or inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        """A residual block."""
        return F.relu(self.path(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of two residual blocks; each but the first halves the size and doubles the width."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16, stages: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        for stage in range(stages):
            inputs, outputs = width << max(0, stage - 1), width << stage
            blocks += [Residual(inputs, outputs, 2 if stage else 1), Residual(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width << (stages - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (rows, channels, height, width) to logits (rows, classes)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with group normalization."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()),
    )


class UNet(nn.Module):
    """Down, across and up again, with a shortcut at each size."""

    def __init__(self, channels: int = 1, classes: int = 3, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList([_convolutions(a, b) for a, b in zip([channels, *widths], widths, strict=False)])
        self.grow = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1]])
        self.up = nn.ModuleList([_convolutions(2 * w, w) for w in widths[-2::-1]])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (rows, channels, height, width) to logits (rows, classes, height, width)."""
        passed = []
        for level, convolutions in enumerate(self.down):
            x = convolutions(F.max_pool2d(x, 2) if level else x)
            passed.append(x)
        passed.pop()
        for grow, convolutions in zip(self.grow, self.up, strict=True):
            x = convolutions(torch.cat([passed.pop(), grow(x)], dim=1))
        return self.head(x)


class VAE(nn.Module):
    """A variational autoencoder of images whose pixels lie between 0 and 1."""

    def __init__(self, pixels: int = 64, width: int = 64, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (rows, pixels) to the logits of them, the means and the logarithms of the variances."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def vae_loss(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """The negative evidence lower bound, per image."""
    logits, mean, log_variance = outputs
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = 0.5 * torch.sum(mean**2 + log_variance.exp() - 1 - log_variance)
    return (reconstruction + divergence) / len(x)


class Tagger(nn.Module):
    """A bidirectional LSTM over sequences of unequal lengths, and a class for each."""

    def __init__(self, vocabulary: int, classes: int, width: int = 32, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True, dropout=dropout)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Padded tokens (rows, tokens) and their lengths (rows,) to logits (rows, classes)."""
        packed = pack_padded_sequence(self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return self.head(states.sum(1) / lengths[:, None])


class GraphNet(nn.Module):
    """Messages along the edges of small graphs, one graph a row: its adjacency matrix, padded to the same size."""

    def __init__(self, features: int, width: int = 32, rounds: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.messages = nn.ModuleList([nn.Linear(width, width) for _ in range(rounds)])
        self.updates = nn.ModuleList([nn.GRUCell(width, width) for _ in range(rounds)])
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, nodes: Tensor, edges: Tensor, there: Tensor) -> Tensor:
        """Features (rows, nodes, features), edges (rows, nodes, nodes), nodes that exist (rows, nodes) to (rows,)."""
        x = self.embed(nodes)
        for message, update in zip(self.messages, self.updates, strict=True):
            heard = edges @ message(x)
            x = update(heard.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        pooled = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return self.head(pooled)[:, 0]


class Generator(nn.Module):
    """Noise to images."""

    def __init__(self, latent: int = 16, width: int = 64, pixels: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(latent, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, pixels), nn.Sigmoid()),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(rows, latent) to (rows, pixels)."""
        return self.layers(z)


class Discriminator(nn.Module):
    """Images to the logits of being real."""

    def __init__(self, pixels: int = 64, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(pixels, width), nn.LeakyReLU(0.2), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Dropout(dropout)),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(rows, pixels) to (rows,)."""
        return self.layers(x)[:, 0]


def real_loss(logits: Tensor) -> Tensor:
    """How far images are from being taken for real."""
    return F.softplus(-logits).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """How far images are from being found out."""
    return F.softplus(logits).mean()
