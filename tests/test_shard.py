"""Rows per replica and arrays per bucket: nothing lost, nothing twice, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.shard import Deal, plan_buckets, split_rows

sizes = st.lists(st.integers(0, 60), max_size=40)


@given(total=st.integers(1, 2000), parts=st.integers(1, 40))
def test_rows_cover_the_batch_in_order_and_differ_by_at_most_one(total, parts):
    shards = split_rows(total, parts)
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(total))
    counts = [shard.count for shard in shards]
    assert len(shards) == min(total, parts)
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)
    assert sum(shard.share for shard in shards) == pytest.approx(1.0)
    assert {shard.total for shard in shards} == {total}


@given(total=st.integers(1, 200), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_shares_that_are_cut_keep_their_rows(total, cuts):
    deal = Deal(len(cuts), tuple(cuts))
    parts, shares = deal.rows(total), split_rows(total, len(cuts))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(total))
    assert min(part.count for part in parts) >= 1
    assert len(parts) <= deal.parts == sum(cuts)
    if len(shares) == len(cuts) and all(share.count >= cut for share, cut in zip(shares, cuts, strict=True)):
        assert len(parts) == deal.parts
        assert {share.start for share in shares} <= {part.start for part in parts}
    assert deal.limited(deal.parts - 1) == Deal(deal.parts - 1)
    assert deal.limited(deal.parts) is deal


def test_fewer_rows_than_replicas_leave_replicas_out():
    assert [shard.count for shard in split_rows(3, 8)] == [1, 1, 1]


@pytest.mark.parametrize(("total", "parts", "name"), [(0, 2, "total=0"), (-1, 2, "total=-1"), (3, 0, "parts=0")])
def test_no_rows_and_no_replicas_are_refused(total, parts, name):
    with pytest.raises(ValueError, match=name):
        split_rows(total, parts)


@given(sizes=sizes, first=st.integers(1, 50), cap=st.integers(1, 100))
def test_buckets_cover_all_arrays_in_order_and_none_is_empty(sizes, first, cap):
    buckets = plan_buckets(sizes, first, cap)
    assert [i for start, stop in buckets for i in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in buckets)


@given(sizes=sizes, first=st.integers(1, 50), cap=st.integers(1, 100))
def test_a_bucket_exceeds_its_cap_only_where_one_array_does(sizes, first, cap):
    for number, (start, stop) in enumerate(plan_buckets(sizes, first, cap)):
        limit = cap if number else first
        assert sum(sizes[start:stop]) <= limit or stop - start == 1


@given(sizes=sizes, first=st.integers(1, 50), cap=st.integers(1, 100))
def test_a_bucket_ends_only_where_the_next_array_does_not_fit(sizes, first, cap):
    for number, (start, stop) in enumerate(plan_buckets(sizes, first, cap)):
        limit = cap if number else first
        assert stop == len(sizes) or sum(sizes[start : stop + 1]) > limit


def test_the_first_bucket_is_small():
    assert plan_buckets([4, 4, 4, 4], first=4, cap=8) == [(0, 1), (1, 3), (3, 4)]
