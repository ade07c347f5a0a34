"""What `fastdp bench` was asked to measure: the target, the ways, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastdp.benchmark.request import SYNTHETIC, Request


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The questions of one run.

    Args:
        target: a built-in name, an absolute path of a `.keras` file, or "/abs/file.py:function".
        name: the target as the user wrote it.
        framework: what the model is made of.
        ways: the ways to train, in their order.
        batch: rows of the global batch, or of each device if `per_device`.
        steps: of a round; None for as many as fit into `seconds`.
        seconds: of a round.
        rounds: how many, after the warm-up.
        timeout: seconds that a way may take to get ready, and a round more than it should.
        find_batch: search for the largest batch that fits and the one with the best throughput, and measure with that.
        traces: folder for a Chrome trace of each way that has one; None for none.
        command: the command line, for the result.
        note: what a user should know of the choices that were made for them; empty if nothing.
    """

    target: str
    name: str
    framework: str
    ways: Sequence[Request]
    batch: int
    precision: str = "float32"
    data: str = SYNTHETIC
    seed: int = 0
    per_device: bool = False
    steps: int | None = None
    seconds: float = 2.0
    rounds: int = 5
    timeout: float = 600.0
    find_batch: bool = False
    traces: Path | None = None
    command: Sequence[str] = ()
    note: str = ""

    def with_batch(self, batch: int) -> Settings:
        """The same with another batch: of the global batch, or of each device if `per_device`."""
        ways = [replace(way, batch=batch * way.devices if self.per_device else batch) for way in self.ways]
        return replace(self, batch=batch, ways=ways)
