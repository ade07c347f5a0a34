"""Faults in every verb, on every device, for every kind of model: nothing is lost, and training goes on bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from faults import Fault, injected
from trained_kinds import KINDS

import fastdp

DEVICES = 3
# By kind of fault: the class that the error also has. None: no error. `sys.exit` ends the program as anywhere.
ERRORS = {
    "raise": RuntimeError,
    "exit": SystemExit,
    "memory": MemoryError,
    "delay": None,
    "corrupt": FloatingPointError,
}


@pytest.fixture(scope="module", autouse=True)
def three_devices():
    fastdp.set_virtual_devices(DEVICES)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    """A model that meets faults, and one that meets none."""
    name = request.param
    if name != "functions":
        pytest.importorskip("torch")
    if name == "keras":
        pytest.importorskip("keras")
    return KINDS[name](DEVICES), KINDS[name](DEVICES)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.state(), other.state(), strict=True))


def test_a_fault_anywhere_changes_nothing_names_its_place_and_training_goes_on_bit_for_bit(models):
    model, untouched = models
    number = 0
    tried = []
    for verb in model.verbs:
        for device in range(1 if verb in ("reduce", "update") else DEVICES):
            for kind, error in ERRORS.items():
                if kind == "corrupt" and verb not in model.corruptible:
                    continue
                name = f"virtual:{device}" if verb != "reduce" else None
                before = model.state()
                with injected(Fault(verb, name, kind)) as fault:
                    if error is None:
                        model.step(number)
                    else:
                        with pytest.raises(error) as caught:
                            model.step(number)
                assert fault.struck, (verb, device, kind)
                if kind == "exit":
                    assert caught.value.code == 3
                elif error is not None:
                    assert isinstance(caught.value, fastdp.ReplicaError)
                    if kind != "corrupt":
                        assert caught.value.verb == verb
                        assert f"injected in {verb}" in str(caught.value)
                    if verb != "reduce":
                        assert caught.value.device == name, (verb, kind, str(caught.value))
                        assert caught.value.rows is not None
                if error is not None:
                    after = model.state()
                    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=False)), (verb, device, kind)
                    model.step(number)
                untouched.step(number)
                assert same(model, untouched), (verb, device, kind)
                number += 1
                tried.append((verb, device, kind))
    assert len(tried) >= 28
