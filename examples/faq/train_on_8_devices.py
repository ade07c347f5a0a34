"""How can I train on several devices? The FAQ's lines, with the first import changed.

python examples/faq/train_on_8_devices.py
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

import keras  # isort: skip

if len(fastdp.devices()) < 8:
    fastdp.set_virtual_devices(8)

x = np.random.default_rng(0).random((512, 20), np.float32)
y = keras.utils.to_categorical(x[:, :10].argmax(axis=1), 10)
model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10, "softmax")])

# A replica of `model` on each of 8 devices.
parallel_model = multi_gpu_model(model, gpus=8)
parallel_model.compile(loss="categorical_crossentropy", optimizer="rmsprop")

# Each batch of 256 rows is 32 rows for each device.
history = parallel_model.fit(x, y, epochs=20, batch_size=256, verbose=0)
print(f"loss {history.history['loss'][0]:.3f} -> {history.history['loss'][-1]:.3f}")
