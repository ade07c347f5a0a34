"""How can I save a model? As one file with its optimizer, or its weights alone.

    python examples/faq/save_and_load.py

Changed: two imports. `load_model` comes from fastdp, because Keras 3.15 loses the optimizer of an `.h5` file.
"""

import numpy as np

import fastdp
from fastdp.utils import load_model, multi_gpu_model  # was: from keras.models, from keras.utils

import keras  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

x = np.random.default_rng(0).random((64, 3), np.float32)
y = x.sum(axis=1, keepdims=True)


def build():
    """The same architecture each time."""
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])


model = build()
parallel_model = multi_gpu_model(model, gpus=4)
parallel_model.compile(loss="mse", optimizer="adam")
parallel_model.fit(x, y, epochs=5, batch_size=16, verbose=0)
before = model.predict(x, verbose=0)

# One file: architecture, weights, loss, and the optimizer with its state.
model.save("my_model.h5")
del model
model = load_model("my_model.h5")
print("steps of the loaded optimizer:", int(model.optimizer.iterations))
print("same predictions:", np.array_equal(model.predict(x, verbose=0), before))

# Training continues where it stopped, on any number of devices.
parallel_model = multi_gpu_model(model, gpus=2)
parallel_model.compile(loss=model.loss, optimizer=model.optimizer)
parallel_model.fit(x, y, epochs=1, batch_size=16, verbose=0)
print("steps after one more epoch:", int(model.optimizer.iterations))

# Weights alone, for the same architecture.
parallel_model.save_weights("my_model_weights.h5")
other = build()
other.load_weights("my_model_weights.h5")
print("same weights:", all(map(np.array_equal, other.get_weights(), parallel_model.get_weights())))
