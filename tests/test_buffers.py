"""Flat buffers: where the arrays lie, and that views, copies and comparisons see the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.buffers import ArraySpec, FlatBuffers, Home, storage_dtype
from fastdp.runtime.host.device import HostDevice

DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int64", "bool", "complex64", "float8_e4m3fn"]


class Dirty(HostDevice):
    """A device whose memory is not zero, as memory that was used before is not."""

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        array.view(np.uint8)[...] = 0xAB
        return array


dirty = Dirty(0)  # a device has a thread only once it has work


specs = st.lists(
    st.builds(
        ArraySpec,
        name=st.just("x"),
        shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
        dtype=st.sampled_from(DTYPES),
    ),
    max_size=12,
)


@given(specs=specs)
def test_every_array_begins_at_64_bytes_and_aliases_its_buffer(specs):
    flat = FlatBuffers(specs, dirty)
    for view, spec in zip(flat.views, specs, strict=True):
        buffer = flat.buffers[spec.dtype]
        assert view.shape == spec.shape
        assert view.dtype == buffer.dtype == storage_dtype(spec.dtype)
        if view.size:
            assert view.__array_interface__["data"][0] % 64 == 0
            assert np.shares_memory(view, buffer)
    assert flat.nbytes == sum(buffer.nbytes for buffer in flat.buffers.values())


@given(specs=specs)
def test_arrays_do_not_overlap_and_the_gaps_are_zero(specs):
    flat = FlatBuffers(specs, dirty)
    for number, view in enumerate(flat.views):
        assert not view.any()
        view[...] = number % 2 + 1
    for number, view in enumerate(flat.views):
        assert (view == np.asarray(number % 2 + 1, view.dtype)).all()
        view[...] = 0
    assert not any(buffer.view(np.uint8).any() for buffer in flat.buffers.values())


@given(specs=specs, first=st.integers(1, 500), cap=st.integers(1, 900))
def test_buckets_cover_each_buffer_from_its_last_array_to_its_first(specs, first, cap):
    flat = FlatBuffers(specs, dirty)
    buckets = flat.buckets(first, cap)
    for dtype, buffer in flat.buffers.items():
        mine = [bucket for bucket in buckets if bucket.dtype == dtype]
        assert [i for b in mine[::-1] for i in range(b.start, b.stop)] == list(range(buffer.size))
        assert [n for b in mine[::-1] for n in b.arrays] == [n for n, s in enumerate(specs) if s.dtype == dtype]
        for bucket in mine:
            spans = [flat._spans[number] for number in bucket.arrays]
            assert all(bucket.start <= start <= stop <= bucket.stop for start, stop in spans)
    assert [bucket.arrays[0] for bucket in buckets] == sorted((b.arrays[0] for b in buckets), reverse=True)
    assert {bucket.dtype for bucket in buckets} <= set(flat.buffers)


def test_a_bucket_never_cuts_an_array():
    flat = FlatBuffers([ArraySpec("a", (100,), "float32"), ArraySpec("b", (3,), "float32")], dirty)
    assert [(b.start, b.stop) for b in flat.buckets(first=4, cap=8)] == [(112, 128), (0, 112)]


def test_the_first_bucket_is_the_small_one_of_the_last_arrays():
    flat = FlatBuffers([ArraySpec(name, (1000,), "float32") for name in "abcdef"], dirty)
    assert [bucket.arrays for bucket in flat.buckets(first=4000, cap=8100)] == [(5,), (3, 4), (1, 2), (0,)]


def test_scalars_and_arrays_without_elements_have_views():
    flat = FlatBuffers([ArraySpec("s", (), "float32"), ArraySpec("z", (0, 3), "float32")], dirty)
    flat.views[0][...] = 2.5
    assert flat.buffers["float32"][0] == 2.5
    assert flat.views[1].shape == (0, 3)


def test_nothing_at_all_is_fine():
    flat = FlatBuffers([], dirty)
    assert (flat.views, flat.buckets(), flat.nbytes) == ([], [], 0)
    assert flat.equals(FlatBuffers([], dirty))


def pair(dtype="float32"):
    specs = [ArraySpec("a", (5,), dtype)]
    return FlatBuffers(specs, dirty), FlatBuffers(specs, dirty)


def test_equality_is_bitwise_so_a_nan_equals_itself_and_minus_zero_is_not_zero():
    a, b = pair()
    a.views[0][...] = b.views[0][...] = np.nan
    assert a.equals(b)
    a.views[0][...] = 0.0
    b.views[0][...] = -0.0
    assert not a.equals(b)
    assert (a.views[0] == b.views[0]).all()


def test_nans_of_different_bits_differ():
    a, b = pair()
    a.views[0].view(np.uint32)[...] = 0x7FC00000
    b.views[0].view(np.uint32)[...] = 0x7FC00001
    assert not a.equals(b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_bit_is_seen_until_it_is_copied(dtype):
    a, b = pair(dtype)
    a.views[0].view(np.uint8)[-1] ^= 1
    assert not a.equals(b)
    b.copy_from(a)
    assert a.equals(b)
    assert b.views[0].view(np.uint8)[-1] == 1


def test_bfloat16_is_stored_as_uint16_also_where_ml_dtypes_gives_numpy_such_a_dtype():
    pytest.importorskip("ml_dtypes", reason="Keras brings ml_dtypes; without it np.dtype knows no bfloat16")
    assert np.dtype("bfloat16").name == "bfloat16"
    assert storage_dtype("bfloat16") == np.dtype(np.uint16)
    assert storage_dtype("float8_e5m2") == np.dtype(np.uint8)


@pytest.mark.parametrize("name", ["float33", "bfloat61"])
def test_an_unknown_dtype_is_refused(name):
    with pytest.raises(TypeError, match=name):
        storage_dtype(name)


@given(specs=specs, more=specs, data=st.data())
def test_lent_arrays_stay_in_their_place_and_copies_of_the_layout_share_nothing(specs, more, data):
    """Arrays of two lenders and own ones, in any order: each keeps its memory, and runs of them make few buffers."""
    lenders = [FlatBuffers(specs, dirty), FlatBuffers(specs[::-1], dirty)]
    places = [(lender, at) for lender in lenders for at, spec in enumerate(lender.specs) if spec.size]
    lent = dict(enumerate(data.draw(st.permutations(places))))
    flat = FlatBuffers([lender.specs[at] for lender, at in lent.values()] + more, dirty, lent=lent)
    for number, (lender, at) in lent.items():
        assert flat.views[number].__array_interface__ == lender.views[at].__array_interface__
    other = FlatBuffers(flat.specs, dirty, like=flat)
    for number, view in enumerate(flat.views):
        view[...] = number % 2
        assert not other.views[number].any()
    other.copy_from(flat)
    assert other.equals(flat)
    for number, view in enumerate(other.views):
        assert (view == np.asarray(number % 2, view.dtype)).all()
    runs = sum(len(lender.buffers) for lender in lenders) + len({spec.dtype for spec in more})
    assert len(flat.buffers) <= runs, "arrays behind each other are one buffer"


def test_homes_count_the_updates_of_the_memory_that_they_share():
    a, b = (ArraySpec(name, (3,), "float32") for name in "ab")
    first, apart = Home([a, b], dirty), Home([a], dirty)
    whole = Home([a, b, a], dirty, {0: (first, 0), 2: (apart, 0)})
    last = Home([a, b], dirty, {0: (whole, 2), 1: (whole, 1)})
    for one, noticed in ((first, (first, whole)), (apart, (apart, whole, last)), (last, (last, whole, apart))):
        before = [home.generation for home in (first, apart, whole, last)]
        one.advance()
        after = [home.generation for home in (first, apart, whole, last)]
        changed = [
            home for home, was, now in zip((first, apart, whole, last), before, after, strict=True) if was != now
        ]
        assert {*map(id, noticed)} == {*map(id, changed)}
