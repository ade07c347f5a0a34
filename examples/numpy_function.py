"""A model of one's own in NumPy or CuPy, without torch and Keras, on several devices: softmax regression.

    python examples/numpy_function.py                        # four virtual devices, NumPy
    python examples/numpy_function.py --devices 2 --epochs 5

The functions use the library of their arrays, NumPy or CuPy, so the same lines serve both. They get the rows of one
device. `train` returns the mean loss of those rows and its gradient; fastdp computes their weighted sum, so that the
result is the mean over the global batch for any split.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import fastdp

try:
    from cupy import get_array_module
except ImportError:  # a machine without GPUs

    def get_array_module(*_: Any) -> Any:
        """The library of these arrays."""
        return np


CLASSES, WAVES, RATE, MOMENTUM = 4, 64, 0.5, 0.9


def features(x: Any, frequencies: Any) -> Any:
    """Cosines and sines of the rows' projections: a random approximation of a Gaussian kernel."""
    xp = get_array_module(x)
    angles = x @ frequencies
    return xp.concatenate([xp.cos(angles), xp.sin(angles)], axis=1) / np.sqrt(WAVES)


def probabilities(parameters: dict[str, Any], x: Any) -> tuple[Any, Any]:
    """The features of the rows and the probabilities of their classes."""
    xp = get_array_module(x)
    seen = features(x, parameters["frequencies"])
    scores = seen @ parameters["weights"] + parameters["bias"]
    scores = xp.exp(scores - scores.max(axis=1, keepdims=True))
    return seen, scores / scores.sum(axis=1, keepdims=True)


def train(parameters: dict[str, Any], batch: list[Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    """The mean cross-entropy of the rows, its gradient, and the probabilities."""
    x, y = batch
    xp = get_array_module(x)
    seen, predicted = probabilities(parameters, x)
    rows = xp.arange(len(y))
    loss = -xp.log(predicted[rows, y] + 1e-12).mean()
    error = predicted.copy()
    error[rows, y] -= 1
    error /= len(y)
    gradients = {
        "weights": seen.T @ error,
        "bias": error.sum(axis=0),
        "frequencies": xp.zeros_like(parameters["frequencies"]),  # drawn once, and not trained
    }
    return loss, gradients, [predicted]


def update(parameters: dict[str, Any], slots: dict[str, Any], gradients: dict[str, Any]) -> tuple[Any, Any]:
    """SGD with momentum, from the gradient of the global batch. Parameters that are not returned stay unchanged."""
    velocity = {name: MOMENTUM * slots[name] - RATE * gradients[name] for name in slots}
    return {name: parameters[name] + velocity[name] for name in slots}, velocity


def predict(parameters: dict[str, Any], batch: list[Any]) -> list[Any]:
    """The probabilities."""
    return [probabilities(parameters, batch[0])[1]]


def spirals(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points on four interleaved spirals, and the number of each point's spiral."""
    y = generator.integers(0, CLASSES, rows)
    radius = generator.uniform(0.2, 2.0, rows)
    angle = 2 * radius + y * 2 * np.pi / CLASSES + generator.normal(0, 0.1, rows)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), y


def run(devices: int, epochs: int, batch_size: int) -> tuple[list[float], float]:
    """The mean loss of each epoch, and the accuracy on test rows."""
    generator = np.random.default_rng(0)
    parameters = {
        "frequencies": generator.normal(0, 2, (2, WAVES)),
        "weights": np.zeros((2 * WAVES, CLASSES)),
        "bias": np.zeros(CLASSES),
    }
    slots = {name: np.zeros_like(parameters[name]) for name in ("weights", "bias")}
    program = fastdp.FunctionProgram(parameters, train, update, predict, slots=slots)
    engine = fastdp.DataParallel(program, devices)
    x, y = spirals(3000, generator)
    losses = []
    for _ in range(epochs):
        order = generator.permutation(len(x))
        batches = [order[start : start + batch_size] for start in range(0, len(x), batch_size)]
        total = sum(float(engine.train([x[b], y[b]], wants_outputs=False).sums[0]) * len(b) for b in batches)
        losses.append(total / len(x))
    x_test, y_test = spirals(1000, generator)
    (predicted,) = engine.predict([x_test]).outputs
    return losses, float((predicted.argmax(axis=1) == y_test).mean())


def main() -> None:
    """Train on one device and on several, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=70, help="global: each device gets its share")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)
    one, accuracy_of_one = run(1, options.epochs, options.batch_size)
    several, accuracy = run(options.devices, options.epochs, options.batch_size)
    print(f"loss on 1 device: {one[0]:.6f} -> {one[-1]:.12f}, accuracy {accuracy_of_one:.3f}")
    print(f"loss on {options.devices} devices: {several[0]:.6f} -> {several[-1]:.12f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
