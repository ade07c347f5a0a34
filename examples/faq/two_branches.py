"""Device parallelism: a shared LSTM encodes two sequences, each on a device of its own. The FAQ's model, trained.

python examples/faq/two_branches.py
"""

import numpy as np

import fastdp

import keras  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)

tweet_a = keras.Input(shape=(140, 256))
tweet_b = keras.Input(shape=(140, 256))
shared_lstm = keras.layers.LSTM(64)

# The first sequence on one device, the second on another, at the same time.
with fastdp.device("gpu:0"):
    encoded_a = shared_lstm(tweet_a)
with fastdp.device("gpu:1"):
    encoded_b = shared_lstm(tweet_b)

# Merged on the host.
with fastdp.device("cpu:0"):
    merged_vector = keras.layers.concatenate([encoded_a, encoded_b], axis=-1)
model = keras.Model([tweet_a, tweet_b], keras.layers.Dense(1, "sigmoid")(merged_vector))

# One replica that spans two devices; [(0, 1), (2, 3)] would be two such replicas.
parallel = fastdp.wrap(model, gpus=[(0, 1)])
parallel.compile("adam", "binary_crossentropy", metrics=["accuracy"])

rng = np.random.default_rng(0)
x = [rng.normal(size=(64, 140, 256)).astype("float32") for _ in range(2)]
same_sign = (x[0].mean((1, 2)) * x[1].mean((1, 2)) > 0).astype("float32")
history = parallel.fit(x, same_sign, epochs=2, batch_size=32, verbose=0).history
names = " and ".join(device.name for device in fastdp.devices()[:2])
print(f"two branches on {names}: loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}")
