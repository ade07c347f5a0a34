"""A script that fits: DEVICES HOW FOLDER RESULT. It is killed, and started again by the same command."""
# ruff: noqa: NPY002, T201

import sys
import time

import keras
import numpy as np
import torch

import fastdp
from fastdp.checkpoint import folders

devices, how, folder, result = int(sys.argv[1]), *sys.argv[2:5]
slow = folders._sync


def sync(path):
    """A slow disk."""
    time.sleep(0.01)
    slow(path)


folders._sync = sync
fastdp.set_virtual_devices(3)
keras.utils.set_random_seed(7)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(90, 6)).astype("float32"), rng.integers(0, 3, 90)
layers = [
    keras.layers.Dense(8, use_bias=False),
    keras.layers.BatchNormalization(),
    keras.layers.Dropout(0.3),
    keras.layers.Dropout(0.2, seed=11),
    keras.layers.Dense(3),
]
model = keras.Sequential([keras.Input((6,)), *layers])
if how == "installed":
    fastdp.install(gpus=devices, compile=None)
elif how != "plain":
    model = fastdp.wrap(model, gpus=devices, sync_batch_norm=True, compile=None)
optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss, metrics=["accuracy"])
told = keras.callbacks.LambdaCallback(
    on_train_batch_begin=lambda batch, logs: print("batch", batch),
    on_train_batch_end=lambda batch, logs: print(float(logs["loss"])),
)
watching = [
    keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.1),
    keras.callbacks.EarlyStopping("val_accuracy", patience=9, restore_best_weights=True),
]
checkpoint = fastdp.callbacks.Checkpoint(folder, every_steps=2, keep=2)
options = {"epochs": 3, "batch_size": 16, "validation_split": 0.2, "verbose": 0}
if how == "steps":  # one pass over the data for several epochs
    options["steps_per_epoch"] = 3
history = model.fit(x, y, callbacks=[told, *watching, checkpoint], **options)
template = getattr(model, "template", model)
state = {f"{i}": torch.tensor(value) for i, value in enumerate([*template.get_weights(), *x[:3]])}
state |= {f"o{i}": torch.tensor(np.array(v)) for i, v in enumerate(optimizer.variables)}
torch.save({"state": state, "history": history.history, "drawn": [torch.rand(2), float(np.random.rand())]}, result)
