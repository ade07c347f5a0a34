"""Sequential or functional? Both; a functional model may have several inputs and outputs.

python examples/faq/sequential_and_functional.py
"""

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

from keras import Input  # isort: skip
from keras.layers import Concatenate, Dense  # isort: skip
from keras.models import Model, Sequential  # isort: skip

if len(fastdp.devices()) < 4:
    fastdp.set_virtual_devices(4)

generator = np.random.default_rng(0)
x, z = generator.random((64, 8), np.float32), generator.random((64, 2), np.float32)
classes = np.eye(3)[generator.integers(0, 3, 64)]

model = Sequential([Input((8,))])
model.add(Dense(16, activation="relu"))
model.add(Dense(3, activation="softmax"))
print("layers:", [type(layer).__name__ for layer in model.layers])
parallel_model = multi_gpu_model(model, gpus=4)
parallel_model.compile(optimizer="rmsprop", loss="categorical_crossentropy", metrics=["accuracy"])
sequential = parallel_model.fit(x, classes, epochs=2, batch_size=16, verbose=0).history
print("Sequential:", sorted(sequential))

first, second = Input((8,), name="first"), Input((2,), name="second")
joined = Dense(16, activation="relu")(Concatenate()([first, second]))
outputs = [Dense(3, activation="softmax", name="class")(joined), Dense(1, name="size")(joined)]
parallel_model = multi_gpu_model(Model([first, second], outputs), gpus=4)
parallel_model.compile(optimizer="rmsprop", loss={"class": "categorical_crossentropy", "size": "mse"})
targets = {"class": classes, "size": x.sum(axis=1, keepdims=True)}
functional = parallel_model.fit({"first": x, "second": z}, targets, epochs=2, batch_size=16, verbose=0).history
print("functional:", sorted(functional))
