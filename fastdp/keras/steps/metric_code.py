"""Whether the metrics of a model run code of the user's between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keras.src.trainers.compile_utils import CompileMetrics

from fastdp.program.keras.capture.own_code import is_keras


def are_kerass(compiled: Any) -> bool:
    """Whether no metric of `compile(metrics=...)` runs code of the user's. None: there are no metrics."""
    if compiled is None:
        return True
    if type(compiled) is not CompileMetrics or not compiled.built:
        return False
    every = [*each_metric(compiled._flat_metrics), *each_metric(compiled._flat_weighted_metrics)]
    return bool(every) and all(map(_is_kerass, every))


def each_metric(metrics: Any) -> Iterator[Any]:
    """Metrics, and those that they consist of."""
    for metric in metrics:
        if metric is not None:
            yield metric
            yield from each_metric(getattr(metric, "metrics", ()))


def _is_kerass(metric: Any) -> bool:
    own = {"update_state", "result", "reset_state"} & vars(metric).keys()
    return is_keras(type(metric)) and is_keras(getattr(metric, "_fn", type(metric))) and not own
