"""A training loop in CuPy alone, without torch and Keras, on all GPUs: a small language model of letters.

    python examples/cupy_language_model.py                    # all GPUs; without any: virtual devices, and NumPy
    python examples/cupy_language_model.py --devices 2 --epochs 20 --folder run

What a loop on one GPU has stays: embeddings, a hidden layer, the gradient by hand, AdamW with warm-up and cosine
decay, an evaluation after each epoch; killed, the same command goes on where it was. Two things change. `train` and
`update` take the library of their arrays as `xp`, and the loop calls `engine.train` for them. On GPUs they run on each
device, where CuPy's current stream is the device's: kernels of your own go there too. Products of matrices need cuBLAS,
which comes with `pip install 'cupy-cuda13x[ctk]'`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import fastdp

try:
    import cupy
except ImportError:  # a machine without GPUs
    cupy = None

LETTERS = " abcdefghijklmnopqrstuvwxyz."
CONTEXT, WIDTH, HIDDEN = 6, 8, 64
RATE, WARM_UP, DECAY, FIRST, SECOND = 2e-3, 20, 0.01, 0.9, 0.999

Arrays = dict[str, Any]


def library(array: Any) -> Any:
    """CuPy for its arrays, NumPy for others: virtual devices have NumPy's even where CuPy is installed."""
    return np if cupy is None else cupy.get_array_module(array)


def forward(parameters: Arrays, contexts: Any) -> tuple[Any, Any, Any]:
    """The embedded letters (rows, CONTEXT * WIDTH), the hidden layer, and the next letter's log-probabilities."""
    xp = library(contexts)
    seen = parameters["letters"][contexts].reshape(len(contexts), -1)
    hidden = xp.tanh(seen @ parameters["in"] + parameters["in_bias"])
    scores = hidden @ parameters["out"] + parameters["out_bias"]
    scores = scores - scores.max(axis=1, keepdims=True)
    return seen, hidden, scores - xp.log(xp.exp(scores).sum(axis=1, keepdims=True))


def train(parameters: Arrays, batch: list[Any]) -> tuple[Any, Arrays, list[Any]]:
    """The mean cross-entropy of one device's rows and its gradient; no outputs."""
    contexts, targets = batch
    xp = library(contexts)
    seen, hidden, logs = forward(parameters, contexts)
    rows = xp.arange(len(targets))
    loss = -logs[rows, targets].mean()
    error = xp.exp(logs)
    error[rows, targets] -= 1
    error /= len(targets)
    back = (error @ parameters["out"].T) * (1 - hidden * hidden)
    # A product with one-hot rows adds up each letter's gradient in one order; `xp.add.at` would use atomics on GPUs.
    one_hot = (contexts.reshape(-1, 1) == xp.arange(len(LETTERS))).astype(back.dtype)
    gradients = {
        "letters": one_hot.T @ (back @ parameters["in"].T).reshape(-1, WIDTH),
        "in": seen.T @ back,
        "in_bias": back.sum(axis=0),
        "out": hidden.T @ error,
        "out_bias": error.sum(axis=0),
    }
    return loss, gradients, []


def adamw(steps: int) -> Any:
    """The update: AdamW, with a rate that grows for WARM_UP steps and falls to nothing at the last of `steps`."""

    def update(parameters: Arrays, slots: Arrays, gradients: Arrays) -> tuple[Arrays, Arrays]:
        """New values from the gradient of the global batch. The count of steps is a slot: no copy to the host."""
        step = slots["step"] + 1
        xp = library(step)
        left = (1 + xp.cos(np.pi * xp.minimum(step / steps, 1))) / 2
        rate = RATE * left * xp.minimum(step / WARM_UP, 1)
        new, kept = {}, {"step": step}
        for name, gradient in gradients.items():
            mean = kept[f"mean.{name}"] = FIRST * slots[f"mean.{name}"] + (1 - FIRST) * gradient
            square = kept[f"square.{name}"] = SECOND * slots[f"square.{name}"] + (1 - SECOND) * gradient * gradient
            move = mean / (1 - FIRST**step) / (xp.sqrt(square / (1 - SECOND**step)) + 1e-8)
            new[name] = parameters[name] - rate * (move + DECAY * parameters[name])
        return new, kept

    return update


def predict(parameters: Arrays, batch: list[Any]) -> list[Any]:
    """The log-probability of each row's next letter."""
    contexts, targets = batch
    return [forward(parameters, contexts)[2][library(contexts).arange(len(targets)), targets]]


def text(sentences: int, generator: np.random.Generator) -> np.ndarray:
    """Sentences of a small grammar, as numbers of letters."""
    parts = (("the", "a", "one"), ("old", "small", "red"), ("cat", "dog", "fox"), ("sees", "hears"), ("it", "them"))
    words = [" ".join(str(generator.choice(part)) for part in parts) + ". " for _ in range(sentences)]
    return np.array([LETTERS.index(letter) for letter in "".join(words)])


def examples(letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each run of CONTEXT letters (rows, CONTEXT), and the letter behind it (rows,)."""
    windows = np.lib.stride_tricks.sliding_window_view(letters, CONTEXT + 1)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, -1])


def make_program(steps: int, dtype: str) -> fastdp.FunctionProgram:
    """Parameters, slots of AdamW, and the three functions. Initial values may be CuPy's arrays as well."""
    generator = np.random.default_rng(0)
    shapes = {"in": (CONTEXT * WIDTH, HIDDEN), "out": (HIDDEN, len(LETTERS))}
    parameters = {"letters": generator.normal(size=(len(LETTERS), WIDTH)).astype(dtype)}
    for name, shape in shapes.items():
        parameters[name] = (generator.normal(size=shape) / np.sqrt(shape[0])).astype(dtype)
        parameters[f"{name}_bias"] = np.zeros(shape[1], dtype)
    slots = {
        f"{kind}.{name}": np.zeros_like(value) for kind in ("mean", "square") for name, value in parameters.items()
    }
    slots["step"] = np.zeros((), dtype)
    return fastdp.FunctionProgram(parameters, train, adamw(steps), predict, slots=slots)


def run(devices: int, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Loss, and perplexity on other text, after each epoch of this call."""
    contexts, targets = examples(text(options.sentences, np.random.default_rng(1)))
    held_out = list(examples(text(50, np.random.default_rng(2))))
    size = options.batch_size
    program = make_program(options.epochs * -(-len(targets) // size), options.dtype)
    engine = fastdp.DataParallel(program, devices)
    found = []
    with fastdp.Checkpoint(options.folder, model=program, every_minutes=10) as checkpoint:
        checkpoint.restore()
        for epoch in checkpoint.epochs(options.epochs):
            order = np.random.default_rng(epoch).permutation(len(targets))
            losses, counts = [], []
            for rows in checkpoint.batches([order[start : start + size] for start in range(0, len(order), size)]):
                step = engine.train([contexts[rows], targets[rows]], wants_outputs=False)
                losses.append(float(step.sums[0]))
                counts.append(len(rows))
                checkpoint.step()
            (logs,) = engine.predict(held_out).outputs
            found.append((float(np.average(losses, weights=counts)), float(np.exp(-logs.mean()))))
    return found


def main() -> None:
    """Train, and print what each epoch brought."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="how many; without it all GPUs, or four virtual devices")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=250, help="global: each device gets its share")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--folder", default="language_model", help="where checkpoints are kept")
    options = parser.parse_args()
    wanted = options.devices or len(fastdp.devices()) or 4
    if len(fastdp.devices()) < wanted:
        fastdp.set_virtual_devices(wanted)
    print("on", ", ".join(device.name for device in fastdp.devices()[:wanted]))
    for loss, perplexity in run(wanted, options):
        print(f"loss {loss:.9f}, perplexity on other text {perplexity:.9f}")


if __name__ == "__main__":
    main()
