"""The layers that the FAQ goes through, each trained on 3 devices.

python examples/faq/layers.py
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

import keras  # isort: skip
from keras import layers  # isort: skip

if len(fastdp.devices()) < 3:
    fastdp.set_virtual_devices(3)

IMAGE, VIDEO = (8, 8, 3), (4, 8, 8, 3)
LAYERS = {
    "Dense": (layers.Dense(4), IMAGE),
    "Conv2D": (layers.Conv2D(4, (3, 3), strides=(1, 1), padding="same", dilation_rate=(2, 2)), IMAGE),
    "Conv2DTranspose": (layers.Conv2DTranspose(4, 3, strides=2), IMAGE),
    "Conv3D": (layers.Conv3D(4, 2), VIDEO),
    "Cropping2D": (layers.Cropping2D(((1, 1), (2, 2))), IMAGE),
    "ZeroPadding2D": (layers.ZeroPadding2D(2), IMAGE),
    "MaxPooling2D": (layers.MaxPooling2D(pool_size=(2, 2), strides=None, padding="valid"), IMAGE),
    "AveragePooling2D": (layers.AveragePooling2D(2), IMAGE),
    "GlobalMaxPooling2D": (layers.GlobalMaxPooling2D(), IMAGE),
}

y = np.random.default_rng(1).random((7, 1), np.float32)
shapes = {}
for name, (layer, shape) in LAYERS.items():
    inputs = keras.Input(shape)
    middle = layer(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(middle)))
    parallel_model = multi_gpu_model(model, gpus=3)
    parallel_model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.01))
    x = np.random.default_rng(0).random((7, *shape), np.float32)
    losses = parallel_model.fit(x, y, epochs=2, batch_size=4, verbose=0).history["loss"]
    shapes[name] = middle.shape[1:]
    print(f"{name}: {shape} -> {middle.shape[1:]}, loss {losses[0]:.3f}, {losses[1]:.3f}")
