"""The checks of tests/gpu hold for the kernels compiled for the CPU: what they find on a card is the card's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import kernel_checks as checks


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("cast", [None, "bfloat16"])
def test_rows(host, shuffled, cast):
    checks.slice_rows(host, 1030, cast, shuffled=shuffled, leads=(3, 4), seed=1)
    checks.slice_rows_out_of_range(host)
    checks.concat_rows(host, [3, 0, 5], 784, 5, 0)


def test_elementwise(host):
    checks.scale_cast(host, 1000, "uint8", "float16", 0.125, 1)
    checks.all_16_bit_numbers(host, "bfloat16")
    for bad in (None, float("nan")):
        checks.check_finite(host, 130, "float16", bad)
    checks.l2_norm(host, [("float32", 10_007), ("bfloat16", 1)], 0.5)


@pytest.mark.parametrize("pair", checks.PAIRS)
def test_optimizers(host, pair):
    checks.fused_sgd(host, 130, pair, 0.9, True, 0.25)
    checks.fused_adam(host, 130, pair, True, 0.25)


@pytest.mark.parametrize("kind", ["one_shot", "two_shot", "reduce_scatter"])
def test_all_reduce(host, kind):
    checks.all_reduce(host, kind, 1, 130, "float16", blocks=2, threads=8, turns=2)
    checks.all_reduce(host, kind, 3, 1000, "float32", blocks=2, threads=8, turns=3)


def test_a_wrong_kernel_is_found(host, monkeypatch):
    """The checks can fail: here the kernel gets another offset than the twin."""
    monkeypatch.setattr(checks.launch, "concat_rows", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError):
        checks.concat_rows(host, [1, 2], 16, 0, 0)
