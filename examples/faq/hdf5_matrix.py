"""How can I use data that does not fit into memory? From an HDF5 file, a batch at a time.

python examples/faq/hdf5_matrix.py
"""

import h5py
import numpy as np

import fastdp
from fastdp.utils import HDF5Matrix, multi_gpu_model  # was: from keras.utils import ...

import keras  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

values = np.random.default_rng(0).integers(0, 256, (200, 5)).astype(np.float32)
with h5py.File("file.hdf5", "w") as file:
    file["data"], file["labels"] = values, values.sum(axis=1, keepdims=True) / 255

x_train = HDF5Matrix("file.hdf5", "data", start=0, end=150, normalizer=lambda block: block / 255)
y_train = HDF5Matrix("file.hdf5", "labels", start=0, end=150)
x_data = HDF5Matrix("file.hdf5", "data", start=150, normalizer=lambda block: block / 255)

model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
parallel_model = multi_gpu_model(model, gpus=4)
parallel_model.compile(loss="mse", optimizer="adam")
history = parallel_model.fit(x_train, y_train, epochs=2, batch_size=32, shuffle="batch", verbose=0)
predicted = parallel_model.predict(x_data, verbose=0)
print("predicted", predicted.shape, "of", x_data.shape)
print("as from memory:", np.allclose(predicted, model.predict(values[150:] / 255, verbose=0), atol=1e-6))
