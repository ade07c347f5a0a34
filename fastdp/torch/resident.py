"""Batches of a `DeviceDataset` for torch modules: row numbers in place of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastdp.comm.batch import Batch
from fastdp.data.row_batch import ResidentColumn
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.arrays import to_tensor
from fastdp.tensors.row_effects import ROWS_FIRST


class ResidentValues:
    """The arguments of a call or of a train step, with arrays of a `DeviceDataset` among them.

    Args:
        leaves, spec: the arguments, as a flat list and its structure.
        devices: those that run the step.

    Attributes:
        on_host: the arguments with host tensors in place of those arrays: for trials, one device, and virtual devices.

    Raises:
        ValueError: the data set is not on these devices.
    """

    def __init__(self, leaves: Sequence[Any], spec: Any, devices: Sequence[QueueDevice]) -> None:
        self._leaves = leaves
        self._columns = [leaf for leaf in leaves if isinstance(leaf, ResidentColumn)]
        for column in self._columns:
            column.check_devices(devices)
        self._on_gpus = all(device.on_gpu for device in devices)
        found = [to_tensor(leaf.__array__()) if isinstance(leaf, ResidentColumn) else leaf for leaf in leaves]
        self.on_host: Any = pytree.tree_unflatten(found, spec)

    @classmethod
    def among(cls, values: Any, devices: Sequence[QueueDevice]) -> ResidentValues | None:
        """The arguments, if an array of a `DeviceDataset` is among them; else None."""
        leaves, spec = pytree.tree_flatten(values)
        if not any(isinstance(leaf, ResidentColumn) for leaf in leaves):
            return None
        return cls(leaves, spec, devices)

    def placed(self, batch: Batch) -> Batch:
        """The batch of `on_host`, over the rows that lie on GPUs where all of its arrays are there, rows first."""
        structure = batch.structure
        given = [leaf for leaf in self._leaves if isinstance(leaf, (torch.Tensor, ResidentColumn)) and leaf.ndim]
        plain = structure.misfit is None and all(one == ROWS_FIRST for one in structure.layouts)
        if not self._on_gpus or not plain or len(given) != len(self._columns) or len(batch) != len(given):
            return batch
        resident = self._columns[0].batch_of(self._columns)
        return batch if resident is None else Batch(resident, structure, batch.rows)
