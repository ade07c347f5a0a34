"""Data sets: on disk (hdf5.py), and on the devices (resident.py)."""

from fastdp.data.resident import DeviceDataset, Scaled
from fastdp.data.resident_batch import ResidentBatch

__all__ = ["DeviceDataset", "ResidentBatch", "Scaled"]
