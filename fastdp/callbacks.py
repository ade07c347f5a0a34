"""Keras callbacks that watch a run: `Monitor`, and a `TensorBoard` that needs no TensorFlow."""

from fastdp.keras.callbacks.monitor import Monitor
from fastdp.keras.callbacks.tensorboard import TensorBoard

__all__ = ["Monitor", "TensorBoard"]
