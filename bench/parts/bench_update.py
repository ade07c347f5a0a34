"""The update alone: Keras's optimizers on the variables of an MLP and of ResNet50, as the engine applies them."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["KERAS_BACKEND"] = "torch"

import pytest
from optimizers import OPTIMIZERS, parallel, update
from virtual_devices import mlp, resnet50

import fastdp


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    """One virtual device."""
    fastdp.set_virtual_devices(1)
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.parametrize("build", [mlp, resnet50], ids=lambda build: build.__name__)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_update(benchmark, build, kind):
    """fastdp's update, on flat buffers if the optimizer allows it."""
    benchmark(update(parallel(build, OPTIMIZERS[kind](), flat=True)))
