"""The built-in models of `fastdp bench`, each with the batches that it takes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from fastdp.benchmark.arrays import Array

# Where the builders of each framework are: a module of this package with a dict BUILDERS, by the name of the model.
BUILDERS = {"keras": "fastdp.benchmark.models.keras_models", "torch": "fastdp.benchmark.models.torch_models"}


@dataclass(frozen=True)
class Builtin:
    """A built-in model. It ends in logits; its loss is the cross-entropy with whole-number labels.

    Args:
        title: what it is, with its sizes.
        inputs: images have their channels last; a torch form takes them first.
        targets: the labels.
        batch: rows of the global batch where none is asked for.
        optimizer: "sgd" (with momentum 0.9), "adam" or "adamw".
        frameworks: the forms that there are.
    """

    title: str
    inputs: tuple[Array, ...]
    targets: tuple[Array, ...]
    batch: int
    optimizer: str = "sgd"
    frameworks: tuple[str, ...] = ("keras", "torch")

    def inputs_of(self, framework: str) -> tuple[Array, ...]:
        """The inputs as the form for a framework takes them."""
        if framework == "keras":
            return self.inputs
        return tuple(
            Array(one.name, (one.shape[2], *one.shape[:2]), one.dtype, one.below) if len(one.shape) == 3 else one
            for one in self.inputs
        )


MODELS: dict[str, Builtin] = {
    "mlp": Builtin(
        "MLP 784-512-512-10", (Array("x", (784,)),), (Array("y", (), "int64", 10),), batch=128, frameworks=("keras",)
    ),
}


def build(name: str, framework: str) -> Any:
    """A new `keras.Model` or `torch.nn.Module`.

    Raises:
        ValueError: there is no such model, or it has no form for this framework.
    """
    if name not in MODELS:
        raise ValueError(f"there is no built-in model {name!r}: there are {', '.join(MODELS)}")
    if framework not in MODELS[name].frameworks:
        raise ValueError(f"{name} has no form for {framework}: there is one for {', '.join(MODELS[name].frameworks)}")
    return importlib.import_module(BUILDERS[framework]).BUILDERS[name]()
