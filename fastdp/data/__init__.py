"""Data sets on disk (hdf5.py) and on the devices (device_dataset.py)."""

from fastdp.data.device_dataset import DeviceDataset, Scaled
from fastdp.data.row_batch import ResidentBatch
from fastdp.runtime.watchdog import watch_data

__all__ = ["DeviceDataset", "ResidentBatch", "Scaled", "watch_data"]
