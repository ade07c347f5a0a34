"""Every public layer of Keras, in a small model that can be trained: what it is tried on, and what must come out.

`python tests/shared/layer_cases.py` (or `make layers`) writes docs/layers.md from this list; test_every_layer.py holds
each case to what it claims, and the page to the list.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import layers

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
SEED = 11


class Weighted(layers.Layer):
    """A weight for each element of a row: its gradient is what the layer under test hands back."""

    def build(self, input_shape: Any) -> None:
        shape = [size if size is not None else 1 for size in input_shape[1:]]
        self.weight = self.add_weight(shape=shape, initializer=keras.initializers.RandomUniform(0.8, 1.2, seed=1))

    def call(self, inputs: Any) -> Any:
        mask = getattr(inputs, "_keras_mask", None)
        outputs = inputs * keras.ops.cast(self.weight, inputs.dtype)
        if mask is not None:
            keras.src.backend.set_keras_mask(outputs, mask)
        return outputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class Head(layers.Layer):
    """Two numbers for each row of whatever the layer under test gives."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return None

    def build(self, input_shape: Any) -> None:
        shapes = input_shape if isinstance(input_shape[0], (list, tuple)) else [input_shape]
        width = sum(int(np.prod(shape[1:])) if None not in shape[1:] else 1 for shape in shapes)
        self.kernel = self.add_weight(shape=(width, 2), initializer=keras.initializers.RandomNormal(stddev=0.2, seed=2))

    def call(self, inputs: Any) -> Any:
        leaves = [keras.ops.cast(leaf, "float32") for leaf in keras.tree.flatten(inputs)]
        rows = keras.ops.shape(leaves[0])[0]
        return keras.ops.concatenate([keras.ops.reshape(leaf, (rows, -1)) for leaf in leaves], axis=1) @ self.kernel

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape = input_shape[0] if isinstance(input_shape[0], (list, tuple)) else input_shape
        return (shape[0], 2)


@dataclass(frozen=True)
class Case:
    """A layer, what it is fed, and what is claimed of it.

    Args:
        make: makes the layer.
        shapes: of its inputs, without rows.
        below: an integer: inputs are whole numbers below it. None: floats in [0, 1).
        apply: how the layer is called, where it is not `layer(inputs)`.
        refused: the error, when wrapping, is a ValueError that this pattern finds.
        missing: what the layer needs and Keras on torch does not bring: no model can be made.
        weighted: a trainable layer stands before it.
        wrap: arguments of fastdp.wrap.
        rows: a fixed number of rows.
        against: compared with fastdp on this many devices, not with plain Keras.
        note: for the page.
        tolerance: relative.
    """

    make: Callable[[], Any]
    shapes: tuple[tuple[int, ...], ...] = ((6,),)
    below: int | None = None
    apply: Callable[[Any, list[Any]], Any] = lambda layer, xs: layer(xs[0] if len(xs) == 1 else xs)
    refused: str = ""
    missing: str = ""
    weighted: bool = True
    wrap: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    rows: int | None = None
    against: int | None = None
    tolerance: float = 2e-5

    def model(self) -> keras.Model:
        """The layer between a trainable one and a head."""
        keras.utils.set_random_seed(SEED)
        dtype = "int32" if self.below else "float32"
        inputs = [keras.Input(shape, self.rows, dtype=dtype) for shape in self.shapes]
        fed = [Weighted()(x) for x in inputs] if self.weighted and not self.below else list(inputs)
        layer = self.make()
        outputs = self.apply(layer, fed)
        model = keras.Model(inputs if len(inputs) > 1 else inputs[0], Head()(outputs))
        assert layer in list(model._flatten_layers()), f"{layer} is not a part of the model"
        return model

    def batch(self, rows: int, seed: int = 0) -> tuple[Any, np.ndarray]:
        """Inputs and targets."""
        rng = np.random.default_rng(seed)
        arrays = [
            rng.integers(0, self.below, (rows, *shape)).astype("int32")
            if self.below
            else rng.random((rows, *shape)).astype("float32")
            for shape in self.shapes
        ]
        return (arrays if len(arrays) > 1 else arrays[0]), rng.normal(size=(rows, 2)).astype("float32")


def image(make: Callable[[], Any], shape: tuple[int, ...] = (8, 8, 3), **options: Any) -> Case:
    """A layer of images."""
    return Case(make, (shape,), **options)


def sequence(make: Callable[[], Any], shape: tuple[int, ...] = (5, 4), **options: Any) -> Case:
    """A layer of sequences."""
    return Case(make, (shape,), **options)


def volume(make: Callable[[], Any], **options: Any) -> Case:
    """A layer of volumes."""
    return Case(make, ((6, 6, 6, 2),), **options)


def pair(make: Callable[[], Any], shape: tuple[int, ...] = (5, 4), **options: Any) -> Case:
    """A layer of two inputs of one shape."""
    return Case(make, (shape, shape), **options)


class MinimalCell(layers.Layer):
    """The least that `RNN` asks of a cell."""

    state_size = 4

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1] + 4, 4), initializer="glorot_uniform")

    def call(self, inputs: Any, states: Any) -> Any:
        out = keras.ops.tanh(keras.ops.concatenate([inputs, states[0]], -1) @ self.kernel)
        return out, [out]


def masked(layer: Any, xs: list[Any]) -> Any:
    """Sequences of different lengths: steps that start with a small number are left out."""
    return layer(layers.Masking(0.0)(layers.ReLU(threshold=0.5)(xs[0])))


def into_lstm(layer: Any, xs: list[Any]) -> Any:
    """A layer whose mask an LSTM heeds."""
    return layers.LSTM(3)(layer(xs[0]))


class Within(layers.Layer):
    """Calls a layer at run time: one that Keras 3.15 leaves out of Functional models."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.layer(inputs, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


def cell(layer: Any, xs: list[Any]) -> Any:
    """One step of a recurrent cell, from the states that it is given."""
    size = layer.state_size
    states = [xs[1]] * (len(size) if isinstance(size, (list, tuple)) else 1)
    return layer(xs[0], states)[0]


STATEFUL = r"is stateful: its state belongs to the rows of one batch.*Use stateful=False"
MIXES = r"mixes rows of the batch.*augment=layer"
TENSORFLOW = "TensorFlow"
UNIT = {"value_range": (0, 1), "seed": 5}
SYNC = {"sync_batch_norm": True}


def _pooling() -> dict[str, Case]:
    """Pooling, padding, cropping and upsampling of one to three axes."""
    cases: dict[str, Case] = {}
    for axes, of in ((1, lambda make: sequence(make, (6, 4))), (2, image), (3, volume)):
        for name in (f"AveragePooling{axes}D", f"MaxPooling{axes}D"):
            cases[name] = of(lambda n=name: getattr(layers, n)(2))
        for name in (f"GlobalAveragePooling{axes}D", f"GlobalMaxPooling{axes}D"):
            cases[name] = of(lambda n=name: getattr(layers, n)())
        for name in (f"AdaptiveAveragePooling{axes}D", f"AdaptiveMaxPooling{axes}D"):
            cases[name] = of(lambda n=name: getattr(layers, n)(2))
        for name in (f"Cropping{axes}D", f"ZeroPadding{axes}D"):
            cases[name] = of(lambda n=name: getattr(layers, n)(1))
        cases[f"UpSampling{axes}D"] = of(lambda n=f"UpSampling{axes}D": getattr(layers, n)(2))
        cases[f"SpatialDropout{axes}D"] = of(lambda n=f"SpatialDropout{axes}D": getattr(layers, n)(0.4, seed=5))
    cases["GlobalAveragePooling1D (masked)"] = sequence(layers.GlobalAveragePooling1D, apply=masked)
    return cases


def _convolutions() -> dict[str, Case]:
    """Convolutions and recurrent convolutions."""
    cases: dict[str, Case] = {}
    for axes, of in ((1, lambda make: sequence(make, (6, 4))), (2, image), (3, volume)):
        for name in (f"Conv{axes}D", f"Conv{axes}DTranspose"):
            cases[name] = of(lambda n=name: getattr(layers, n)(3, 3, activation="tanh"))
        if axes < 3:
            cases[f"SeparableConv{axes}D"] = of(lambda n=f"SeparableConv{axes}D": getattr(layers, n)(3, 3))
            cases[f"DepthwiseConv{axes}D"] = of(lambda n=f"DepthwiseConv{axes}D": getattr(layers, n)(3))
        shape = (3, *(5,) * axes, 2)
        cases[f"ConvLSTM{axes}D"] = Case(lambda n=f"ConvLSTM{axes}D": getattr(layers, n)(2, 3), (shape,))
    cases["Conv2D (groups, dilation)"] = image(lambda: layers.Conv2D(4, 3, groups=2, dilation_rate=2), (8, 8, 2))
    cases["ConvLSTM2D (dropout)"] = Case(
        lambda: layers.ConvLSTM2D(2, 3, dropout=0.3, recurrent_dropout=0.3, seed=5), ((3, 5, 5, 2),)
    )
    return cases


def _recurrent() -> dict[str, Case]:
    """Recurrent layers and their cells."""
    cases: dict[str, Case] = {}
    for name in ("LSTM", "GRU", "SimpleRNN"):
        of = getattr(layers, name)
        cases[name] = sequence(lambda of=of: of(4))
        cases[f"{name} (sequences, masked)"] = sequence(lambda of=of: of(4, return_sequences=True), apply=masked)
        cases[f"{name} (dropout)"] = sequence(lambda of=of: of(4, dropout=0.3, recurrent_dropout=0.3, seed=5))
        cases[f"{name} (initial state)"] = Case(
            lambda of=of: of(4, return_state=True),
            ((5, 4), (4,)),
            apply=lambda layer, xs: layer(xs[0], initial_state=[xs[1]] * (2 if isinstance(layer, layers.LSTM) else 1)),
        )
        cases[f"{name} (stateful)"] = sequence(lambda of=of: of(4, stateful=True), refused=STATEFUL, rows=6)
        cases[f"{name}Cell"] = Case(lambda n=name: getattr(layers, f"{n}Cell")(4), ((4,), (4,)), apply=cell)
    cases["RNN"] = sequence(lambda: layers.RNN(MinimalCell()), note="a cell of one's own")
    cases["RNN (of LSTMCell, backwards)"] = sequence(lambda: layers.RNN(layers.LSTMCell(3), go_backwards=True))
    cases["StackedRNNCells"] = sequence(
        lambda: layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(3, dropout=0.3, seed=5)]))
    )
    cases["Bidirectional"] = sequence(lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)))
    cases["Bidirectional (of GRU, masked, dropout)"] = sequence(
        lambda: layers.Bidirectional(layers.GRU(3, dropout=0.3, seed=5), merge_mode="sum"), apply=masked
    )
    cases["TimeDistributed"] = sequence(lambda: layers.TimeDistributed(layers.Dense(3)))
    cases["TimeDistributed (of Dropout)"] = sequence(lambda: layers.TimeDistributed(layers.Dropout(0.4, seed=5)))
    return cases


def _attention() -> dict[str, Case]:
    """Attention."""
    return {
        "Attention": pair(lambda: layers.Attention(use_scale=True, dropout=0.3, seed=5)),
        "AdditiveAttention": pair(layers.AdditiveAttention),
        "MultiHeadAttention": pair(lambda: layers.MultiHeadAttention(2, 3), apply=lambda la, xs: la(*xs)),
        "MultiHeadAttention (dropout)": pair(
            lambda: layers.MultiHeadAttention(2, 3, dropout=0.3, seed=5), apply=lambda la, xs: la(*xs)
        ),
        "MultiHeadAttention (causal, scores)": pair(
            lambda: layers.MultiHeadAttention(2, 3),
            apply=lambda la, xs: la(*xs, use_causal_mask=True, return_attention_scores=True),
        ),
        "GroupQueryAttention": pair(lambda: layers.GroupQueryAttention(3, 4, 2), apply=lambda la, xs: la(*xs)),
        "GroupQueryAttention (dropout)": pair(
            lambda: layers.GroupQueryAttention(3, 4, 2, dropout=0.3, seed=5), apply=lambda la, xs: la(*xs)
        ),
    }


def _normalization() -> dict[str, Case]:
    """Normalization and regularization."""
    spectral = layers.SpectralNormalization
    return {
        "BatchNormalization": Case(layers.BatchNormalization, wrap=SYNC, note="with `sync_batch_norm=True`"),
        "BatchNormalization (images)": image(layers.BatchNormalization, wrap=SYNC, note="with `sync_batch_norm=True`"),
        "BatchNormalization (renorm)": Case(lambda: layers.BatchNormalization(renorm=True), wrap=SYNC),
        "BatchNormalization (synchronized)": Case(
            lambda: layers.BatchNormalization(synchronized=True),
            missing="another backend: on torch Keras refuses it; use `fastdp.wrap(..., sync_batch_norm=True)`",
        ),
        "GroupNormalization": image(lambda: layers.GroupNormalization(2), (4, 4, 4)),
        "LayerNormalization": Case(layers.LayerNormalization),
        "RMSNormalization": Case(layers.RMSNormalization),
        "UnitNormalization": Case(layers.UnitNormalization),
        "Normalization": Case(lambda: layers.Normalization(mean=[0.5] * 6, variance=[0.1] * 6)),
        "SpectralNormalization": Case(lambda: spectral(layers.Dense(4))),
        "SpectralNormalization (of Conv2D)": image(lambda: spectral(layers.Conv2D(3, 3), power_iterations=2)),
        "ActivityRegularization": Case(lambda: layers.ActivityRegularization(l1=0.01, l2=0.01)),
        "Dropout": Case(lambda: layers.Dropout(0.4, seed=5)),
        "Dropout (one mask for all rows)": Case(lambda: layers.Dropout(0.4, noise_shape=(1, 6), seed=5)),
        "AlphaDropout": Case(lambda: layers.AlphaDropout(0.4, seed=5)),
        "GaussianDropout": Case(lambda: layers.GaussianDropout(0.4, seed=5)),
        "GaussianNoise": Case(lambda: layers.GaussianNoise(0.4, seed=5)),
    }


def _core() -> dict[str, Case]:
    """Core, merging, activation and reshaping layers."""
    cases = {
        "Activation": Case(lambda: layers.Activation("gelu")),
        "Dense": Case(lambda: layers.Dense(4, "tanh", kernel_regularizer="l2", kernel_constraint="unit_norm")),
        "Dense (LoRA)": Case(lambda: layers.Dense(4, lora_rank=2)),
        "Dense (int8)": Case(lambda: _quantized(layers.Dense(4), (None, 6))),
        "EinsumDense": sequence(lambda: layers.EinsumDense("abc,cd->abd", output_shape=(5, 3), bias_axes="d")),
        "Embedding": sequence(lambda: layers.Embedding(9, 3), (5,), below=9),
        "Embedding (masking zero)": sequence(
            lambda: layers.Embedding(9, 3, mask_zero=True),
            (5,),
            below=9,
            apply=into_lstm,
        ),
        "Embedding (LoRA)": sequence(lambda: layers.Embedding(9, 3, lora_rank=2), (5,), below=9),
        "ReversibleEmbedding": sequence(
            lambda: layers.ReversibleEmbedding(9, 3), (5,), below=9, apply=lambda la, xs: la(la(xs[0]), reverse=True)
        ),
        "Identity": Case(layers.Identity),
        "InputLayer": Case(layers.Identity, note="every model here begins with one"),
        "Lambda": Case(lambda: layers.Lambda(lambda x: x * x)),
        "Layer": Case(Weighted, note="a subclass with a weight"),
        "Masking": sequence(lambda: layers.LSTM(3), apply=masked),
        "Wrapper": Case(lambda: _Wrapped(layers.Dense(3)), note="a subclass"),
        "ELU": Case(layers.ELU),
        "LeakyReLU": Case(layers.LeakyReLU),
        "PReLU": Case(lambda: layers.PReLU("uniform")),
        "ReLU": Case(layers.ReLU),
        "Softmax": Case(layers.Softmax),
        "Flatten": sequence(layers.Flatten),
        "Permute": sequence(lambda: layers.Permute((2, 1))),
        "RepeatVector": Case(lambda: layers.RepeatVector(3)),
        "Reshape": Case(lambda: layers.Reshape((2, 3))),
        "Concatenate": pair(layers.Concatenate),
        "Dot": pair(lambda: layers.Dot(axes=2, normalize=True)),
        "FlaxLayer": Case(lambda: layers.FlaxLayer(None), missing="JAX or TensorFlow"),
        "JaxLayer": Case(lambda: layers.JaxLayer(lambda x: x), missing="JAX or TensorFlow"),
        "TFSMLayer": Case(lambda: layers.TFSMLayer("model"), missing="TensorFlow"),
        "TorchModuleWrapper": Case(lambda: layers.TorchModuleWrapper(_module(), output_shape=(None, 4))),
        "TorchModuleWrapper (buffers)": Case(
            lambda: layers.TorchModuleWrapper(torch.nn.BatchNorm1d(6), output_shape=(None, 6)),
            refused=r"TorchModule.*has buffers.*wrap that",
        ),
        "TorchModuleWrapper (dropout)": Case(
            lambda: layers.TorchModuleWrapper(torch.nn.Dropout(0.5), output_shape=(None, 6)),
            refused=r"draws at random.*keras.layers",
        ),
    }
    for name in ("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract"):
        cases[name] = pair(getattr(layers, name))
    return cases


def _preprocessing() -> dict[str, Case]:
    """Layers that prepare inputs."""
    text = {"missing": TENSORFLOW, "note": "look strings up in the data set, before `fit`"}
    return {
        "CategoryEncoding": sequence(lambda: layers.CategoryEncoding(9), (5,), below=9),
        "CategoryEncoding (counts)": sequence(lambda: layers.CategoryEncoding(9, output_mode="count"), (5,), below=9),
        "Discretization": Case(lambda: layers.Discretization([0.2, 0.6]), weighted=False),
        "HashedCrossing": Case(lambda: layers.HashedCrossing(5), missing=TENSORFLOW),
        "Hashing": Case(lambda: layers.Hashing(5), missing=TENSORFLOW),
        "IntegerLookup": Case(lambda: layers.IntegerLookup(vocabulary=[1, 2, 3]), below=9, missing=TENSORFLOW),
        "StringLookup": Case(lambda: layers.StringLookup(vocabulary=["a"]), **text),
        "TextVectorization": Case(layers.TextVectorization, **text),
        "MelSpectrogram": sequence(
            lambda: layers.MelSpectrogram(64, 32, sampling_rate=1000, num_mel_bins=8), (256,), tolerance=1e-4
        ),
        "STFTSpectrogram": sequence(lambda: layers.STFTSpectrogram("magnitude", 32, 16), (128, 1), tolerance=1e-4),
        "Rescaling": Case(lambda: layers.Rescaling(2.0, 1.0)),
    }


def _images() -> dict[str, Case]:
    """Image augmentation."""
    unit = UNIT
    return {
        "AugMix": image(lambda: layers.AugMix(**unit), weighted=False),
        "AutoContrast": image(lambda: layers.AutoContrast(value_range=(0, 1))),
        "CenterCrop": image(lambda: layers.CenterCrop(4, 4)),
        "ContrastLimitedAdaptiveHistogramEqualization": image(
            lambda: layers.ContrastLimitedAdaptiveHistogramEqualization(value_range=(0, 1), tile_grid_size=(2, 2)),
            weighted=False,
        ),
        "CutMix": image(lambda: layers.CutMix(seed=5), refused=MIXES),
        "Equalization": image(
            lambda: layers.Equalization(value_range=(0, 1)), weighted=False, apply=lambda la, xs: Within(la)(xs[0])
        ),
        "MaxNumBoundingBoxes": image(lambda: layers.MaxNumBoundingBoxes(3), note="leaves images as they are"),
        "MixUp": image(lambda: layers.MixUp(seed=5), refused=MIXES),
        "Pipeline": image(
            lambda: layers.Pipeline([layers.RandomFlip(seed=5), layers.RandomContrast(0.4, **unit | {"seed": 6})])
        ),
        "RandAugment": image(lambda: layers.RandAugment(**unit), weighted=False),
        "RandomBrightness": image(lambda: layers.RandomBrightness(0.4, **unit)),
        "RandomColorDegeneration": image(lambda: layers.RandomColorDegeneration(0.4, **unit)),
        "RandomColorJitter": image(
            lambda: layers.RandomColorJitter((0, 1), 0.3, 0.3, (0.2, 0.8), 0.3, seed=5), weighted=False
        ),
        "RandomContrast": image(lambda: layers.RandomContrast(0.4, **unit)),
        "RandomCrop": image(
            lambda: layers.RandomCrop(4, 4, seed=5), apply=lambda la, xs: layers.GlobalAveragePooling2D()(la(xs[0]))
        ),
        "RandomElasticTransform": image(
            lambda: layers.RandomElasticTransform(**unit),
            against=1,
            note="as fastdp on one device: Keras on torch ignores the seed",
        ),
        "RandomErasing": image(lambda: layers.RandomErasing(**unit)),
        "RandomFlip": image(lambda: layers.RandomFlip(seed=5)),
        "RandomGaussianBlur": image(lambda: layers.RandomGaussianBlur(**unit)),
        "RandomGrayscale": image(lambda: layers.RandomGrayscale(seed=5)),
        "RandomHue": image(lambda: layers.RandomHue(0.4, **unit), weighted=False),
        "RandomInvert": image(lambda: layers.RandomInvert(0.5, **unit)),
        "RandomPerspective": image(lambda: layers.RandomPerspective(seed=5)),
        "RandomPosterization": image(lambda: layers.RandomPosterization(4, **unit), weighted=False),
        "RandomRotation": image(lambda: layers.RandomRotation(0.3, seed=5)),
        "RandomSaturation": image(lambda: layers.RandomSaturation((0.2, 0.8), **unit), weighted=False),
        "RandomSharpness": image(lambda: layers.RandomSharpness(0.4, **unit)),
        "RandomShear": image(lambda: layers.RandomShear(0.3, 0.3, seed=5)),
        "RandomTranslation": image(lambda: layers.RandomTranslation(0.3, 0.3, seed=5)),
        "RandomZoom": image(lambda: layers.RandomZoom(0.3, seed=5)),
        "Resizing": image(lambda: layers.Resizing(5, 5)),
        "Solarization": image(lambda: layers.Solarization(0.2, 0.4, **unit), weighted=False),
    }


class _Wrapped(layers.Wrapper):
    """The least of a wrapper."""

    def call(self, inputs: Any) -> Any:
        return self.layer(inputs)


def _quantized(layer: Any, shape: Any) -> Any:
    layer.build(shape)
    layer.quantize("int8")
    return layer


def _module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))


CASES: dict[str, Case] = {
    **_core(),
    **_recurrent(),
    **_convolutions(),
    **_attention(),
    **_normalization(),
    **_pooling(),
    **_preprocessing(),
    **_images(),
}


def public_layers() -> dict[str, list[str]]:
    """The names of each public class of `keras.layers`, the class's own first."""
    found: dict[Any, list[str]] = {}
    for name, value in vars(layers).items():
        if inspect.isclass(value) and issubclass(value, layers.Layer):
            found.setdefault(value, []).append(name)
    found_pipeline = getattr(layers, "Pipeline", None)
    if found_pipeline is not None and found_pipeline not in found:
        found[found_pipeline] = ["Pipeline"]
    own = {cls: cls.__name__ if cls.__name__ in names else names[0] for cls, names in found.items()}
    return {own[cls]: sorted(set(names) - {own[cls]}) for cls, names in found.items()}


def of_layer(name: str) -> str:
    """The class that a case is about."""
    return name.split(" (")[0]


def verdict(case: Case) -> str:
    """What the page says of a case."""
    if case.missing:
        return f"not on torch: needs {case.missing}"
    return "error when wrapping" if case.refused else "as one device"


def page() -> str:
    """docs/layers.md."""
    lines = [
        "# Every layer of Keras",
        "",
        f"Each public layer of Keras {keras.__version__} in a small model, trained for two steps of 7 rows by plain",
        'Keras and by fastdp on 3 virtual devices (3, 2 and 2 rows). "As one device": losses, trained weights, other',
        "variables (moving statistics, seeds) and predictions are equal to 2e-5 (spectrograms: 1e-4); random layers",
        "with a seed see the same draws. `make layers` writes this page, `tests/keras/test_every_layer.py` tests it.",
        "",
        "| layer | result | remark |",
        "|---|---|---|",
    ]
    others = public_layers()
    for name in sorted(CASES, key=str.lower):
        case = CASES[name]
        remarks = [case.note] if case.note else []
        if others.get(name):
            remarks.append("also " + ", ".join(f"`{other}`" for other in others[name]))
        lines.append(f"| {name} | {verdict(case)} | {'; '.join(remarks)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
