"""Virtual devices, and the same global random state for every test."""

from __future__ import annotations

import pytest

import fastdp


@pytest.fixture(autouse=True)
def eight_virtual_devices():
    import torch  # not above: without torch the tests here are left out, and this file is still read

    fastdp.set_virtual_devices(8)
    torch.manual_seed(0)
    yield
    fastdp.set_virtual_devices(0)
