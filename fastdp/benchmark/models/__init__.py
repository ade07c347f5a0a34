"""The built-in models of `fastdp bench`: published architectures, as Keras models and as torch modules.

Each is written from its paper, in two forms that train the same number of parameters. None has dropout: throughput is
measured without it elsewhere too, and two ways then compute the same. All end in logits, and their loss is the mean
cross-entropy with whole-number labels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastdp.benchmark.arrays import Array

Sizes = Mapping[str, int]
Arrays = tuple[tuple[Array, ...], tuple[Array, ...]]
FRAMEWORKS = ("keras", "torch")


@dataclass(frozen=True)
class Builtin:
    """A built-in model.

    Attributes:
        name: its name on the command line.
        describe: makes the title from the sizes.
        arrays: makes inputs and targets from the sizes. Images have their channels last; a torch module takes them
            first.
        builders: for each framework the module of this package and its function, which takes the sizes.
        sizes: the published ones, unless changed.
        batch: rows of the global batch where none is asked for.
        parameters: how many numbers are trained with the published sizes, in both forms.
        optimizer: "sgd" (with momentum 0.9), "adam" or "adamw".
    """

    name: str
    describe: Callable[[Sizes], str]
    arrays: Callable[[Sizes], Arrays]
    builders: Mapping[str, str]
    sizes: Sizes
    batch: int
    parameters: int
    optimizer: str = "sgd"

    @property
    def title(self) -> str:
        """What it is, with its sizes."""
        return self.describe(self.sizes)

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks that it has a form for."""
        return tuple(self.builders)

    @property
    def targets(self) -> tuple[Array, ...]:
        """The labels."""
        return self.arrays(self.sizes)[1]

    def inputs_of(self, framework: str) -> tuple[Array, ...]:
        """The inputs as the form for a framework takes them."""
        inputs = self.arrays(self.sizes)[0]
        if framework == "keras":
            return inputs
        return tuple(
            replace(one, shape=(one.shape[2], *one.shape[:2])) if len(one.shape) == 3 else one for one in inputs
        )

    def build(self, framework: str) -> Any:
        """Make a new `keras.Model` or `torch.nn.Module`, with weights from the library's random generators.

        Raises:
            ValueError: there is no form for this framework, or a size does not fit the others.
        """
        if framework not in self.builders:
            raise ValueError(f"{self.name} has no form for {framework!r}, only for {' and '.join(self.builders)}")
        module, function = self.builders[framework].split(":")
        return getattr(importlib.import_module(f"{__name__}.{framework}.{module}"), function)(**self.sizes)


def _labels(classes: int, *shape: int) -> tuple[Array, ...]:
    return (Array("labels", shape, "int64", classes),)


def _images(sizes: Sizes) -> Arrays:
    shape = (sizes["size"], sizes["size"], sizes.get("channels", 3))
    return (Array("images", shape),), _labels(sizes["classes"])


def _sequences(sizes: Sizes) -> Arrays:
    return (Array("x", (sizes["steps"], sizes["features"])),), _labels(sizes["classes"])


def _vectors(sizes: Sizes) -> Arrays:
    return (Array("x", (sizes["features"],)),), _labels(sizes["classes"])


def _sentences(sizes: Sizes) -> Arrays:
    shape = (sizes["tokens"],)
    words = Array("tokens", shape, "int32", sizes["vocabulary"])
    return (words, Array("segments", shape, "int32", 2)), _labels(sizes["classes"])


def _text(sizes: Sizes) -> Arrays:
    shape = (sizes["tokens"],)
    return (Array("tokens", shape, "int32", sizes["vocabulary"]),), _labels(sizes["vocabulary"], *shape)


def _both(keras: str, torch: str) -> dict[str, str]:
    return {"keras": keras, "torch": torch}


def _photo(name: str) -> Callable[[Sizes], str]:
    """The title of a classifier of images."""
    return lambda sizes: f"{name}, {sizes['size']}x{sizes['size']}, {sizes['classes']} classes"


_VIT = {"size": 224, "patch": 16, "width": 768, "depth": 12, "heads": 12, "wide": 3072, "classes": 1000}
_BERT = {
    "tokens": 128,
    "vocabulary": 30522,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "wide": 3072,
    "positions": 512,
    "classes": 2,
}
_GPT2 = {"tokens": 1024, "vocabulary": 50257, "width": 768, "depth": 12, "heads": 12, "positions": 1024}

MODELS: dict[str, Builtin] = {
    model.name: model
    for model in (
        Builtin(
            "mlp",
            lambda s: f"MLP {s['features']}-{s['width']}-{s['width']}-{s['classes']}",
            _vectors,
            _both("small:mlp", "small:mlp"),
            {"features": 784, "width": 512, "classes": 10},
            batch=128,
            parameters=669_706,
        ),
        Builtin(
            "cnn",
            lambda s: f"CNN, {s['size']}x{s['size']}, {s['classes']} classes",
            _images,
            _both("small:cnn", "small:cnn"),
            {"size": 28, "channels": 1, "classes": 10},
            batch=128,
            parameters=225_034,
        ),
        Builtin(
            "lstm",
            lambda s: f"LSTM({s['width']}) on {s['steps']}x{s['features']}",
            _sequences,
            _both("small:lstm", "small:LSTM"),
            {"steps": 80, "features": 32, "width": 64, "classes": 10},
            batch=64,
            parameters=25_482,
        ),
        Builtin(
            "resnet50",
            _photo("ResNet50"),
            _images,
            _both("images:resnet50", "images:resnet50"),
            {"size": 224, "classes": 1000},
            batch=64,
            parameters=25_583_592,
        ),
        Builtin(
            "xception",
            _photo("Xception"),
            _images,
            _both("images:xception", "images:xception"),
            {"size": 299, "classes": 1000},
            batch=64,
            parameters=22_855_952,
        ),
        Builtin(
            "vit-b16",
            lambda s: f"ViT, {s['depth']} blocks of {s['width']}, patches of {s['patch']}, {s['size']}x{s['size']}",
            _images,
            _both("images:vit", "images:ViT"),
            _VIT,
            batch=64,
            parameters=86_567_656,
            optimizer="adamw",
        ),
        Builtin(
            "bert-base",
            lambda s: f"BERT, {s['depth']} blocks of {s['width']}, {s['tokens']} tokens",
            _sentences,
            _both("text:bert", "text:Bert"),
            _BERT,
            batch=32,
            parameters=109_483_778,
            optimizer="adamw",
        ),
        Builtin(
            "gpt2-small",
            lambda s: f"GPT-2, {s['depth']} blocks of {s['width']}, {s['tokens']} tokens",
            _text,
            _both("text:gpt2", "text:GPT2"),
            _GPT2,
            batch=8,
            parameters=124_439_808,
            optimizer="adamw",
        ),
    )
}


def is_builtin(target: str) -> bool:
    """Whether a target names a built-in model, with or without sizes."""
    return target.partition(":")[0] in MODELS


def find(target: str) -> Builtin:
    """The built-in model that a target names: `resnet50`, or `resnet50:size=64,classes=10` for other sizes.

    Raises:
        ValueError: there is no such model or size, or a size is not a whole number from 1; the message has the choices.
    """
    name, _, text = target.partition(":")
    if name not in MODELS:
        raise ValueError(f"there is no built-in model {name!r}. There are {', '.join(MODELS)}")
    model, changed = MODELS[name], dict[str, int]()
    for part in filter(None, text.split(",")):
        size, _, value = part.partition("=")
        if size not in model.sizes:
            known = ", ".join(f"{known}={value}" for known, value in model.sizes.items())
            raise ValueError(f"{name} has no size {size!r}. Its sizes: {known}")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"the size {size!r} of {name} must be a whole number from 1. Received: {part!r}")
        changed[size] = int(value)
    return replace(model, sizes={**model.sizes, **changed})


def build(target: str, framework: str) -> Any:
    """Make the model that a target names, as `Builtin.build` does.

    Raises:
        ValueError: there is no such model, size or form.
    """
    return find(target).build(framework)
