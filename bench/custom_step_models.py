"""Small models with training steps of their own, as their users write them: what `bench/custom_steps.py` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch

L, ops = keras.layers, keras.ops


class Tiny(keras.Model):
    """A `train_step` as in Keras's guide, around two small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = keras.Sequential([L.Dense(32, "relu"), L.Dense(1)])
        self.loss_tracker = keras.metrics.Mean("loss")

    def call(self, inputs: Any) -> Any:
        """The body's outputs."""
        return self.body(inputs)

    def train_step(self, data: Any) -> Any:
        """One step."""
        x, y = data
        self.zero_grad()
        loss = ops.mean(ops.square(self(x, training=True) - y))
        loss.backward()
        update(self)
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


class Siamese(Tiny):
    """Two calls of one encoder, and a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.Sequential(
            [L.Conv2D(16, 3, activation="relu"), L.MaxPooling2D(), L.Flatten(), L.Dense(32)]
        )

    def call(self, inputs: Any) -> Any:
        """Distances of pairs."""
        left, right = inputs
        return ops.sqrt(ops.sum(ops.square(self.encoder(left) - self.encoder(right)), axis=1) + 1e-6)

    def train_step(self, data: Any) -> Any:
        """One step."""
        (left, right), same = data
        self.zero_grad()
        a, b = self.encoder(left, training=True), self.encoder(right, training=True)
        distance = ops.sqrt(ops.sum(ops.square(a - b), axis=1) + 1e-6)
        loss = ops.mean(same * distance**2 + (1 - same) * ops.maximum(1.0 - distance, 0.0) ** 2)
        loss.backward()
        update(self)
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


class GradientPenalty(Tiny):
    """A critic with the gradient penalty of WGAN-GP: a gradient of a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = keras.Sequential(
            [
                L.Conv2D(16, 3, strides=2),
                L.LeakyReLU(),
                L.Conv2D(32, 3, strides=2),
                L.LeakyReLU(),
                L.Flatten(),
                L.Dense(1),
            ]
        )

    def call(self, inputs: Any) -> Any:
        """Scores."""
        return self.critic(inputs)

    def train_step(self, data: Any) -> Any:
        """One step of the critic."""
        real, fake = data
        self.zero_grad()
        between = (0.3 * real + 0.7 * fake).detach().requires_grad_()
        scores = self.critic(between, training=True)
        (slope,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1.0) ** 2).mean()
        loss = self.critic(fake, training=True).mean() - self.critic(real, training=True).mean() + 10.0 * penalty
        loss.backward()
        update(self)
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


class Distiller(Tiny):
    """A student that learns from a teacher's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = (
            keras.Sequential([L.Conv2D(size, 3, activation="relu"), L.MaxPooling2D(), L.Flatten(), L.Dense(10)])
            for size in (32, 8)
        )
        self.teacher.trainable = False

    def call(self, inputs: Any) -> Any:
        """The student's outputs; the teacher is built as well."""
        return self.student(inputs) + 0.0 * self.teacher(inputs)

    def train_step(self, data: Any) -> Any:
        """One step of the student."""
        x, y = data
        with torch.no_grad():
            soft = ops.softmax(self.teacher(x, training=False) / 4.0)
        self.zero_grad()
        found = self.student(x, training=True)
        hard = ops.mean(keras.losses.sparse_categorical_crossentropy(y, found, from_logits=True))
        loss = 0.1 * hard + 0.9 * ops.mean(ops.categorical_crossentropy(soft, ops.softmax(found / 4.0)))
        loss.backward()
        update(self)
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


class GraphAttention(L.Layer):
    """Attention of each node to all nodes of the batch: rows that meet."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.values, self.score = L.Dense(units), L.Dense(1)

    def build(self, shape: Any) -> None:
        """Build both layers."""
        self.values.build(shape)
        self.score.build((*shape[:-1], self.values.units))

    def call(self, inputs: Any) -> Any:
        """A weighted mean of all nodes for each."""
        values = self.values(inputs)
        scores = self.score(values)
        weights = ops.softmax(ops.leaky_relu(scores + ops.transpose(scores)), axis=-1)
        return ops.relu(ops.matmul(weights, values))


class MaskedConv(L.Layer):
    """The masked convolution of PixelCNN."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.conv = L.Conv2D(filters, 7, padding="same")

    def build(self, shape: Any) -> None:
        """Build the kernel and its mask."""
        self.conv.build(shape)
        mask = np.zeros(self.conv.kernel.shape, "float32")
        mask[:3], mask[3, :3] = 1.0, 1.0
        self.mask = mask

    def call(self, inputs: Any) -> Any:
        """Convolve with the masked kernel."""
        self.conv.kernel.assign(self.conv.kernel * self.mask)
        return self.conv(inputs)


def update(model: keras.Model) -> None:
    """The end of a `train_step`, as in Keras's guide for torch."""
    variables = list(model.trainable_weights)
    with torch.no_grad():
        model.optimizer.apply([v.value.grad for v in variables], variables)


def _gat() -> keras.Model:
    inputs = keras.Input((64,))
    x = GraphAttention(64)(inputs)
    return keras.Model(inputs, L.Dense(7)(GraphAttention(64)(x)))


def _pixels() -> keras.Model:
    inputs = keras.Input((16, 16, 1))
    x = MaskedConv(16)(inputs)
    for _ in range(2):
        x = L.add([x, L.Conv2D(16, 1, activation="relu")(x)])
    return keras.Model(inputs, L.Conv2D(1, 1, activation="sigmoid")(x))


def _own(make: Callable[[], keras.Model], *examples: Any) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        model = make()
        model(examples[0] if len(examples) == 1 else list(examples))
        return model

    return build


_IMAGE = np.zeros((2, 28, 28, 1), "float32")
CASES: dict[str, tuple[Callable[[], keras.Model], Any, int, int]] = {
    # build, loss (None: a train_step of its own), rows, features of the batch by `batches`
    "tiny": (_own(Tiny, np.zeros((2, 16), "float32")), None, 32, 16),
    "siamese": (_own(Siamese, _IMAGE, _IMAGE), None, 16, 0),
    "penalty": (_own(GradientPenalty, _IMAGE), None, 64, 0),
    "distillation": (_own(Distiller, _IMAGE), None, 64, 0),
    "gat": (_gat, "sparse", 512, 64),
    "pixelcnn": (_pixels, "binary_crossentropy", 64, 0),
}


def batches(name: str, count: int) -> Iterator[tuple[Any, Any]]:
    """Batches for a case, the same each time: (inputs, targets)."""
    generator = np.random.default_rng(0)
    _, _, rows, features = CASES[name]

    def images(size: int = 28) -> np.ndarray:
        return generator.random((rows, size, size, 1), dtype="float32")

    for _ in range(count):
        if name == "tiny":
            yield generator.random((rows, features), dtype="float32"), generator.random((rows, 1), dtype="float32")
        elif name == "siamese":
            yield (images(), images()), generator.integers(0, 2, rows).astype("float32")
        elif name == "penalty":
            yield images(), images()
        elif name == "distillation":
            yield images(), generator.integers(0, 10, rows)
        elif name == "gat":
            yield generator.random((rows, features), dtype="float32"), generator.integers(0, 7, rows)
        else:
            x = (images(16) > 0.5).astype("float32")
            yield x, x


def built(name: str) -> keras.Model:
    """A compiled model of a case, the same each time."""
    keras.utils.set_random_seed(0)
    build, loss, _, _ = CASES[name]
    model = build()
    chosen = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss == "sparse" else loss
    model.compile(keras.optimizers.Adam(1e-3), chosen)
    return model
