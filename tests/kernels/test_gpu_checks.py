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
    checks.slice_rows_to_places(host, 1030, cast, (3, 4))
    checks.concat_rows(host, [3, 0, 5], 784, 5, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_of_16_bits(host, dtype):
    checks.all_16_bit_numbers(host, dtype)
    checks.rounding(host, dtype)
    checks.overflow_and_nan(host, dtype)


@pytest.mark.parametrize("kind", ["one_shot", "two_shot", "reduce_scatter"])
def test_all_reduce(host, kind):
    checks.all_reduce(host, kind, 1, 130, "float16", blocks=2, threads=8, turns=2)
    checks.all_reduce(host, kind, 3, 1000, "float32", blocks=2, threads=8, turns=3)


def test_a_wrong_kernel_is_found(host, monkeypatch):
    """The checks can fail: here the kernel gets another offset than the twin."""
    monkeypatch.setattr(checks.launch, "concat_rows", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError):
        checks.concat_rows(host, [1, 2], 16, 0, 0)
