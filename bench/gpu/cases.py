"""What is trained on a card: models, batches and precision, the same for all ways; and tiny ones that a test can run.

All models have ten classes, which hardly changes ResNet50, Xception and the encoder. `tf32` is fp32 with TF32 matrix
products, JAX's default; `bf16` is mixed precision: Keras's policy mixed_bfloat16, torch's autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """One model at one batch size and precision.

    Attributes:
        model: mlp, resnet50, xception or encoder.
        shape: shape of a row, channels last; for an encoder the number of tokens.
        rows: rows of a global batch.
        precision: tf32 or bf16.
        steps: steps of one timed round.
        rounds: number of values in each median.
        optimizer: sgd (with momentum) or adam.
        tokens: size of the vocabulary, 0 if rows are floats.
        options: arguments of the model's builder, if the model comes in several sizes.
        at_once: maximum number of processes, each with this model and its batch, on the card at a time.
    """

    title: str
    model: str
    shape: tuple[int, ...]
    rows: int
    precision: str
    steps: int
    rounds: int = 5
    optimizer: str = "sgd"
    tokens: int = 0
    options: Mapping[str, int] = field(default_factory=dict)
    at_once: int = 24

    def data(self, steps: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and labels for `steps` batches of `rows`."""
        generator = np.random.default_rng(0)
        shape = (steps * rows, *self.shape)
        if self.tokens:
            x = generator.integers(0, self.tokens, shape, np.int32)
        else:
            x = generator.standard_normal(shape, np.float32)
        return x, generator.integers(0, CLASSES, shape[0], np.int32)


BERT_BASE = {"width": 768, "depth": 12, "heads": 12, "wide": 3072, "vocabulary": 30522, "tokens": 128}
TINY_ENCODER = {"width": 8, "depth": 2, "heads": 2, "wide": 16, "vocabulary": 50, "tokens": 6}

CASES = {
    "mlp": Case("MLP 784-512-512-10, batch 128, TF32", "mlp", (784,), 128, "tf32", 100, 7),
    "resnet50-tf32-32": Case("ResNet50 224, batch 32, TF32", "resnet50", (224, 224, 3), 32, "tf32", 8, at_once=9),
    "resnet50-bf16-32": Case("ResNet50 224, batch 32, bf16", "resnet50", (224, 224, 3), 32, "bf16", 8, at_once=9),
    "resnet50-bf16-256": Case("ResNet50 224, batch 256, bf16", "resnet50", (224, 224, 3), 256, "bf16", 3, at_once=4),
    "xception-bf16-64": Case("Xception 299, batch 64, bf16", "xception", (299, 299, 3), 64, "bf16", 4, at_once=5),
    "encoder-bf16-32": Case(
        "Encoder of BERT-base's size, batch 32 of 128 tokens, bf16",
        *("encoder", (128,), 32, "bf16", 8),
        optimizer="adam",
        tokens=30522,
        options=BERT_BASE,
        at_once=9,
    ),
    "tiny-mlp": Case("MLP 784-512-512-10, batch 16", "mlp", (784,), 16, "tf32", 2, 2),
    "tiny-encoder": Case(
        "Encoder of 8, batch 8", "encoder", (6,), 8, "bf16", 2, 2, optimizer="adam", tokens=50, options=TINY_ENCODER
    ),
}
