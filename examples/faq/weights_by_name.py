"""How can I load weights into another architecture? By the names of the layers.

python examples/faq/weights_by_name.py
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

from keras import Input  # isort: skip
from keras.layers import Dense  # isort: skip
from keras.models import Sequential  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)

fname = "my_model_weights.h5"

# The first model.
first = Sequential([Input((3,))])
first.add(Dense(2, name="dense_1"))
first.add(Dense(3, name="dense_2"))
multi_gpu_model(first, gpus=2).save_weights(fname)

# The new model shares one layer name with it.
model = Sequential([Input((3,))])
model.add(Dense(2, name="dense_1"))  # will be loaded
model.add(Dense(10, name="new_dense"))  # will not be loaded
untouched = model.get_layer("new_dense").get_weights()
multi_gpu_model(model, gpus=2).load_weights(fname, by_name=True)

loaded = map(np.array_equal, model.get_layer("dense_1").get_weights(), first.get_layer("dense_1").get_weights())
stayed = map(np.array_equal, model.get_layer("new_dense").get_weights(), untouched)
print("dense_1 is the first model's:", all(loaded))
print("new_dense is as it was:", all(stayed))
