"""The model checks of tests/gpu pass on virtual devices in host memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import kinds_checks
import model_checks
import torch_checks

from fastdp.runtime.host.device import HostDevice


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


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_data_sets_on_the_devices(hosts, name):
    model_checks.a_data_set_on_the_devices_equals_arrays(hosts[:3], name)


def test_placed_layers(hosts):
    model_checks.a_placed_model_equals_plain_keras(hosts, [(1, 3)])


def test_a_torch_module(hosts):
    assert torch_checks.a_torch_module_equals_plain_torch(hosts[:3], "cpu") < 1e-4


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_traced_steps_beside_eager_ones(hosts, name):
    assert kinds_checks.a_kind_of_steps_gives_the_losses_of_eager_ones(hosts, name, "traced") < 1e-4


def test_eager_steps_repeat_bit_for_bit(hosts):
    assert kinds_checks.a_kind_of_steps_gives_the_losses_of_eager_ones(hosts[:2], "cnn", "eager") == 0.0


@pytest.mark.slow
def test_compiled_steps_beside_eager_ones(hosts):
    assert kinds_checks.a_kind_of_steps_gives_the_losses_of_eager_ones(hosts[:2], "cnn", "compiled") < 1e-4


def test_steps_that_did_not_become_what_was_asked_for_fail_the_check(hosts, monkeypatch):
    monkeypatch.setattr(kinds_checks, "options_of", lambda kind: {"compile": None})
    with pytest.raises(AssertionError, match="'how': 'eager'"):
        kinds_checks.a_kind_of_steps_gives_the_losses_of_eager_ones(hosts[:2], "mlp", "traced")
