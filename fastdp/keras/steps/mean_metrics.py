"""Updates and reads Keras's `Mean` metrics in host memory without Keras's operations, with the same bits."""

from __future__ import annotations

import ctypes
from typing import Any

import keras
import torch

_MOST = 64  # metrics that are known at a time
_float = ctypes.c_float


class MeanMetrics:
    """Views of the two variables of `Mean` metrics, by metric.

    Sums, products and quotients of two float32 numbers in float64, rounded to float32, are those of float32 arithmetic.
    """

    def __init__(self) -> None:
        self._views: dict[int, _View] = {}

    def add(self, metric: Any, value: float, rows: int) -> None:
        """`metric.update_state(value, sample_weight=rows)`."""
        view = self._of(metric) if type(metric) is keras.metrics.Mean else None
        if view is None:
            metric.update_state(value, sample_weight=rows)
            return
        weight = _float(rows).value
        view.total.value += _float(_float(value).value * weight).value
        view.count.value += weight

    def result(self, metric: Any) -> Any:
        """`metric.result()`. A Python number where the metric is a mean in host memory."""
        is_mean = type(metric).result is keras.metrics.Mean.result and "result" not in vars(metric)
        view = self._of(metric) if is_mean else None
        if view is None:
            return metric.result()
        count = view.count.value
        return _float(view.total.value / count).value if count else 0.0

    def _of(self, metric: Any) -> _View | None:
        """The view of a metric; None where its variables are not float32 numbers in host memory."""
        view = self._views.get(id(metric))
        if view is not None and view.is_of(metric):
            return view
        if len(self._views) >= _MOST:
            self._views.clear()
        view = _View.of(metric)
        if view is not None:
            self._views[id(metric)] = view
        return view


class _View:
    """The memory of a metric's total and count."""

    __slots__ = ("_metric", "_pointers", "_tensors", "count", "total")

    def __init__(self, metric: Any, tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._metric, self._tensors = metric, tensors
        self._pointers = tensors[0].data_ptr(), tensors[1].data_ptr()
        self.total, self.count = map(_float.from_address, self._pointers)

    @classmethod
    def of(cls, metric: Any) -> _View | None:
        """The view of a metric; None where there is none."""
        tensors = metric.total._value, metric.count._value
        plain = all(
            isinstance(one, torch.Tensor) and one.dtype == torch.float32 and one.device.type == "cpu" and not one.ndim
            for one in tensors
        )
        return cls(metric, tensors) if plain and metric.dtype == "float32" else None

    def is_of(self, metric: Any) -> bool:
        """Whether the metric still has these variables, in the same memory."""
        total, count = self._tensors
        return (
            self._metric is metric
            and metric.total._value is total
            and metric.count._value is count
            and (total.data_ptr(), count.data_ptr()) == self._pointers
        )
