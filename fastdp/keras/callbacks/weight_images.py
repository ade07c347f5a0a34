"""Weights as images: each number a pixel, or each kernel of a small convolution a tile."""

from __future__ import annotations

import keras
import numpy as np

TILES = 3  # as many images as TensorFlow writes of a batch of them


def pixels_of(weight: np.ndarray) -> np.ndarray | None:
    """A weight as bytes (height, width, channels), from black, its smallest number, to white, its largest.

    Vectors are one row. Matrices lie on their long side. Of arrays with three axes the first three images stand side by
    side, by the last axis (the first, if Keras's data format is channels first). Axes of length one do not count.

    Returns:
        None for a weight of other shapes, or without finite numbers.
    """
    values = np.squeeze(weight).astype(np.float64)
    if values.ndim == 1:
        values = values[None]
    elif values.ndim == 2:
        values = values.T if values.shape[0] > values.shape[1] else values
    elif values.ndim == 3:
        tiles = np.moveaxis(values, 2, 0) if keras.config.image_data_format() == "channels_last" else values
        values = np.concatenate(list(tiles[:TILES]), axis=1)
    else:
        return None
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = finite.min(), finite.max()
    shades = (np.clip(np.nan_to_num(values, nan=low), low, high) - low) / (high - low if high > low else 1.0)
    return np.round(255 * shades).astype(np.uint8)[:, :, None]
