"""Updates Keras's own mean metrics by a graph of their operations, traced once, instead of by Keras's Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
import torch
from keras.src.trainers.compile_utils import CompileMetrics, MetricsList

from fastdp.capture import trace
from fastdp.errors import NotCapturable, OthersBusyError
from fastdp.program.keras.capture.own_code import is_keras

_MOST = 8  # kinds of batches that are known at a time
Run = Callable[..., Any]
_WRAPPER = keras.metrics.MeanMetricWrapper


class CapturedMetrics:
    """The update of the metrics from `compile(metrics=...)`: the operations of Keras, so the same bits.

    Args:
        alone: makes a context within which no engine of the process runs a step, as for any trace.

    A graph is used for batches of the same structure, shapes and dtypes, while functions, settings and dtypes of the
    metrics are what they were. Metrics that are no means of a function of Keras's, masks, autocast, and tensors outside
    of host memory are left to Keras.
    """

    def __init__(self, alone: Callable[[], AbstractContextManager[None]]) -> None:
        self._alone = alone
        self._graphs: dict[Hashable, Run | None] = {}
        self._latest: tuple[Any, Run, list[Any]] | None = None

    def update(self, compiled: Any, y: Any, y_pred: Any, sample_weight: Any, *, unchanged: bool = False) -> None:
        """`compiled.update_state(y, y_pred, sample_weight)`. Values of the metrics are assigned in place.

        Args:
            compiled, y, y_pred, sample_weight: as for Keras.
            unchanged: only fastdp and Keras have run since the last call, whose batch had the same form.
        """
        given = (y, y_pred, sample_weight)
        leaves = keras.tree.flatten(given)
        if unchanged and self._latest is not None and self._latest[0] is compiled and all(map(_is_plain, leaves)):
            _run(*self._latest[1:], leaves)
            return
        self._latest = None
        metrics = [*means_of(compiled)] if compiled.built and all(map(_is_plain, leaves)) else []
        variables = [variable for metric in metrics for variable in (metric.total, metric.count)]
        if not variables or torch._C._is_any_autocast_enabled() or not all(_is_plain(v._value) for v in variables):
            compiled.update_state(*given)
            return
        arguments = [*(variable._value for variable in variables), *(leaf for leaf in leaves if leaf is not None)]
        key = (id(compiled), _form(given), *map(_settings, metrics), *((t.shape, t.dtype) for t in arguments))
        key = (*key, keras.config.floatx(), keras.config.epsilon())
        if key not in self._graphs:
            if len(self._graphs) >= _MOST:
                self._graphs.clear()
            try:
                self._graphs[key] = self._traced(compiled, given, variables, arguments)
            except OthersBusyError:
                compiled.update_state(*given)
                return
        graph = self._graphs[key]
        if graph is None:
            compiled.update_state(*given)
            return
        self._latest = compiled, graph, variables
        _run(graph, variables, leaves)

    def _traced(self, compiled: Any, given: Any, variables: list[Any], arguments: list[torch.Tensor]) -> Any:
        """The graph from values of the variables and leaves to the new values; None if torch cannot trace it."""

        def update(*flat: torch.Tensor) -> list[torch.Tensor]:
            values, leaves = flat[: len(variables)], iter(flat[len(variables) :])
            nest = keras.tree.map_structure(lambda is_absent: None if is_absent else next(leaves), absent)
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
                compiled.update_state(*nest)
            return [scope.get_current_value(variable) for variable in variables]

        # What is traced may be kept in cycles for a while, and outputs lie in memory that steps use again.
        arguments = [torch.empty_like(tensor) for tensor in arguments]
        absent = keras.tree.map_structure(lambda leaf: leaf is None, given)
        try:
            with self._alone(), torch.no_grad():
                graph = trace.graph_of(update, arguments)
        except NotCapturable:
            return None
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph.forward


def _run(graph: Run, variables: list[Any], leaves: list[Any]) -> None:
    """Assign the new values of variables."""
    tensors = [variable._value for variable in variables]
    given = [leaf for leaf in leaves if leaf is not None]
    with torch.no_grad(), trace.as_traced():
        for tensor, value in zip(tensors, graph(*tensors, *given), strict=True):
            tensor.copy_(value)


def means_of(compiled: Any) -> Iterator[Any]:
    """The metrics of `compile(metrics=...)`, if all are means of functions of Keras's own; else none."""
    lists = [one for one in (*compiled._flat_metrics, *compiled._flat_weighted_metrics) if one]
    metrics = [metric for one in lists if type(one) is MetricsList for metric in one.metrics if metric is not None]
    plain = type(compiled) is CompileMetrics and all(type(one) is MetricsList for one in lists)
    if plain and all(map(_is_mean, metrics)):
        yield from metrics


def are_kerass(compiled: Any) -> bool:
    """Whether no metric of `compile(metrics=...)` runs code of the user's. None: there are no metrics."""
    if compiled is None:
        return True
    every = (
        [*each_metric(compiled._flat_metrics), *each_metric(compiled._flat_weighted_metrics)] if compiled.built else []
    )
    return type(compiled) is CompileMetrics and bool(every) and all(map(_is_kerass, every))


def each_metric(metrics: Any) -> Iterator[Any]:
    """Metrics, and those that they consist of."""
    for metric in metrics:
        if metric is not None:
            yield metric
            yield from each_metric(getattr(metric, "metrics", ()))


def _is_kerass(metric: Any) -> bool:
    own = {"update_state", "result", "reset_state"} & vars(metric).keys()
    return is_keras(type(metric)) and is_keras(getattr(metric, "_fn", type(metric))) and not own


def _is_mean(metric: Any) -> bool:
    kind = type(metric)
    is_mean = isinstance(metric, _WRAPPER) and kind.update_state is _WRAPPER.update_state
    return is_mean and _is_kerass(metric) and len(metric.variables) == 2


def _settings(metric: Any) -> Hashable:
    """What an update reads of a metric."""
    return id(metric), metric._fn, metric.dtype, *((name, repr(value)) for name, value in metric._fn_kwargs.items())


def _form(given: Any) -> Hashable:
    """The structure of a nest."""
    return repr(keras.tree.map_structure(lambda leaf: leaf is None, given))


def _is_plain(leaf: Any) -> bool:
    """Whether a graph may take a value: a tensor in host memory without a mask, or none."""
    return leaf is None or (
        isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and getattr(leaf, "_keras_mask", None) is None
    )
