"""Training runs in a process of its own, which prints the bits of what each has learned.

python repeated.py DELAY_SEED MODEL,COMPILE,DEVICES ...
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch

import fastdp
from fastdp.runtime.select import resolve

L = keras.layers


def convolutional():
    layers = [L.Conv2D(8, 3, activation="relu"), L.BatchNormalization(), L.MaxPooling2D(), L.Dropout(0.3), L.Flatten()]
    return keras.Sequential([keras.Input((12, 12, 3)), *layers, L.Dense(5, "softmax")]), (12, 12, 3), None


def recurrent():
    layers = [L.LSTM(12, dropout=0.2, return_sequences=True), L.GRU(8), L.GaussianNoise(0.1)]
    return keras.Sequential([keras.Input((9, 6)), *layers, L.Dense(5, "softmax")]), (9, 6), None


def embedded():
    layers = [L.Embedding(30, 16), L.Bidirectional(L.LSTM(6)), L.Dropout(0.2)]
    return keras.Sequential([keras.Input((11,), dtype="int32"), *layers, L.Dense(5, "softmax")]), (11,), 30


def words():
    layers = [L.Embedding(30, 4), L.Flatten()]
    return keras.Sequential([keras.Input((11,), dtype="int32"), *layers, L.Dense(5, "softmax")]), (11,), 30


def batches(shape, words, rows=23, count=4):
    generator = np.random.default_rng(0)
    for _ in range(count):
        x = generator.integers(0, words, (rows, *shape)) if words else generator.normal(size=(rows, *shape))
        yield x.astype("int32" if words else "float32"), np.eye(5, dtype="float32")[generator.integers(0, 5, rows)]


def train_keras(make, devices, mode):
    model, shape, words = make()
    parallel = fastdp.wrap(model, gpus=devices, compile=mode, deterministic=True)
    parallel.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), "categorical_crossentropy")
    for x, y in batches(shape, words, 24 if mode == "inductor" else 23):
        yield np.float64(parallel.train_on_batch(x, y))
    expected = {None: "eager", "auto": "traced", "inductor": "compiled"}[mode]
    assert {entry["how"] for entry in parallel.report()} == {expected}
    yield from (np.array(w) for w in model.get_weights())


def train_torch(devices):
    net = torch.nn
    layers = [net.Conv2d(3, 8, 3), net.BatchNorm2d(8), net.ReLU(), net.Dropout(0.3), net.Flatten(), net.Linear(800, 5)]
    module = net.Sequential(*layers)
    parallel = fastdp.wrap(module, gpus=devices, deterministic=True)
    step = parallel.train_step(net.CrossEntropyLoss(label_smoothing=0.1), lambda p: torch.optim.Adam(p, lr=0.01))
    for x, y in batches((3, 12, 12), None):
        yield step(torch.from_numpy(x), torch.from_numpy(y)).double().numpy()
    yield from (t.numpy() for t in module.state_dict().values())


def train(name, mode, devices):
    """One run's bits, as text."""
    keras.utils.set_random_seed(1)
    makers = {"convolutional": convolutional, "recurrent": recurrent, "embedded": embedded, "words": words}
    found = train_torch(devices) if name == "torch" else train_keras(makers[name], devices, mode)
    digest = hashlib.sha256()
    for array in found:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def main(delay_seed, *runs):
    fastdp.set_virtual_devices(8)
    for number, device in enumerate(resolve(8)):
        draw = random.Random(int(delay_seed) * 100 + number)
        device.delay = lambda draw=draw: time.sleep(draw.random() * 0.0005)
    for run in runs:
        name, mode, devices = run.split(",")
        sys.stdout.write(f"{run} {train(name, None if mode == 'None' else mode, int(devices))}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
