"""Scatter gives views of the right rows; merge puts them back, and refuses what it would have to guess."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.comm.batch import count_rows
from fastdp.comm.scatter_merge import Merger, scatter
from fastdp.runtime.host.device import HostDevice
from fastdp.shard import split_rows

HOSTS = [HostDevice(index) for index in range(9)]


def merged(total, parts, make, order=None):
    """The outputs `make(rows)` of all replicas, merged; written in `order`."""
    shards = split_rows(total, parts)
    merger = Merger(shards, HOSTS, HOSTS[0])
    for rank in order or range(len(shards)):
        merger.write(rank, [np.asarray(output) for output in make(shards[rank])])
    return merger.result()


def test_scatter_gives_views_without_copies():
    x, y = np.arange(22).reshape(11, 2), np.arange(11.0)
    parts = scatter([x, y], split_rows(11, 4), HOSTS)
    assert [len(part[0]) for part in parts] == [3, 3, 3, 2]
    for i, whole in enumerate((x, y)):
        assert all(np.shares_memory(part[i], whole) for part in parts)
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole)


@given(total=st.integers(1, 60), parts=st.integers(1, 9), per_row=st.integers(1, 3), data=st.data())
def test_merge_restores_the_row_order_for_any_split_and_any_order_of_arrival(total, parts, per_row, data):
    whole = np.arange(total * per_row * 2).reshape(total * per_row, 2)
    order = data.draw(st.permutations(range(min(total, parts))))
    (result,) = merged(total, parts, lambda r: [whole[per_row * r.start : per_row * r.stop]], order)
    np.testing.assert_array_equal(result, whole)
    assert not np.shares_memory(result, whole)


def test_a_scalar_is_averaged_by_rows():
    (mean,) = merged(5, 2, lambda r: [np.float32(10.0 if r.start == 0 else 20.0)])  # 3 rows and 2
    assert mean.dtype == np.float32
    assert mean == pytest.approx((3 * 10 + 2 * 20) / 5)


@pytest.mark.parametrize("parts", range(1, 12))
@pytest.mark.parametrize("value", [np.int64(7), np.float64(0.1), np.bool_(True), np.complex64(1 + 2j)])
def test_a_scalar_that_all_replicas_share_stays_as_it_is(parts, value):
    (mean,) = merged(11, parts, lambda r: [value])
    assert mean.dtype == value.dtype
    assert mean == pytest.approx(value, rel=1e-15) if value.dtype.kind in "fc" else mean == value


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (([np.zeros(3)], [np.zeros(3)]), "Output 0 .* first axis .*multiple of 2 .*shape \\(3,\\)"),
        (([np.zeros(4)], [np.zeros(4)]), "Output 0 .* first axis .*multiple of 3"),
        (([np.zeros((3, 4))], [np.zeros((2, 1))]), "Output 0 .* dtype and row shape"),
        (([np.zeros((3, 4))], [np.zeros((2, 5))]), "Output 0 .* dtype and row shape"),
        (([np.zeros((3, 4))], [np.zeros(2)]), "Output 0 .* dtype and row shape"),
        (([np.zeros(3)], [np.zeros(())]), "Output 0 .* dtype and row shape"),
        (([np.zeros(())], [np.zeros(2)]), "Output 0 .* dtype and row shape"),
        (([np.zeros(3, int)], [np.full(2, 0.5)]), "Output 0 .* same dtype"),
        (([np.zeros(3)], [np.zeros(2), np.zeros(2)]), "same number of outputs"),
        (([np.zeros(0)], [np.zeros(0)]), "Output 0 .* first axis"),
    ],
)
def test_outputs_that_do_not_fit_together_are_refused_with_the_reason(outputs, message):
    shards = split_rows(5, 2)
    merger = Merger(shards, HOSTS, HOSTS[0])

    def write():
        for rank, parts in enumerate(outputs):
            merger.write(rank, parts)

    with pytest.raises(ValueError, match=message):
        write()


def test_replicas_may_write_at_the_same_time():
    total, parts = 1001, 8
    shards, whole = split_rows(total, parts), np.random.default_rng(0).normal(size=(total, 17))
    for _ in range(20):
        merger, gate = Merger(shards, HOSTS, HOSTS[0]), threading.Barrier(parts)

        def write(rank, merger=merger, gate=gate):
            gate.wait(10)
            merger.write(rank, [whole[shards[rank].start : shards[rank].stop], np.float64(rank)])

        threads = [threading.Thread(target=write, args=(rank,)) for rank in range(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        rows, mean = merger.result()
        np.testing.assert_array_equal(rows, whole)
        assert mean == pytest.approx(sum(rank * shard.share for rank, shard in enumerate(shards)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], "empty batch"),
        ([np.zeros(3), np.zeros(())], r"\['array 1'\] have no axis"),
        ([np.zeros(3), np.zeros((4, 3))], "same number of rows.*'array 0': 3, 'array 1': 4"),
        ([np.zeros((0, 3))], "at least one row"),
    ],
)
def test_a_batch_without_a_row_count_is_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        count_rows(arrays)


def test_the_names_of_a_batch_appear_in_the_message():
    with pytest.raises(ValueError, match=r"'x': 3, 'y': 4"):
        count_rows([np.zeros(3), np.zeros(4)], ["x", "y"])
    assert count_rows([np.zeros((3, 0)), np.zeros(3)]) == 3
