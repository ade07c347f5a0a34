"""Compiled steps of a model that goes on without a lost device: they are used there too, or compiled anew for it."""

from __future__ import annotations

import numpy as np
import pytest
from faults import Fault, injected
from trained_kinds import KINDS

import fastdp
from fastdp.capture import patience
from fastdp.capture.compile.compiler import missing_compiler
from fastdp.capture.speed_trial import STEPS

SECONDS = 300.0  # for the compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_compiler() is not None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:fastdp. virtual"),
]


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def hows(parallel):
    """How steps, and the passes of loops, run. The pass in which a device is lost is repeated once."""
    return {entry["how"] for entry in (parallel.report().passes or parallel.report()) if entry["steps"] > 1}


@pytest.mark.parametrize(("name", "shards"), [("torch step", 4), ("torch loop", None), ("keras", None)])
def test_the_compiled_form_takes_over_on_the_devices_that_are_left(name, shards):
    options = {"normalizes": False, "dtype": "float64", "on_device_loss": "continue", "shards": shards}
    model, untouched = (KINDS[name](devices, **options, compile=how) for devices, how in ((2, "inductor"), ([2], None)))

    def step(*numbers, kind="delay"):
        for number in numbers:
            with injected(Fault("run", f"virtual:1{' (part 0)' if shards else ''}", kind)):
                model.step(number)
            untouched.step(number)
            for one, other in zip(model.state(), untouched.state(), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-7)

    step(0, 3)  # batches of as many rows
    if shards:  # the rows of a shard stay, and so does what is compiled for them
        model.parallel.wait_compiled(SECONDS)
        step(6)
        assert hows(model.parallel) == {"compiled"}
    step(9, kind="lose")
    step(12, 15)
    model.parallel.wait_compiled(SECONDS)
    step(18, 21, 24)
    assert hows(model.parallel) == {"compiled"}
    assert model.parallel.rejoin_devices() == ["virtual:1"]
    step(27, 30)


def test_steps_that_choose_their_form_begin_anew_on_the_devices_that_are_left(monkeypatch):
    """A device is lost while compiled steps are timed against other forms: on the one that is left all begins anew."""
    for wait in ("TRACE_SECONDS", "TRACE_STEPS", "COMPILE_PATIENCE"):
        monkeypatch.setattr(patience, wait, 0.0)
    options = {"normalizes": False, "dtype": "float64", "on_device_loss": "continue"}
    model, untouched = (KINDS["keras"](devices, **options, compile=how) for devices, how in ((2, "auto"), ([2], None)))
    numbers = iter(range(0, 300, 3))  # batches of as many rows

    def step(count=1, kind="delay"):
        for _, number in zip(range(count), numbers, strict=False):
            with injected(Fault("run", "virtual:1", kind)):
                model.step(number)
            untouched.step(number)
            for one, other in zip(model.state(), untouched.state(), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-7)

    step(3)
    model.parallel.wait_compiled(SECONDS)
    step(4)
    (entry,) = model.parallel.report()
    assert entry["how"] == "compiled"
    assert entry["why"].startswith("being timed")
    step(kind="lose")
    step(3)
    (entry,) = model.parallel.report()
    assert (entry["how"], entry["rows"], entry["of"]) == ("traced", 12, 12)
    model.parallel.wait_compiled(SECONDS)
    step(2 * STEPS + 1)
    (entry,) = model.parallel.report()
    assert "being timed" not in entry.get("why", "")
    assert model.parallel.rejoin_devices() == ["virtual:1"]
    step(2)
