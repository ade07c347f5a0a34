"""How can I keep my data on the GPUs? In a DeviceDataset: steps take their rows from it by number.

python examples/faq/device_dataset.py
"""

import numpy as np

import fastdp
from fastdp.data import DeviceDataset, Scaled

import keras  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

generator = np.random.default_rng(0)
images = generator.integers(0, 256, (200, 8, 8, 1)).astype(np.uint8)
labels = (images.mean(axis=(1, 2, 3)) > 127).astype(np.int64)


def new_model() -> keras.Model:
    """A small convolutional network on 4 devices."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    parallel = fastdp.wrap(model, gpus=4)
    parallel.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return parallel


# The image bytes are copied to each card once; a step converts the rows that it needs to floats.
parallel = new_model()
train = DeviceDataset((images[:150], labels[:150]), parallel, casts={0: Scaled("float32", scale=1 / 255)})
test = DeviceDataset((images[150:], labels[150:]), parallel, casts={0: Scaled("float32", scale=1 / 255)})
history = parallel.fit(train, validation_data=test, epochs=3, batch_size=32, verbose=0)
predicted = parallel.predict(test, verbose=0)

# The same training from arrays: the host converts and sends each batch.
arrays = new_model()
scaled = images.astype(np.float32) * np.float32(1 / 255)
held_out = scaled[150:], labels[150:]
same = arrays.fit(scaled[:150], labels[:150], validation_data=held_out, epochs=3, batch_size=32, verbose=0)
print("predicted", predicted.shape)
print("losses as from arrays:", np.allclose(history.history["loss"], same.history["loss"], rtol=1e-4))
