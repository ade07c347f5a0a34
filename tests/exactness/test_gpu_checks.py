"""The model checks of tests/gpu pass on virtual devices in host memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import model_checks
import torch_checks

from fastdp.backend.host import HostDevice


@pytest.fixture
def hosts():
    made = [HostDevice(i) for i in range(4)]
    yield made
    for device in made:
        device.close(20.0)


@pytest.mark.parametrize("name", sorted(model_checks.KERAS_MODELS))
def test_keras_models(hosts, name):
    assert model_checks.a_keras_model_equals_plain_keras(hosts[:3], name) < 1e-4


def test_adam_and_small_batches(hosts):
    model_checks.a_keras_model_equals_plain_keras(hosts[:2], "mlp", "adam")
    model_checks.a_keras_model_equals_plain_keras(hosts, "mlp", batch_size=3)


def test_placed_layers(hosts):
    model_checks.a_placed_model_equals_plain_keras(hosts, [(1, 3)])


def test_a_torch_module(hosts):
    assert torch_checks.a_torch_module_equals_plain_torch(hosts[:3], "cpu") < 1e-4
