"""How can I get the output of a layer in the middle? By a function of the backend, while the model trains in parallel.

python examples/faq/intermediate_output.py
"""

import numpy as np

import fastdp
from fastdp import backend as K  # was: from keras import backend as K
from fastdp.utils import get_layer_output, multi_gpu_model

import keras  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)

X = np.random.default_rng(0).random((10, 4), np.float32)
stack = [keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(6)]
model = keras.Sequential([keras.Input((4,)), *stack, keras.layers.Dropout(0.5), keras.layers.Dense(1)])
parallel_model = multi_gpu_model(model, gpus=2)
parallel_model.compile(loss="mse", optimizer="sgd")
parallel_model.fit(X, X[:, :1], epochs=2, batch_size=5, verbose=0)

get_3rd_layer_output = K.function([model.layers[0].input], [model.layers[3].output])
layer_output = get_3rd_layer_output([X])[0]
print("without a phase:", layer_output.shape)

# Dropout and BatchNormalization behave differently in training and testing: the learning phase selects one.
get_3rd_layer_output = K.function([model.layers[0].input, K.learning_phase()], [model.layers[3].output])
in_test = get_3rd_layer_output([X, 0])[0]
in_training = get_3rd_layer_output([X, 1])[0]
print("zeros in testing:", int((in_test == 0).sum()), "and in training:", int((in_training == 0).sum()))

# The same by layer name or index; it also works on a parallel model.
print("the same values:", np.array_equal(get_layer_output(parallel_model, 3, X), in_test))
