"""Batches of a `DeviceDataset` for torch modules: row numbers in place of tensors."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from fastdp.comm.batch import Batch
from fastdp.data.loaders import waiting
from fastdp.data.row_batch import ResidentColumn, Source
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors import pytree
from fastdp.tensors.arrays import to_tensor
from fastdp.tensors.row_effects import ROWS_FIRST

MOST_TOLD = 100  # data sets of a report, the latest


class ResidentValues:
    """The arguments of a call or of a train step, with arrays of a `DeviceDataset` among them.

    Args:
        leaves, spec: the arguments, as a flat list and its structure.
        devices: those that run the step.

    Attributes:
        on_host: the arguments with host tensors in place of those arrays: for trials, one device, and virtual devices.
        sources: the data sets.

    Raises:
        ValueError: the data set is not on these devices.
    """

    def __init__(self, leaves: Sequence[Any], spec: Any, devices: Sequence[QueueDevice]) -> None:
        self._leaves = leaves
        self._columns = [leaf for leaf in leaves if isinstance(leaf, ResidentColumn)]
        for column in self._columns:
            column.check_devices(devices)
        self.sources = list({id(column.source): column.source for column in self._columns}.values())
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


class ResidentInputs:
    """Counts batches of data sets that lie on the devices, for a module's report: an entry for each, as of a `fit`.

    GPUs gather rows themselves, behind their work. In host memory rows are gathered while the caller waits; an entry
    tells for how long.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Source, _Counted] = weakref.WeakKeyDictionary()
        self._told: deque[_Counted] = deque(maxlen=MOST_TOLD)

    def among(self, values: Any, devices: Sequence[QueueDevice]) -> ResidentValues | None:
        """As `ResidentValues.among`, counted."""
        began = time.perf_counter()
        found = ResidentValues.among(values, devices)
        if found is not None:
            ended = time.perf_counter()
            for source in found.sources:
                counted = self._known.get(source)
                if counted is None:
                    counted = self._known[source] = _Counted(source.held, began)
                    self._told.append(counted)
                counted.add(began, ended)
        return found

    def entries(self) -> list[dict[str, Any]]:
        """The entries, also of data sets that are gone."""
        return [one.entry() for one in self._told]


class _Counted:
    """The batches of one data set, the seconds in which their rows were gathered, and when the first and last came."""

    def __init__(self, held: str, began: float) -> None:
        self._held = held
        self._began = self._ended = began
        self._batches, self._waited = 0, 0.0

    def add(self, began: float, ended: float) -> None:
        """Another one."""
        self._batches, self._waited, self._ended = self._batches + 1, self._waited + ended - began, ended

    def entry(self) -> dict[str, Any]:
        """Its entry in `Report.inputs`."""
        counted = {"batches": self._batches, "read_ahead": 0, "waited_seconds": self._waited}
        how = f"a DeviceDataset, {self._held}"
        return {"array": "all", "how": how, **counted, **waiting(counted, self._ended - self._began)}
