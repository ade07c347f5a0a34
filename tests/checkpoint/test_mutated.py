"""Mutated checkpoints: a restart finds a whole one, or raises its own error (see tests/shared/checkpoint_fuzzer.py)."""

from __future__ import annotations

import checkpoint_fuzzer
import pytest

import fastdp


@pytest.mark.parametrize(("kind", "tries"), [("functions", 60), ("torch", 15)])
def test_a_restart_never_does_anything_else(kind, tries):
    if kind == "torch":
        pytest.importorskip("torch")
    try:
        outcomes = checkpoint_fuzzer.main(kind, tries, 3)
    finally:
        fastdp.set_virtual_devices(0)
    assert sum(outcomes.values()) == tries
    assert outcomes["restored step 2"] > 0  # the one before was used
