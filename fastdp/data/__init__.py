"""Data sets: on disk (hdf5.py), and on the devices (resident.py)."""

from fastdp.data.resident import DeviceDataset, ResidentBatch, Scaled

__all__ = ["DeviceDataset", "ResidentBatch", "Scaled"]
