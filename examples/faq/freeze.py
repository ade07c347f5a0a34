"""How can I freeze layers? By `trainable`, in the constructor or later, and by `compile`.

    python examples/faq/freeze.py

Changed: each model is trained before `trainable` is changed for the next one. Keras 2 used the value of `trainable` at
`compile`; Keras 3 uses the value during training. A parallel model warns if the two differ.
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

from keras.layers import Dense, Input  # isort: skip
from keras.models import Model  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

generator = np.random.default_rng(0)
data, labels = generator.random((64, 32), np.float32), generator.random((64, 4), np.float32)
frozen_layer = Dense(32, trainable=False)

x = Input(shape=(32,))
layer = Dense(32)
layer.trainable = False
y = Dense(4)(layer(x))

kernels = [layer.get_weights()[0]]

# In the model below, the weights of `layer` are not updated.
frozen_model = multi_gpu_model(Model(x, y), gpus=4)
frozen_model.compile(optimizer="rmsprop", loss="mse")
frozen_model.fit(data, labels, verbose=0)
kernels.append(layer.get_weights()[0])

# This model updates them, and the other model sees the change, since they share the layer.
layer.trainable = True
trainable_model = multi_gpu_model(Model(x, y), gpus=4)
trainable_model.compile(optimizer="rmsprop", loss="mse")
trainable_model.fit(data, labels, verbose=0)
kernels.append(layer.get_weights()[0])

print("the frozen model changed the layer:", not np.array_equal(kernels[0], kernels[1]))
print("the trainable model changed the layer:", not np.array_equal(kernels[1], kernels[2]))
print("a layer made frozen:", not frozen_layer.trainable)
