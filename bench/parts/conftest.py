"""The fixture of the timed parts, virtual devices closed after a test. Also puts the folder bench/ on the path."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).parents[1]))

from fastdp.runtime.host.device import HostDevice


@pytest.fixture
def devices() -> Iterator[Callable[[int], list[HostDevice]]]:
    """A function that makes new virtual devices, which are closed after the test."""
    made: list[HostDevice] = []

    def make(count: int) -> list[HostDevice]:
        made.extend(HostDevice(index) for index in range(count))
        return made[-count:]

    yield make
    for device in made:
        device.close()
