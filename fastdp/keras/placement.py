"""Notes on which device `fastdp.device` places each call of a Functional model while it is built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.ops.node import Node

from fastdp.patching import Patch
from fastdp.program.keras.placement.graph import PLACE, graph_of, placed_nodes
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.select import resolve


class _Thread(threading.local):
    """The device numbers of the open `placed` scopes on this thread, innermost last."""

    places: tuple[int | None, ...] = ()


_thread = _Thread()


@contextmanager
def placed(number: int | None) -> Iterator[None]:
    """Record `number` on each layer that this thread makes and each call of a layer that it records in a graph."""
    outer = _thread.places
    with _constructors:
        _thread.places = (*outer, number)
        try:
            yield
        finally:
            _thread.places = outer


def _noting(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor to record the place on the new object."""

    def init(made: Any, *args: Any, **kwargs: Any) -> None:
        original(made, *args, **kwargs)
        if _thread.places:
            made.__dict__[PLACE] = _thread.places[-1]

    return init


_constructors = Patch((owner, "__init__", _noting) for owner in (Node, keras.layers.Layer))


def spans_groups(gpus: Any) -> bool:
    """Whether `gpus` gives replicas several devices, as `[(0, 1), (2, 3)]` does."""
    return isinstance(gpus, (list, tuple)) and any(isinstance(group, (list, tuple)) for group in gpus)


def resolve_groups(gpus: Any) -> list[list[QueueDevice]]:
    """The devices of each replica.

    Raises:
        ValueError: an entry is not a group, a device occurs twice, or `gpus` is invalid otherwise.
    """
    if not all(isinstance(group, (list, tuple)) and group for group in gpus):
        raise ValueError(
            "`gpus` must name devices, such as [0, 1], or a group of devices for each replica, such as "
            f"[(0, 1), (2, 3)]. Received: gpus={gpus!r}"
        )
    devices = iter(resolve([number for group in gpus for number in group]))
    return [[next(devices) for _ in group] for group in gpus]


def check_places(model: keras.Model, groups: Sequence[Sequence[QueueDevice]] | None) -> None:
    """Check that every layer's place is a device of each replica.

    Raises:
        ValueError: a place is missing in a replica, replicas have several devices but the model has no places, or a
            model inside this one has places.
    """
    nodes = placed_nodes(graph_of(model))
    highest = max((place for _, place in nodes if place is not None), default=0)
    inside = [layer.name for layer in model._flatten_layers() if layer is not model and _has_places(layer)]
    if inside and groups is not None:
        raise ValueError(
            f"The model {inside[0]!r} inside of {model.name!r} has layers that fastdp.device placed. Place the call of "
            "the whole inner model instead."
        )
    if groups is None:
        if highest:
            numbers = tuple(range(highest + 1))
            raise ValueError(
                f"The model {model.name!r} has layers that fastdp.device placed on device {highest}, so a replica "
                f"needs {highest + 1} devices. Give a group of them for each replica, such as gpus=[{numbers}]."
            )
        return
    if not nodes:
        raise ValueError(
            f"No layer of {model.name!r} is placed, so a replica has no use for several devices. Build it with "
            "`with fastdp.device(...)` around its branches (Functional and Sequential models), or use gpus=[0, 1]."
        )
    short = [group for group in groups if len(group) <= highest]
    if short:
        raise ValueError(
            f"The model {model.name!r} has layers placed on device {highest} of a replica, but a group of `gpus` has "
            f"{len(short[0])} device(s): {[device.name for device in short[0]]}. Each needs {highest + 1}."
        )


def _has_places(layer: keras.Layer) -> bool:
    """Whether a layer is a model whose own layers have places."""
    return isinstance(layer, keras.Model) and any(place for _, place in placed_nodes(graph_of(layer)))
