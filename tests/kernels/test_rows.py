"""slice_rows and concat_rows put every row where it belongs, whatever its length and alignment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp import launch
from fastdp.launch import RowPiece, RowSlice
from fastdp.launch import reference as twins

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
SOURCE_ROWS = 23

# Bytes per row: odd, even, of every width of an access, longer than what a block copies at a time.
ROW_NBYTES = st.one_of(
    st.sampled_from([1, 2, 4, 8, 12, 16, 48, 784, 1023, 1024, 1030, 3072, 20_000, 32_784]), st.integers(0, 40_000)
)


def random_bytes(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def poisoned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """What fresh memory of the device holds."""
    return np.full(shape, 0xCD, np.uint8).view(np.uint8) if dtype == np.uint8 else poison_words(shape, dtype)


def poison_words(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.full(nbytes, 0xCD, np.uint8).view(dtype).reshape(shape)


def same_bytes(actual: np.ndarray, expected: np.ndarray) -> bool:
    return actual.tobytes() == expected.tobytes()


array_specs = st.fixed_dictionaries(
    {
        "row": ROW_NBYTES,
        "rows": st.integers(0, 12),
        "first_row": st.integers(0, 11),
        "leads": st.tuples(st.integers(0, 15), st.integers(0, 15)),
        "cast": st.sampled_from([None, None, *FLOATS]),
    }
)


def check_slices(host, specs, index, seed):
    """Run one launch over all arrays and compare each with the twin; returns (error flag, expected flag)."""
    with host.scope():
        slices, results, out_of_range = [], [], False
        for number, spec in enumerate(specs):
            cast, row = spec["cast"], spec["row"] // (8 if spec["cast"] else 1)
            source = random_bytes((SOURCE_ROWS, row), seed + number)
            expected = poisoned((spec["rows"], row), FLOATS.get(cast, np.uint8))
            out_of_range |= bool(row) and twins.slice_rows(
                source, expected, first_row=spec["first_row"], index=index, scale=1 / 127.5, offset=-1.0
            )
            lead = spec["leads"][1] // expected.itemsize * expected.itemsize
            destination = host.empty(expected.nbytes, lead)
            results.append((destination, expected))
            slices.append(
                RowSlice(
                    source=host.put(source, spec["leads"][0]),
                    destination=destination,
                    rows=spec["rows"],
                    row_elements=row,
                    source_rows=SOURCE_ROWS,
                    first_row=spec["first_row"],
                    cast=cast,
                    scale=1 / 127.5,
                    offset=-1.0,
                )
            )
        error = host.put(np.uint32([0]))
        at = 0 if index is None else host.put(index)
        launch.slice_rows(host.kernels, slices, index=at, error=error, stream=0)
        assert len(host.launches) <= 1
        for destination, expected in results:
            assert same_bytes(host.get(destination, expected), expected)
        return int(host.get(error, np.zeros(1, np.uint32))[0]), int(out_of_range)


@given(specs=st.lists(array_specs, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_one_launch_slices_all_arrays_of_a_batch(host, specs, seed):
    check_slices(host, specs, None, seed)


@given(specs=st.lists(array_specs, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_one_launch_gathers_shuffled_rows_of_all_arrays(host, specs, seed):
    index = np.random.default_rng(seed).integers(0, SOURCE_ROWS, 23).astype(np.int64)
    assert check_slices(host, specs, index, seed) == (0, 0)


@given(specs=st.lists(array_specs, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_row_number_out_of_range_sets_the_error_flag_and_touches_nothing(host, specs, seed):
    index = np.random.default_rng(seed).integers(-2, SOURCE_ROWS + 2, 23).astype(np.int64)
    actual, expected = check_slices(host, specs, index, seed)
    assert actual == expected


def test_a_row_number_far_out_of_range_is_found(host):
    spec = {"row": 64, "rows": 1, "first_row": 0, "leads": (0, 0), "cast": None}
    for row in (-1, SOURCE_ROWS, -(2**62), 2**62):
        assert check_slices(host, [spec], np.int64([row]), 0) == (1, 1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("cast", [None, "float32", "bfloat16"])
def test_more_work_than_blocks_is_shared_among_the_blocks(host, aligned, cast):
    """3 multiprocessors: 24 blocks for 40 segments and for 24 x 1,024 vectors."""
    row = 16_384 * 4 if aligned else 16_384 * 4 + 1
    spec = {"row": row * (8 if cast else 1), "rows": 10, "first_row": 3, "leads": (0, 0), "cast": cast}
    index = np.random.default_rng(1).permutation(SOURCE_ROWS).astype(np.int64)
    check_slices(host, [spec], None, 0)
    check_slices(host, [spec], index, 0)


def test_many_arrays_take_one_launch_for_every_52(host):
    with host.scope():
        source = random_bytes((4, 3), 0)
        at = host.put(source)
        outs = [host.empty(6) for _ in range(105)]
        slices = [RowSlice(at, out, rows=2, row_elements=3, source_rows=4, first_row=1) for out in outs]
        launch.slice_rows(host.kernels, slices, stream=0)
        assert len(host.launches) == 3
        for out in outs:
            assert same_bytes(host.get(out, source[1:3]), source[1:3])


@given(
    row=ROW_NBYTES,
    leads=st.tuples(st.integers(0, 15), st.integers(0, 15)),
    cast=st.sampled_from([None, *FLOATS]),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    outside=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_of_several_sources_take_their_places_in_one_destination(host, row, leads, cast, counts, outside, seed):
    with host.scope():
        rng, row = np.random.default_rng(seed), row // (8 if cast else 1)
        total = sum(counts)
        index = rng.integers(0, SOURCE_ROWS, total).astype(np.int64)
        places = rng.permutation(total).astype(np.int64)
        if outside and total:
            places[0] = total + seed if seed % 2 else -1
        expected = poisoned((total, row), FLOATS.get(cast, np.uint8))
        destination = host.empty(expected.nbytes, leads[1] // expected.itemsize * expected.itemsize)
        slices, first, scaling, wrong = [], 0, {"scale": 1 / 127.5, "offset": -1.0}, False
        for number, count in enumerate(counts):
            source = random_bytes((SOURCE_ROWS, row), seed + number)
            at = host.put(source, leads[0])
            taken = {"first_row": first, "index": index, "places": places, "rows": count}
            wrong |= twins.slice_rows(source, expected, **taken, **scaling) and row > 0
            slices.append(RowSlice(at, destination, count, row, SOURCE_ROWS, first, cast, **scaling))
            first += count
        error, where = host.put(np.uint32([0])), {"index": host.put(index), "places": host.put(places)}
        launch.slice_rows(host.kernels, slices, **where, destination_rows=total, error=error, stream=0)
        assert same_bytes(host.get(destination, expected), expected)
        assert host.get(error, np.zeros(1, np.uint32))[0] == wrong == bool(outside and total and row)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_row": 20}, "first_row \\+ rows <= source_rows"),
        ({"rows": -1}, "expected rows, row_elements"),
        ({"cast": "float64"}, "cast='float64': expected None"),
        ({"cast": "float32", "destination": 4098}, "aligned to 4 bytes"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(host, change, said):
    fields = {"source": 4096, "destination": 4096, "rows": 10, "row_elements": 4, "source_rows": 23} | change
    with pytest.raises(ValueError, match=said):
        launch.slice_rows(host.kernels, [RowSlice(**fields)], stream=0)


def test_an_index_without_an_error_flag_is_refused(host):
    with pytest.raises(ValueError, match="error=0 with an index"):
        launch.slice_rows(host.kernels, [], index=4096, stream=0)


def test_places_without_an_index_are_refused(host):
    with pytest.raises(ValueError, match="places with index=0"):
        launch.slice_rows(host.kernels, [], places=4096, stream=0)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    row_nbytes=st.lists(ROW_NBYTES, min_size=1, max_size=3),
    lead=st.integers(0, 15),
    seed=st.integers(0, 99),
)
def test_ragged_rows_of_all_replicas_and_outputs_merge_in_row_order(host, counts, row_nbytes, lead, seed):
    with host.scope():
        pieces, results = [], []
        for number, nbytes in enumerate(row_nbytes):
            expected = poisoned((sum(counts), nbytes), np.uint8)
            destination = host.empty(expected.nbytes, lead)
            results.append((destination, expected))
            for replica, rows in enumerate(counts):
                source = random_bytes((rows, nbytes), seed + number + 10 * replica)
                place = sum(counts[:replica])
                twins.concat_rows(source, expected, destination_row=place)
                pieces.append(RowPiece(host.put(source, replica), destination, rows, nbytes, place))
        launch.concat_rows(host.kernels, pieces, stream=0)
        assert len(host.launches) <= 1
        for destination, expected in results:
            assert same_bytes(host.get(destination, expected), expected)


def test_a_replica_writes_only_its_own_rows(host):
    with host.scope():
        source = random_bytes((3, 1000), 0)
        expected = poisoned((9, 1000), np.uint8)
        destination = host.empty(expected.nbytes)
        twins.concat_rows(source, expected, destination_row=4)
        launch.concat_rows(host.kernels, [RowPiece(host.put(source), destination, 3, 1000, 4)], stream=0)
        assert same_bytes(host.get(destination, expected), expected)


def test_many_pieces_take_one_launch_for_every_120(host):
    with host.scope():
        source = random_bytes((1, 5), 0)
        at, out = host.put(source), host.empty(5 * 250)
        launch.concat_rows(host.kernels, [RowPiece(at, out, 1, 5, row) for row in range(250)], stream=0)
        assert len(host.launches) == 3
        expected = np.repeat(source, 250, axis=0)
        assert same_bytes(host.get(out, expected), expected)


def test_a_negative_place_is_refused(host):
    with pytest.raises(ValueError, match="destination_row >= 0"):
        launch.concat_rows(host.kernels, [RowPiece(4096, 4096, 1, 1, -1)], stream=0)
