"""What is measured: a built-in model, a `.keras` file, or what a function of the user's file returns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.benchmark.arrays import Array
from fastdp.benchmark.request import Request


def pack(values: Sequence[Any]) -> Any:
    """One array alone; several as a tuple."""
    return values[0] if len(values) == 1 else tuple(values)


@dataclass
class Target:
    """A model with what its training takes, in a worker process.

    Attributes:
        title: what it is, for people.
        framework: "keras" or "torch".
        model: a built `keras.Model`, or a `torch.nn.Module` on the CPU.
        loss: for Keras what `compile` takes; for torch a function of the outputs and the targets.
        optimizer: for Keras what `compile` takes; for torch a function from parameters to an optimizer.
        inputs, targets: the arrays of a batch.
        make_batch: the user's own function from a number of rows to (inputs, targets); None where batches are drawn.
        pack_inputs, pack_targets: put arrays in the order of `inputs` or `targets` into the form that the model takes.
        loss_weights: for Keras what `compile` takes.
        reduction: of a torch loss, "mean" where it is the mean over samples; None where that is not known.
        loss_title, optimizer_title: their names, for people.
    """

    title: str
    framework: str
    model: Any
    loss: Any
    optimizer: Any
    inputs: tuple[Array, ...]
    targets: tuple[Array, ...]
    make_batch: Callable[[int], Any] | None = None
    pack_inputs: Callable[[Sequence[Any]], Any] = pack
    pack_targets: Callable[[Sequence[Any]], Any] = pack
    loss_weights: Any = None
    reduction: str | None = None
    loss_title: str = ""
    optimizer_title: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What goes into the result: title, inputs, loss and optimizer."""
        return {
            "title": self.title,
            "inputs": [one.to_dict() for one in self.inputs],
            "loss": self.loss_title,
            "optimizer": self.optimizer_title,
        }


def load(request: Request) -> Target:
    """Load the model of a request in this process, with its loss and optimizer.

    Raises:
        ValueError: there is no such model, or something that its training needs is unknown; the message has the remedy.
    """
    side = importlib.import_module(f"fastdp.benchmark.{request.framework}_target")
    target: Target = side.load(request)
    return target
