"""How can I remove a layer from a Sequential model? By `pop()`; wrap the model afterwards.

python examples/faq/pop.py
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

from keras import Input  # isort: skip
from keras.layers import Dense  # isort: skip
from keras.models import Sequential  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)

model = Sequential([Input((784,))])
model.add(Dense(32, activation="relu"))
model.add(Dense(16, activation="relu"))
print(len(model.layers))  # 2
print(multi_gpu_model(model, gpus=2).predict(np.ones((4, 784)), verbose=0).shape)

model.pop()
print(len(model.layers))  # 1
print(multi_gpu_model(model, gpus=2).predict(np.ones((4, 784)), verbose=0).shape)
