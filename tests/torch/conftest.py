"""Virtual devices, and the same global random state for every test."""

from __future__ import annotations

import pytest
import torch

import fastdp


@pytest.fixture(autouse=True)
def eight_virtual_devices():
    fastdp.set_virtual_devices(8)
    torch.manual_seed(0)
    yield
    fastdp.set_virtual_devices(0)
