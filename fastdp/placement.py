"""`fastdp.device`: places parts of a model on devices inside a replica while the model is built."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME = re.compile(r"/?(?:(?:gpu|cuda|virtual):(\d+)|(?:cpu|host)(?::0)?)", re.IGNORECASE)


@contextmanager
def device(place: Any) -> Iterator[None]:
    """Place Keras layers that are created or called in this context, while a Functional or Sequential model is built.

    The number counts the devices within a replica: with `fastdp.wrap(model, gpus=[(0, 1), (2, 3)])` the first replica
    runs layers placed on "gpu:1" on device 1, the second replica on device 3. Layers without a place, or on "cpu", run
    on the replica's first worker. The place of a call overrides the place of its layer. Saved files do not keep places.

    Args:
        place: "gpu:1", "virtual:1" (the same), or 1; "cpu" for the host.

    Raises:
        ValueError: `place` is none of these.

    Example:
        >>> with fastdp.device("gpu:1"):  # doctest: +SKIP
        ...     encoded_b = shared_lstm(tweet_b)
    """
    number = _number(place)
    # Keras is imported only when a Keras model is built.
    placed = importlib.import_module("fastdp.keras.placement").placed
    with placed(number):
        yield


def _number(place: Any) -> int | None:
    """The device's number within a replica; None for the host."""
    if isinstance(place, int) and not isinstance(place, bool) and place >= 0:
        return place
    match = _NAME.fullmatch(place) if isinstance(place, str) else None
    if match is None:
        raise ValueError(
            '`place` must be "gpu:1", "virtual:1", a whole number >= 0, or "cpu". '
            f"Received: place={place!r} (of type {type(place).__name__})"
        )
    return None if match[1] is None else int(match[1])
