"""How do I augment images on the devices? By augment=: each device runs the layers on its rows.

python examples/faq/augmentation.py
"""

import numpy as np

import fastdp

import keras  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

generator = np.random.default_rng(0)
images = generator.integers(0, 256, (64, 12, 12, 3)).astype(np.uint8)
labels = keras.utils.to_categorical(images.mean(axis=(1, 2, 3)) > 127, 2)


def trained(gpus: int) -> tuple[list[float], keras.Model]:
    """The losses of training on so many devices, and the parallel model."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    # Drawn by the row of the whole batch; MixUp mixes rows of all devices, and their labels.
    layers = [
        keras.layers.RandomFlip("horizontal", seed=1),
        keras.layers.RandomTranslation(0.1, 0.1, seed=2),
        keras.layers.MixUp(seed=3),
        keras.layers.Rescaling(1 / 255),
    ]
    parallel = fastdp.wrap(model, gpus=gpus, augment=layers)
    parallel.compile(optimizer="adam", loss="categorical_crossentropy")
    history = parallel.fit(images, labels, epochs=2, batch_size=32, verbose=0)
    return history.history["loss"], parallel


losses, parallel = trained(4)
print("losses as on one device:", np.allclose(losses, trained(1)[0], rtol=1e-5))
# The same uint8 images: outside of training the layers draw nothing, and Rescaling still scales.
print("predicted", parallel.predict(images, verbose=0).shape)
