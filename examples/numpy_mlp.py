"""A network in plain NumPy, gradients written by hand, trained on one device and on four.

    python examples/numpy_mlp.py

The engine needs neither torch nor Keras: a program is three functions over named arrays. `train` returns the
mean loss of its rows and the gradient; the engine computes their weighted sum over the devices.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits

import fastdp

Arrays = dict[str, np.ndarray]
RATE, MOMENTUM = 0.1, 0.9


def initial(generator: np.random.Generator) -> Arrays:
    """64-64-10, He's initialization."""
    return {
        "w1": generator.normal(0, np.sqrt(2 / 64), (64, 64)),
        "b1": np.zeros(64),
        "w2": generator.normal(0, np.sqrt(2 / 64), (64, 10)),
        "b2": np.zeros(10),
    }


def forward(weights: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden activations and the probabilities of the ten classes."""
    hidden = np.maximum(x @ weights["w1"] + weights["b1"], 0)
    scores = hidden @ weights["w2"] + weights["b2"]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, scores / scores.sum(axis=1, keepdims=True)


def train(weights: Arrays, batch: list[np.ndarray]) -> tuple[float, Arrays, list[np.ndarray]]:
    """The mean cross-entropy of the rows, its gradient, and the probabilities."""
    x, y = batch
    hidden, probabilities = forward(weights, x)
    rows = np.arange(len(y))
    loss = -np.log(probabilities[rows, y]).mean()
    scores = probabilities.copy()
    scores[rows, y] -= 1
    scores /= len(y)
    back = (scores @ weights["w2"].T) * (hidden > 0)
    gradients = {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ scores, "b2": scores.sum(0)}
    return float(loss), gradients, [probabilities]


def update(weights: Arrays, slots: Arrays, gradients: Arrays) -> tuple[Arrays, Arrays]:
    """SGD with momentum; runs on every device, on the gradient of the global batch."""
    velocity = {name: MOMENTUM * slots[name] - RATE * gradients[name] for name in weights}
    return {name: weights[name] + velocity[name] for name in weights}, velocity


def predict(weights: Arrays, batch: list[np.ndarray]) -> list[np.ndarray]:
    """The probabilities."""
    return [forward(weights, batch[0])[1]]


def run(devices: int, epochs: int, batch_size: int) -> tuple[list[float], float]:
    """The mean loss of each epoch, and the accuracy on test rows."""
    generator = np.random.default_rng(0)
    weights = initial(generator)
    program = fastdp.FunctionProgram(
        weights, train, update, predict, slots={name: np.zeros_like(value) for name, value in weights.items()}
    )
    engine = fastdp.DataParallel(program, devices)
    digits = load_digits()
    order = generator.permutation(len(digits.target))
    x, y = digits.data[order] / 16, digits.target[order]
    x, y, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]
    losses = []
    for _ in range(epochs):
        order = generator.permutation(len(x))
        total = 0.0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            total += float(engine.train([x[rows], y[rows]], wants_outputs=False).sums[0]) * len(rows)
        losses.append(total / len(x))
    (probabilities,) = engine.predict([x_test]).outputs
    return losses, float((probabilities.argmax(axis=1) == y_test).mean())


def main() -> None:
    """Train on one device and on several, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=50)
    options = parser.parse_args()
    fastdp.set_virtual_devices(options.devices)
    one, accuracy_of_one = run(1, options.epochs, options.batch_size)
    several, accuracy = run(options.devices, options.epochs, options.batch_size)
    print(f"epoch  loss on 1 device  on {options.devices} devices  difference")
    for epoch, (a, b) in enumerate(zip(one, several, strict=True), 1):
        print(f"{epoch:5}  {a:16.12f}  {b:12.12f}  {abs(a - b):10.1e}")
    print(f"accuracy on 1 device {accuracy_of_one:.4f}, on {options.devices} devices {accuracy:.4f}")


if __name__ == "__main__":
    main()
