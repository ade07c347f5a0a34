"""The search for the largest batch and the fastest one, on machines of a few lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.benchmark.batches import FINE, BatchSearch, Tried, best_of


def card(most: int, half_at: float = 64.0):
    """A device on which so many rows fit; its throughput comes to half of its best at a batch of `half_at` rows."""
    asked = []

    def attempt(batch: int) -> Tried:
        asked.append(batch)
        if batch > most:
            return Tried(batch, reason="CUDA out of memory", no_memory=True)
        return Tried(batch, 1000.0 * batch / (batch + half_at), step_seconds=0.1)

    return attempt, asked


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 8))
def test_the_largest_batch_that_fits_is_found_to_a_sixteenth(most, start, step):
    attempt, asked = card(most)
    found = BatchSearch(attempt, step=step).run(start)
    if most < step:
        assert found["largest"] is None
        assert found["best"] is None
        return
    assert found["largest"] <= most < found["largest"] + max(2 * step, found["largest"] // FINE + step)
    assert all(batch % step == 0 for batch in asked)
    assert len(set(asked)) == len(asked)
    assert found["ended"] == "CUDA out of memory"


def test_a_batch_that_is_as_fast_as_a_larger_one_is_the_best():
    rates = [(8, 500.0), (16, 900.0), (32, 995.0), (64, 1000.0), (128, 700.0)]
    assert best_of([Tried(*one) for one in rates]) == 32
    assert best_of([Tried(8, reason="out of memory")]) is None


def test_what_was_tried_is_told_with_throughput_or_reason():
    attempt, _ = card(20)
    found = BatchSearch(attempt).run(16)
    assert found["tried"][0] == {"batch": 16, "samples_per_second": 200.0}
    assert found["tried"][-1] == {"batch": 32, "reason": "CUDA out of memory"}
    assert found["largest"] == 20


def test_host_memory_is_not_filled_when_larger_batches_are_no_faster():
    attempt, asked = card(10**9, half_at=1.0)
    found = BatchSearch(attempt, free_nbytes=10**12).run(64)
    assert asked == [64, 128, 256, 512]
    assert found["ended"] == "3 doublings in a row were no faster"
    assert found["largest"] == 512
    assert found["best"] == 128


def test_a_batch_that_would_not_fit_into_host_memory_is_not_tried():
    def attempt(batch: int) -> Tried:
        assert batch <= 800
        return Tried(batch, float(batch), nbytes=10**9 + batch * 10**6)

    found = BatchSearch(attempt, free_nbytes=2 * 10**9).run(64)
    assert 560 <= found["largest"] <= 600  # 1.6 of 2 GB
    assert "would take about" in found["ended"]


def test_slow_steps_end_the_search():
    found = BatchSearch(lambda batch: Tried(batch, float(batch), step_seconds=batch / 10)).run(64)
    assert found["largest"] == 128
    assert found["ended"] == "a step takes longer than 10 seconds"


@pytest.mark.parametrize("at", [64, 128])
def test_another_failure_ends_the_search_with_its_reason(at):
    def attempt(batch: int) -> Tried:
        return Tried(batch, reason="ValueError: 100 rows in the file") if batch >= at else Tried(batch, 1.0)

    found = BatchSearch(attempt).run(64)
    assert found["ended"] == "ValueError: 100 rows in the file"
    assert found["largest"] == (None if at == 64 else 64)
