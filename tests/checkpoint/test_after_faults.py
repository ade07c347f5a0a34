"""A checkpoint that is written after a device was lost, or while rows run in parts, goes on anywhere as any other."""

from __future__ import annotations

import numpy as np
import pytest
import soak
from faults import Fault, injected
from trained_kinds import KINDS

import fastdp

OPTIONS = {"dtype": "float64", "shards": 6, "on_oom": "split", "on_device_loss": "continue"}
pytestmark = pytest.mark.filterwarnings("ignore:fastdp. virtual")


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


def made(name, devices):
    if name != "functions":
        pytest.importorskip("torch")
    more = {} if name == "functions" else {"sync_batch_norm": True, "normalizes": name == "torch step"}
    return KINDS[name](devices, **OPTIONS, **more)


def trained(model, folder, steps, fault=None):
    """Go on up to so many steps. The fault strikes in step 1."""
    with fastdp.Checkpoint(folder, every_steps=1, **model.parts()) as checkpoint:
        checkpoint.restore()
        for number in range(checkpoint.position.step, steps):
            with injected(fault if fault is not None and number == 1 else Fault("none", None, "delay")):
                model.step(number)
            checkpoint.step()


@pytest.mark.parametrize("kind", ["lose", "memory"])
@pytest.mark.parametrize("name", ["functions", "torch step", "torch loop"])
def test_a_run_goes_on_from_the_checkpoint_after_a_loss_or_in_parts(name, kind, tmp_path):
    fault = Fault("run", "virtual:2 (part 0)", kind)
    broken = made(name, 3)
    trained(broken, tmp_path / "broken", 3, fault)
    assert fault.struck
    engine = soak._engine_of(broken)
    assert [*engine.lost_devices] == (["virtual:2"] if kind == "lose" else [])
    assert bool(engine.deal.cuts) == (kind == "memory")
    gone_on, whole = made(name, [5, 6]), made(name, [3, 4])
    trained(gone_on, tmp_path / "broken", 5)
    trained(whole, tmp_path / "whole", 5)
    for one, other in zip(gone_on.state(), whole.state(), strict=True):
        if kind == "lose":
            np.testing.assert_array_equal(one, other)
        else:  # sums of parts have another order
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
