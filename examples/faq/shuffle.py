"""Is the data shuffled? Yes, anew in each epoch, unless `shuffle=False`; validation data never is.

python examples/faq/shuffle.py
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

import keras  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)


class Order(keras.metrics.Metric):
    """Records the order of the rows: each row's target is its number."""

    def __init__(self):
        super().__init__(name="first_row")
        self.first = self.add_weight(initializer="zeros", name="first")
        self.rows = []

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Record the rows of a batch."""
        self.rows += keras.ops.convert_to_numpy(y_true).ravel().astype(int).tolist()

    def result(self):
        """The first row of the epoch."""
        return self.rows[0] if self.rows else 0

    def reset_state(self):
        """Start a new epoch."""
        self.rows = []


class Keep(keras.callbacks.Callback):
    """Keeps the order of each epoch."""

    def __init__(self, order):
        super().__init__()
        self.order, self.epochs = order, []

    def on_epoch_end(self, epoch, logs=None):
        """Copy the order before Keras resets the metric."""
        self.epochs.append(list(self.order.rows))


X = np.arange(24, dtype=np.float32)[:, np.newaxis]
orders = {}
for shuffle in (True, False, "batch"):
    keras.utils.set_random_seed(1)
    order = Order()
    keep = Keep(order)
    parallel_model = multi_gpu_model(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), gpus=2)
    parallel_model.compile(loss="mse", optimizer=keras.optimizers.SGD(1e-6), metrics=[order])
    parallel_model.fit(X, X, epochs=2, batch_size=4, shuffle=shuffle, verbose=0, callbacks=[keep])
    orders[shuffle] = keep.epochs
    print(f"shuffle={shuffle!r}:", *keep.epochs, sep="\n    ")
