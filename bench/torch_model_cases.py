"""The seven models of examples/pytorch/ at the sizes of the benchmark: builders, batches and steps per round."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "pytorch"))

import data
from comparison import Batch, Modules, batches_of

BATCHES = 4


@dataclass(frozen=True)
class Case:
    """One model: its example, its sizes, its rows per global batch, and the steps of one round (about 0.4 s)."""

    title: str
    rows: int
    steps: int
    tensors: Callable[[int], Sequence[torch.Tensor]]
    sizes: dict[str, int] = field(default_factory=dict)

    def batches(self) -> list[Batch]:
        """Four global batches, over which the steps go round and round."""
        return batches_of(self.tensors(BATCHES * self.rows), self.rows, BATCHES)


def _images(rows: int) -> Sequence[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, 32, 32, generator=generator), torch.randint(10, (rows,), generator=generator)


def _pixels(rows: int) -> Sequence[torch.Tensor]:
    return (torch.rand(rows, 784, generator=torch.Generator().manual_seed(0)),)


def _pixels_and_noise(rows: int) -> Sequence[torch.Tensor]:
    return (*_pixels(rows), torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)))


CASES = {
    "gpt": Case(
        "GPT: 4 blocks of 128, 64 tokens, batch 16",
        *(16, 10, lambda rows: data.characters(rows, 64)[:2]),
        {"tokens": 64, "width": 128, "heads": 4, "blocks": 4},
    ),
    "resnet": Case("ResNet: 16-32-64, 32x32, batch 32", 32, 9, _images, {"channels": 3, "width": 16, "stages": 3}),
    "unet": Case("UNet: 16-128, 32x32, batch 8", 8, 18, lambda rows: data.shapes(rows, 32), {"width": 16, "depth": 3}),
    "vae": Case("VAE: 784-400-20, batch 128", 128, 90, _pixels, {"pixels": 784, "width": 400, "latent": 20}),
    "lstm": Case(
        "LSTM: 2 x 64 both ways, 48 packed, batch 32", 32, 7, lambda rows: data.brackets(rows, 48), {"width": 64}
    ),
    "graph_net": Case(
        "Graph net: 64 x 3, 24 nodes, batch 64", 64, 40, lambda rows: data.graphs(rows, 24), {"width": 64}
    ),
    "gan": Case("GAN: 256 wide, 784 pixels, batch 128", 128, 16, _pixels_and_noise, {"pixels": 784, "width": 256}),
}


def example(name: str) -> ModuleType:
    """The example's script as a module: its `build`, `loop` and `train_step`."""
    return importlib.import_module(name)


def build(name: str) -> Modules:
    """The model at the size of the benchmark: a module, or two for the GAN."""
    return example(name).build(**CASES[name].sizes)
