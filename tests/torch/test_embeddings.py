"""Embeddings that look at all indices of a batch: exact on several devices, or an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp


def words(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(9, (11, 3), generator=generator), torch.randn(11, 4, generator=generator).double()


class Words(nn.Module):
    """The mean of a row's vectors."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding.double()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        found = self.embedding(words)
        return found.mean(1) if found.ndim == 3 else found


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


@pytest.mark.parametrize("way", ["loop", "train_step"])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_weights_are_scaled_to_max_norm_wherever_the_batch_uses_them(devices, way):
    module = Words(nn.Embedding(9, 4, max_norm=0.7, norm_type=1.0))
    reference = copy.deepcopy(module)
    parallel = fastdp.wrap(module, gpus=devices, check_replicas=True)
    step = parallel.train_step(F.mse_loss, sgd) if way == "train_step" else None
    own, optimizer = sgd(module.parameters()), sgd(reference.parameters())
    for seed in range(4):
        x, y = words(seed)
        optimizer.zero_grad()
        expected = F.mse_loss(reference(x), y)
        expected.backward()
        optimizer.step()
        if step is not None:
            found = step(x, y)
        else:
            own.zero_grad()
            found = F.mse_loss(parallel(x), y)
            found.backward()
            own.step()
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "embedding",
    [
        nn.Embedding(9, 4, scale_grad_by_freq=True),
        nn.EmbeddingBag(9, 4, scale_grad_by_freq=True, mode="sum"),
        nn.EmbeddingBag(9, 4, max_norm=0.7),
    ],
    ids=["frequencies", "frequencies of bags", "max_norm of bags"],
)
def test_what_needs_the_indices_of_the_whole_batch_is_an_error_that_says_so(embedding):
    step = fastdp.wrap(Words(embedding), gpus=2).train_step(F.mse_loss, sgd)
    with pytest.raises(NotImplementedError, match=r"whole batch.*or use gpus=\[0\]"):
        step(*words(0))
