"""One script for machines with and without several GPUs: Keras 2's `try: ... except ValueError:`.

    python examples/keras_fallback.py                             # one GPU or none: the model as it is
    FASTDP_VIRTUAL_DEVICES=4 python examples/keras_fallback.py    # four virtual devices

Every problem with `gpus`, including fewer than two devices, raises a ValueError.
"""

from __future__ import annotations

import numpy as np

from fastdp.utils import multi_gpu_model  # chooses Keras's torch backend: import it before Keras

import keras  # isort: skip


def main() -> None:
    """Learn whether the sum of eight numbers is above four."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    try:
        parallel_model = multi_gpu_model(model, cpu_relocation=True)
        print(f"Training using {len(parallel_model.devices)} devices..")
    except ValueError as error:
        parallel_model = model
        print(f"Training using single GPU or CPU.. ({error})")
    parallel_model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
    x = np.random.default_rng(0).random((1000, 8), np.float32)
    history = parallel_model.fit(x, x.sum(axis=1) > 4, epochs=5, batch_size=100, verbose=0).history
    print(f"loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}, accuracy {history['accuracy'][-1]:.3f}")


if __name__ == "__main__":
    main()
