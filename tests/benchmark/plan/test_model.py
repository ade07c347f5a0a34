"""The arithmetic of the plan: a step of one device by its rows, all-reduces beside backward, and scaling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.benchmark.plan.boxes import A100_POINTS, BOXES, Link, own_box
from fastdp.benchmark.plan.compute import Compute
from fastdp.benchmark.plan.model import MARK, Work, bucket_sizes, predicted, reduced_after, step_seconds
from fastdp.shard import BUCKET_NBYTES, FIRST_BUCKET_NBYTES

MIB = 1 << 20
FAST = Link(10e-6, {8: 100e9}, "made up")


def test_a_bucket_takes_its_latency_and_its_share_of_the_bandwidth():
    assert FAST.seconds(100_000_000, 1) == 0.0
    assert FAST.seconds(100_000_000, 2) == pytest.approx(10e-6 + 1e-3)
    assert FAST.seconds(100_000_000, 8) == pytest.approx(10e-6 + 1.75e-3)


def test_a_number_of_gpus_has_the_bandwidth_of_the_next_published_one():
    link = Link(0.0, {4: 35e9, 8: 28e9}, "made up")
    assert [link.bandwidth(n) / 1e9 for n in (2, 4, 5, 8, 16)] == [35, 35, 28, 28, 28]


def test_the_figures_of_the_a100_box_are_those_that_were_published():
    link = BOXES["dgx-a100"].link
    for nbytes, microseconds in A100_POINTS:
        assert 1e6 * link.seconds(nbytes, 8) == pytest.approx(microseconds, rel=0.05)


def test_every_box_has_a_source():
    for box in BOXES.values():
        assert "issue" in box.link.source
        assert box.link.latency > 0
    assert own_box(100, 20).link.seconds(10**9, 2) == pytest.approx(20e-6 + 0.01)


def test_the_first_bucket_is_small_and_all_bytes_are_in_one():
    assert bucket_sizes(60 * MIB) == [FIRST_BUCKET_NBYTES, BUCKET_NBYTES, BUCKET_NBYTES, 9 * MIB]
    assert bucket_sizes(100) == [100]
    assert bucket_sizes(0) == []


def test_without_overlap_all_of_the_all_reduce_is_left():
    buckets = [50_000_000, 50_000_000]
    assert reduced_after(buckets, 1.0, 2, FAST, overlap=False) == pytest.approx(2 * 510e-6)
    assert reduced_after(buckets, 1.0, 1, FAST) == 0.0


def test_with_overlap_the_last_bucket_is_left_where_backward_is_long_and_all_where_it_is_short():
    buckets = [50_000_000, 50_000_000]
    assert reduced_after(buckets, 1.0, 2, FAST) == pytest.approx(510e-6)
    assert reduced_after(buckets, 0.0, 2, FAST) == pytest.approx(2 * 510e-6)
    # Half of backward is 100 us: the first ends at 610 us, the second at 1120, backward at 200.
    assert reduced_after(buckets, 200e-6, 2, FAST) == pytest.approx(920e-6)


def test_two_batches_tell_the_fixed_part_from_the_part_per_row():
    compute = Compute({64: 0.050, 32: 0.028})
    assert (compute.fixed, compute.per_row) == (pytest.approx(0.006), pytest.approx(0.022 / 32))
    assert [compute.seconds(rows) for rows in (16, 32, 48, 64, 96)] == pytest.approx(
        [0.017, 0.028, 0.039, 0.050, 0.072]
    )
    assert "6 ms and 687 us per row" in compute.basis


def test_one_batch_is_taken_to_be_proportional_and_that_is_said():
    compute = Compute({64: 0.064})
    assert compute.seconds(8) == pytest.approx(0.008)
    assert compute.fixed == 0
    assert "assumed to take proportionally less" in compute.basis


@pytest.mark.parametrize(
    ("points", "fixed", "per_row"),
    [({32: 0.01, 64: 0.03}, 0.0, 0.0275 * 32 / 1024 - 3e-4), ({32: 0.03, 64: 0.01}, 0.02, 0.0)],
)
def test_measurements_that_no_line_with_two_positive_parts_fits_lose_one_part(points, fixed, per_row):
    """More than twice the time for twice the rows has no fixed part; less time for more rows is all fixed."""
    compute = Compute(points)
    assert compute.fixed == pytest.approx(fixed)
    assert compute.per_row == (pytest.approx((32 * 0.01 + 64 * 0.03) / (32**2 + 64**2)) if per_row else 0.0)


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {8: 0.0}, {8: -1.0}, {8: float("nan")}])
def test_measurements_that_cannot_be_are_refused(points):
    with pytest.raises(ValueError, match="`points` must be seconds above 0"):
        Compute(points)


points_of_a_card = st.dictionaries(st.integers(1, 512), st.floats(1e-4, 1.0), min_size=1, max_size=4)


@given(points_of_a_card, st.integers(0, 10**9), st.integers(1, 600))
def test_times_are_positive_and_fewer_rows_never_take_longer_than_the_least_measured(points, nbytes, rows):
    work = Work(Compute(points), bucket_sizes(nbytes))
    assert work.compute.seconds(rows) > 0
    assert work.compute.seconds(min(rows, *points)) <= points[min(points)] + 1e-12
    for gpus in range(1, 9):
        for grows in (True, False):
            one = predicted(work, FAST, rows, gpus, grows=grows)
            assert one["efficiency_at_best"] > 0
            assert one["efficiency"] <= one["efficiency_at_best"] + 1e-12
            assert one["all_reduce_seconds_after_backward"] <= one["all_reduce_seconds"] + 1e-9


def test_a_step_is_computing_or_the_host_whichever_is_longer_and_what_is_left():
    work = Work(Compute({128: 8e-3, 64: 5e-3, 32: 3e-3, 16: 2e-3}), [])
    assert [step_seconds(work, FAST, 128, n, jitter=0.0) for n in (1, 2, 4, 8)] == [8e-3, 5e-3, 3e-3, 2e-3]
    held_up = Work(work.compute, [], host=1e-3)
    assert step_seconds(held_up, FAST, 128, 8, jitter=0.0) == pytest.approx(8e-3)
    assert predicted(held_up, FAST, 128, 8, grows=False)["bound_by"] == "host"
    buckets = Work(work.compute, [10**9])
    assert predicted(buckets, FAST, 128, 8, grows=False)["bound_by"] == "all-reduce"
    assert predicted(work, FAST, 128, 8, grows=False)["bound_by"] == "compute"


def test_a_batch_for_each_gpu_keeps_the_step_and_multiplies_the_samples():
    work = Work(Compute({64: 0.05}), [])
    one, eight = (predicted(work, FAST, 64, n, grows=True, jitter=0.0) for n in (1, 8))
    assert (one["rows"], eight["rows"]) == (64, 512)
    assert eight["step_seconds"] == one["step_seconds"]
    assert eight["speedup"] == pytest.approx(8)
    assert one["what"] == eight["what"] == MARK


def test_the_slowest_of_devices_that_differ_counts():
    work = Work(Compute({64: 0.1}), [])
    assert step_seconds(work, FAST, 64, 1, jitter=0.1) == pytest.approx(0.1)
    assert step_seconds(work, FAST, 512, 8, jitter=0.1) == pytest.approx(0.1 * 1.14236)


def test_with_fewer_rows_than_gpus_fewer_run():
    work = Work(Compute({64: 0.064}), bucket_sizes(10**6))
    assert step_seconds(work, FAST, 3, 8) == step_seconds(work, FAST, 3, 3)


def test_gradients_in_half_the_bytes_take_half_the_time_on_a_slow_link():
    slow = BOXES["pcie4"].link
    full, half = (Work(Compute({64: 1e-4}), bucket_sizes(nbytes)) for nbytes in (800 * MIB, 400 * MIB))
    times = [predicted(work, slow, 64, 8, grows=True)["all_reduce_seconds"] for work in (full, half)]
    assert times[0] / times[1] == pytest.approx(2, rel=0.02)
