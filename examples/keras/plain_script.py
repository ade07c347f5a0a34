"""A Keras script that knows nothing of fastdp, to be run on several devices as it is.

KERAS_BACKEND=torch python examples/keras/plain_script.py     # one device
fastdp run --virtual 4 examples/keras/plain_script.py         # four virtual ones
fastdp run --gpus auto examples/keras/plain_script.py         # all GPUs
"""

import keras
import numpy as np

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).random((1024, 20), np.float32)
y = x[:, :10].argmax(axis=1)

model = keras.Sequential(
    [
        keras.Input((20,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dropout(0.1, seed=1),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
history = model.fit(x, y, epochs=4, batch_size=64, validation_split=0.2, verbose=0)
print("loss", " ".join(f"{loss:.4f}" for loss in history.history["loss"]))
print("validation accuracy", f"{history.history['val_accuracy'][-1]:.3f}")
model.save("plain.keras")
