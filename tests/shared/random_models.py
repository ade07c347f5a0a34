"""Models that nobody wrote: random graphs of Keras's layers, operations and small layers of a user's kind, by a seed.

`functional(seed)` gives a graph whose every part keeps rows apart, or says by `add_loss` and assigned variables what it
does with them, so that several devices have to equal one. `own_step(seed)` is a model that trains by a step of its own,
with random calls of its parts in it. All numbers are float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

CLASSES = 3
# What a model is fed, by the kind of its input: shape of a row, and below which number integers lie.
INPUTS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "vector": ((6,), None),
    "sequence": ((5, 4), None),
    "image": ((6, 6, 2), None),
    "tokens": ((5,), 9),
}

Tensor = Any
Part = Callable[[random.Random], Callable[..., Tensor]]


class Noise(layers.Layer):
    """Adds noise in training: by row, without a seed of its own."""

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        if not training:
            return inputs
        return inputs + 0.1 * keras.random.normal(ops.shape(inputs), dtype=inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class Scale(layers.Layer):
    """One number for each feature, drawn without a seed: the same for all rows."""

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        if not training:
            return inputs
        return inputs * (1.0 + 0.1 * keras.random.uniform((inputs.shape[-1],), dtype=inputs.dtype))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class Statistics(layers.Layer):
    """Keeps a running mean, a sum over rows and a count of calls, and adds a loss that is a mean or a sum over rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def build(self, input_shape: Any) -> None:
        self.average = self.add_weight(shape=(), initializer="zeros", trainable=False, name="average")
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False, name="total")
        self.calls = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="calls")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        if training:
            self.average.assign(0.9 * self.average + 0.1 * ops.mean(inputs))
            self.total.assign_add(ops.sum(ops.square(inputs)))
            self.calls.assign_add(1)
            reduced = ops.mean if self.kind == "mean" else ops.sum
            self.add_loss(0.01 * reduced(ops.square(inputs)))
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class Gate(layers.Layer):
    """A nested layer that is called twice, and a weight that is only used in training."""

    def build(self, input_shape: Any) -> None:
        self.inner = layers.Dense(input_shape[-1], "tanh")
        self.inner.build(input_shape)
        self.bias = self.add_weight(shape=(input_shape[-1],), initializer="normal", name="bias")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        out = self.inner(self.inner(inputs))
        return out + self.bias if training else out

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


def _regularized(rng: random.Random) -> dict[str, Any]:
    return rng.choice([{}, {}, {"kernel_regularizer": "l2"}, {"activity_regularizer": "l2"}])


def _seed(rng: random.Random) -> int:
    return rng.randrange(1000)


# By rank of what it is given (rows counted): the parts that fit.
ANY_RANK: list[Part] = [
    lambda r: layers.Dropout(0.3, seed=_seed(r)),
    lambda r: layers.GaussianNoise(0.1, seed=_seed(r)),
    lambda r: layers.GaussianDropout(0.2, seed=_seed(r)),
    lambda r: layers.AlphaDropout(0.2, seed=_seed(r)),
    lambda r: layers.Activation(r.choice(["tanh", "gelu", "softplus", "silu", "elu"])),
    lambda r: layers.LayerNormalization(),
    lambda r: layers.BatchNormalization(momentum=r.choice([0.5, 0.99])),
    lambda r: layers.Dense(r.choice([3, 4]), r.choice([None, "tanh"]), **_regularized(r)),
    lambda r: layers.ActivityRegularization(l2=0.01),
    lambda r: layers.Rescaling(0.5, 0.1),
    lambda r: Noise(),
    lambda r: Scale(),
    lambda r: Statistics(r.choice(["mean", "sum"])),
    lambda r: Gate(),
    lambda r: ops.tanh,
    lambda r: lambda x: x * 0.5 + 1.0,
    lambda r: lambda x: ops.concatenate([x, ops.sin(x)], axis=-1),
    lambda r: lambda x: x - ops.mean(x, axis=-1, keepdims=True),
]
BY_RANK: dict[int, list[Part]] = {
    2: [
        lambda r: layers.RepeatVector(3),
        lambda r: layers.UnitNormalization(),
        lambda r: lambda x: layers.Reshape((x.shape[-1], 1))(x),
    ],
    3: [
        lambda r: layers.LSTM(3, return_sequences=r.random() < 0.5),
        lambda r: layers.GRU(3, dropout=0.2, recurrent_dropout=0.2, seed=_seed(r)),
        lambda r: layers.SimpleRNN(3),
        lambda r: layers.Bidirectional(layers.LSTM(2, return_sequences=True)),
        lambda r: layers.Conv1D(3, 2, padding="same"),
        lambda r: layers.SpatialDropout1D(0.3, seed=_seed(r)),
        lambda r: layers.GlobalAveragePooling1D(),
        lambda r: layers.TimeDistributed(layers.Dense(3)),
        lambda r: lambda x: layers.MultiHeadAttention(2, 2, dropout=0.2, seed=_seed(r))(x, x),
        lambda r: lambda x: layers.Attention()([x, x]),
        lambda r: layers.Permute((2, 1)),
        lambda r: layers.Flatten(),
        lambda r: lambda x: ops.matmul(x, ops.transpose(x, (0, 2, 1))),
        lambda r: lambda x: ops.max(x, axis=1),
    ],
    4: [
        lambda r: layers.Conv2D(3, 3, padding="same", **_regularized(r)),
        lambda r: layers.SeparableConv2D(3, 3, padding="same"),
        lambda r: layers.DepthwiseConv2D(3, padding="same"),
        lambda r: layers.MaxPooling2D(2, padding="same"),
        lambda r: layers.AveragePooling2D(2, padding="same"),
        lambda r: layers.GroupNormalization(1),
        lambda r: layers.SpatialDropout2D(0.3, seed=_seed(r)),
        lambda r: layers.GlobalAveragePooling2D(),
        lambda r: layers.RandomFlip(seed=_seed(r)),
        lambda r: layers.Flatten(),
    ],
}
MERGES: list[Part] = [
    lambda r: layers.Add(),
    lambda r: layers.Multiply(),
    lambda r: layers.Average(),
    lambda r: layers.Concatenate(),
    lambda r: layers.Maximum(),
    lambda r: lambda pair: pair[0] * ops.sigmoid(pair[1]),
]


def _grown(rng: random.Random, tensor: Tensor, parts: int) -> Tensor:
    """A random graph above `tensor`: chains, branches that meet again, parts that are used twice."""
    made: list[Tensor] = [tensor]
    used: list[tuple[Any, Any]] = []
    for _ in range(parts):
        below = made[-1] if rng.random() < 0.7 else rng.choice(made)
        twins = [other for other in made if other is not below and other.shape == below.shape]
        again = [part for part, shape in used if shape == below.shape]
        if twins and rng.random() < 0.3:
            made.append(rng.choice(MERGES)(rng)([below, rng.choice(twins)]))
        elif again and rng.random() < 0.2:
            made.append(rng.choice(again)(below))
        else:
            part = rng.choice([*ANY_RANK, *BY_RANK[len(below.shape)] * 2])(rng)
            made.append(part(below))
            if isinstance(part, layers.Layer):
                used.append((part, below.shape))
    return made[-1]


def _input(rng: random.Random) -> tuple[str, Tensor, Tensor]:
    """The kind of an input, the input itself, and a float tensor above it."""
    kind = rng.choice(list(INPUTS))
    shape, below = INPUTS[kind]
    tensor = keras.Input(shape, dtype="int32" if below else "float64")
    return kind, tensor, layers.Embedding(below, 3, mask_zero=rng.random() < 0.5)(tensor) if below else tensor


def _flat(tensor: Tensor) -> Tensor:
    return tensor if len(tensor.shape) == 2 else layers.Flatten()(tensor)


def functional(seed: int) -> tuple[keras.Model, list[str]]:
    """A random model of one to six parts with one or two outputs, and the kinds of its inputs."""
    rng = random.Random(seed)
    given = [_input(rng) for _ in range(rng.choice([1, 1, 2]))]
    grown = [_flat(_grown(rng, tensor, rng.randint(1, 5))) for _, _, tensor in given]
    joined = grown[0] if len(grown) == 1 else layers.Concatenate()(grown)
    if rng.random() < 0.5:
        joined = _flat(_grown(rng, joined, rng.randint(1, 2)))
    outputs = [layers.Dense(CLASSES, name=f"head_{i}")(joined) for i in range(rng.choice([1, 1, 2]))]
    inputs = [tensor for _, tensor, _ in given]
    model = keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs if len(outputs) > 1 else outputs[0])
    return model, [kind for kind, _, _ in given]


def batch(kinds: list[str], outputs: int, rows: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Inputs and targets of so many rows."""
    x = []
    for kind in kinds:
        shape, below = INPUTS[kind]
        values = rng.normal(size=(rows, *shape)) if below is None else rng.integers(0, below, (rows, *shape))
        x.append(values if below is None else values.astype("int32"))
    y = [rng.normal(size=(rows, CLASSES)) for _ in range(outputs)]
    return (x if len(x) > 1 else x[0]), (y if len(y) > 1 else y[0])


class OwnStep(keras.Model):
    """Trains a random graph by a step of its own, made of random pieces: which, the seed says.

    `encoder` and `head` are sub-models. A step calls them together or apart, on the whole batch or on part of it, in
    training or in inference, once or twice, with or without `add_loss`, and updates all weights or those of one.
    """

    PIECES = ("plain", "consistency", "parts", "half", "frozen", "inference", "penalty", "two_losses")

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.kind, tensor, floats = _input(rng)
        self.encoder = keras.Model(tensor, layers.Dense(4)(_flat(_grown(rng, floats, rng.randint(1, 4)))))
        inner = keras.Input((4,), dtype="float64")
        self.head = keras.Model(inner, layers.Dense(CLASSES)(_flat(_grown(rng, inner, rng.randint(0, 2)))))
        self.pieces = [rng.choice(self.PIECES) for _ in range(rng.randint(1, 3))]

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        return self.head(self.encoder(inputs, training=training), training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = (ops.convert_to_tensor(part) for part in keras.utils.unpack_x_y_sample_weight(data)[:2])
        self.zero_grad()
        losses = [getattr(self, f"_{piece}")(x, y) for piece in self.pieces]
        loss = sum(losses[1:], losses[0])
        if self.losses:
            loss = loss + ops.sum(ops.stack([ops.sum(term) for term in self.losses]))
        loss.backward()
        trained = self.head if "frozen" in self.pieces else self
        variables = [v for v in trained.trainable_variables if v.value.grad is not None]
        self.optimizer.apply([v.value.grad for v in variables], variables)
        return {"loss": loss.detach(), **{f"loss_{i}": one.detach() for i, one in enumerate(losses)}}

    def _plain(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.mean(ops.square(self(x, training=True) - y))

    def _consistency(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self(x, training=True), self(x, training=True)
        return ops.mean(ops.square(first - second)) + ops.mean(ops.square(first - y))

    def _parts(self, x: Tensor, y: Tensor) -> Tensor:
        code = self.encoder(x, training=True)
        return ops.mean(ops.abs(self.head(ops.tanh(code), training=True) - y)) + 0.1 * ops.mean(ops.square(code))

    def _half(self, x: Tensor, y: Tensor) -> Tensor:
        half = max(1, x.shape[0] // 2)
        return ops.sum(ops.square(self(x[:half], training=True) - y[:half])) / x.shape[0]

    def _frozen(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.mean(ops.square(self.head(self.encoder(x, training=False).detach(), training=True) - y))

    def _inference(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.mean(ops.square(self(x, training=False) - y))

    def _penalty(self, x: Tensor, y: Tensor) -> Tensor:
        out = self(x, training=True)
        gram = ops.matmul(out, ops.transpose(out))  # across rows, outside of any layer
        return 0.01 * ops.mean(ops.square(gram)) + ops.mean(ops.square(out - y))

    def _two_losses(self, x: Tensor, y: Tensor) -> Tensor:
        out = self(x, training=True)
        return ops.mean(ops.square(out - y)) + 0.1 * ops.mean(ops.abs(out))


def own_step(seed: int) -> tuple[keras.Model, list[str]]:
    """A model with a step of its own, and the kinds of its inputs."""
    model = OwnStep(seed)
    x, _ = batch([model.kind], 1, 2, np.random.default_rng(0))
    model(keras.ops.convert_to_tensor(x))
    return model, [model.kind]
