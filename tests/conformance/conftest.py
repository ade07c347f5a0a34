"""Four visible devices, as COMPAT's table of `gpus` has them, and tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastdp


@pytest.fixture(scope="module", autouse=True)
def visible_devices() -> Iterator[None]:
    """Eight virtual devices, and none afterwards."""
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)
