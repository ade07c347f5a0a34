"""Data sets on disk (hdf5.py), on the devices (device_dataset.py), and loaders read ahead (loaders.py)."""

from fastdp.data.augment import Augment
from fastdp.data.device_dataset import DeviceDataset, Scaled
from fastdp.data.loaders import prefetch
from fastdp.data.row_batch import ResidentBatch
from fastdp.runtime.watchdog import watch_data

__all__ = ["Augment", "DeviceDataset", "ResidentBatch", "Scaled", "prefetch", "watch_data"]
