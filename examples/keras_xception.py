"""Keras 2's first example of multi_gpu_model, with fastdp: Xception on 8 devices.

    python examples/keras_xception.py
    python examples/keras_xception.py --samples 16 --batch-size 8 --epochs 1 --devices 2    # a quick try

Changed: images of 96x96 and 10 classes instead of 224x224 and 1000, so that it runs on a laptop; no
`tf.device`, since the template lives where its first replica does.
"""

from __future__ import annotations

import argparse

import numpy as np

import fastdp  # selects Keras's torch backend unless another is selected: import it before Keras
from fastdp.utils import multi_gpu_model

from keras.applications import Xception  # isort: skip


def main() -> None:
    """Train on random data, and save the template."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=96, help="height and width of an image, at least 71")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="global: each device gets its share")
    parser.add_argument("--out", default="my_model.h5")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)

    # The base model (or "template").
    model = Xception(weights=None, input_shape=(options.size, options.size, 3), classes=options.classes)

    # Replicates the model on the devices.
    parallel_model = multi_gpu_model(model, gpus=options.devices)
    parallel_model.compile(loss="categorical_crossentropy", optimizer="rmsprop")

    # Dummy data.
    generator = np.random.default_rng(0)
    x = generator.random((options.samples, options.size, options.size, 3), np.float32)
    y = np.eye(options.classes, dtype=np.float32)[generator.integers(0, options.classes, options.samples)]

    # This `fit` call is distributed over the devices.
    history = parallel_model.fit(x, y, epochs=options.epochs, batch_size=options.batch_size, verbose=2)
    print(f"loss on {options.devices} devices: {history.history['loss'][-1]:.4f}")

    # Save the template (it shares its weights with the parallel model): a plain Keras file.
    model.save(options.out)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
