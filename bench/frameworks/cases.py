"""What is trained: the shapes of each model's batch, and its data, the same for all peers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """One model of the comparison.

    `steps` is the number of steps in one timed round, chosen so that a round takes a second or two on two cores.
    `tokens` is the size of the vocabulary if rows are tokens, 0 if they are floats.
    """

    title: str
    shape: tuple[int, ...]
    rows: int
    steps: int
    tokens: int = 0

    def data(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (channels last) and labels for `steps` batches."""
        generator = np.random.default_rng(0)
        shape = (steps * self.rows, *self.shape)
        if self.tokens:
            x = generator.integers(0, self.tokens, shape, np.int32)
        else:
            x = generator.standard_normal(shape, np.float32)
        return x, generator.integers(0, CLASSES, shape[0], np.int32)


CASES = {
    "mlp": Case("MLP 784-512-512-10, batch 128", (784,), 128, 150),
    "cnn": Case("CNN 28x28, batch 128", (28, 28, 1), 128, 40),
    "lstm": Case("LSTM(64) on 80x32, batch 64", (80, 32), 64, 25),
    "transformer": Case("Transformer, 2 blocks of 128, 64 tokens, batch 32", (64,), 32, 25, tokens=1000),
    "resnet50": Case("ResNet50 64x64, batch 32", (64, 64, 3), 32, 3),
    "xception": Case("Xception 96x96, batch 32", (96, 96, 3), 32, 3),
}
