"""The small utilities of Keras 2's `keras.utils`: one import is changed.

python examples/faq/utilities.py
"""

import numpy as np

import fastdp
from fastdp.utils import (  # was: from keras.utils import ...
    CustomObjectScope,
    Sequence,
    multi_gpu_model,
    normalize,
    print_summary,
    to_categorical,
)

import keras  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)

labels = np.array([0, 2, 1, 2, 0])
print(to_categorical(labels))
print(normalize(np.array([[3.0, 4.0]])))


class MyObject(keras.regularizers.Regularizer):
    """A tenth of the sum of squares."""

    def __call__(self, x):
        return 0.1 * keras.ops.sum(keras.ops.square(x))


with CustomObjectScope({"MyObject": MyObject}):
    layer = keras.layers.Dense(3, kernel_regularizer="MyObject")


class Batches(Sequence):
    """Keras 2's example: one batch per index; a real Sequence would read images from files here."""

    def __init__(self, x_set, y_set, batch_size):
        self.x, self.y, self.batch_size = x_set, y_set, batch_size

    def __len__(self):
        return int(np.ceil(len(self.x) / float(self.batch_size)))

    def __getitem__(self, idx):
        rows = slice(idx * self.batch_size, (idx + 1) * self.batch_size)
        return np.array(self.x[rows]), np.array(self.y[rows])


model = keras.Sequential([keras.Input((4,)), layer])
parallel_model = multi_gpu_model(model, gpus=2)
parallel_model.compile(loss="mse", optimizer="sgd")
x = np.random.default_rng(0).random((10, 4), np.float32)
history = parallel_model.fit(Batches(x, x[:, :3], 4), epochs=2, verbose=0)
print("losses:", len(history.history["loss"]))

lines = []
print_summary(parallel_model, line_length=60, positions=[0.5, 0.8, 1.0], print_fn=lines.append)
print(*lines, sep="\n")
