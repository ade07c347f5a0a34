"""Keras callbacks: `Checkpoint` saves a run, `Monitor` watches it, and `TensorBoard` needs no TensorFlow."""

from fastdp.keras.callbacks.checkpoint import Checkpoint
from fastdp.keras.callbacks.monitor import Monitor
from fastdp.keras.callbacks.tensorboard import TensorBoard

__all__ = ["Checkpoint", "Monitor", "TensorBoard"]
