"""How is the validation split made? From the end of the data, before any shuffling; it is never shuffled.

    python examples/faq/validation_split.py

`fit` returns a History with the loss and the metrics of each epoch.
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

import keras  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

# The only feature of a row is its number, which identifies the row.
X = np.arange(100, dtype=np.float32)[:, np.newaxis]
y = X / 100
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
parallel_model = multi_gpu_model(model, gpus=4)
parallel_model.compile(loss="mse", optimizer=keras.optimizers.SGD(1e-5), metrics=["mae"])

hist = parallel_model.fit(X, y, validation_split=0.2, epochs=3, batch_size=10, verbose=0)
print({key: [round(value, 4) for value in values] for key, values in hist.history.items()})

# Only the last 20 rows.
loss, mae = parallel_model.evaluate(X[80:], y[80:], batch_size=10, verbose=0)
print("validated on the last 20 rows:", bool(np.isclose(hist.history["val_loss"][-1], loss)))
