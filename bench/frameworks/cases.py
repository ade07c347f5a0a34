"""What is trained: built-in models of `fastdp bench` at sizes for a few cores, and the rows of their global batches."""

from __future__ import annotations

from dataclasses import dataclass

from fastdp.benchmark.models import find


@dataclass(frozen=True)
class Case:
    """One model of the comparison.

    Attributes:
        target: the built-in model with its sizes.
        rows: rows of the global batch.
        steps: steps of one timed round, chosen so that a round takes a second or two on two cores.
    """

    target: str
    rows: int
    steps: int

    @property
    def title(self) -> str:
        """The model, and its batch."""
        return f"{find(self.target).title}, batch {self.rows}"


CASES = {
    "mlp": Case("mlp", 128, 150),
    "cnn": Case("cnn", 128, 40),
    "lstm": Case("lstm", 64, 25),
    "transformer": Case(
        "bert-base:tokens=64,vocabulary=1000,width=128,depth=2,heads=4,wide=512,positions=64,classes=10", 32, 25
    ),
    "resnet50": Case("resnet50:size=64,classes=10", 32, 3),
    "xception": Case("xception:size=96,classes=10", 32, 3),
}
