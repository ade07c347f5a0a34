"""The utilities of Keras 2's `keras.utils` for Keras 3: change the import, keep the script."""

from fastdp.data.hdf5 import HDF5Matrix
from fastdp.keras.h5_files.h5_models import load_model
from fastdp.keras.keras2.arrays import normalize, to_categorical
from fastdp.keras.keras2.custom_objects import CustomObjectScope
from fastdp.keras.keras2.functions import get_layer_output
from fastdp.keras.keras2.get_file import get_file
from fastdp.keras.keras2.plot import plot_model
from fastdp.keras.keras2.sequence import Sequence
from fastdp.keras.keras2.summary import print_summary
from fastdp.keras.keras2.weights import load_weights, save_weights
from fastdp.keras.wrap import multi_gpu_model

__all__ = [
    "CustomObjectScope",
    "HDF5Matrix",
    "Sequence",
    "get_file",
    "get_layer_output",
    "load_model",
    "load_weights",
    "multi_gpu_model",
    "normalize",
    "plot_model",
    "print_summary",
    "save_weights",
    "to_categorical",
]
