"""HDF5Matrix against the NumPy array that its file was written from."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdp.data.hdf5 import HDF5Matrix
from fastdp.data.selection import parse_rows, read_rows, split_key

FILE_ROWS, START, END = 23, 3, 20
WHOLE = np.arange(FILE_ROWS * 4 * 2, dtype=np.float32).reshape(FILE_ROWS, 4, 2)
SLICE = WHOLE[START:END]
COUNT = len(SLICE)
row_numbers = st.integers(-COUNT, COUNT - 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    name = tmp_path_factory.mktemp("hdf5") / "data.h5"
    with h5py.File(name, "w") as file:
        file["x"] = WHOLE
        file.create_dataset("chunked", data=WHOLE, chunks=(5, 4, 2), compression="gzip")
        file["labels"] = np.arange(FILE_ROWS, dtype=np.int16)
        file["group/inner"] = WHOLE[:2]
        file["scalar"] = 1.0
        file["none"] = np.empty((0, 3), np.float64)
    return name


@pytest.fixture(scope="module", params=["x", "chunked"])
def matrix(path, request):
    with HDF5Matrix(path, request.param, START, END) as opened:
        yield opened


def test_length_shape_dtype_ndim_and_size_are_those_of_the_slice(matrix):
    assert len(matrix) == len(SLICE)
    assert (matrix.shape, matrix.dtype, matrix.ndim, matrix.size) == (SLICE.shape, SLICE.dtype, 3, SLICE.size)


def test_defaults_give_the_whole_data_set(path):
    matrix = HDF5Matrix(path, "x")
    assert (matrix.start, matrix.end) == (0, FILE_ROWS)
    np.testing.assert_array_equal(matrix[:], WHOLE)


@given(row=row_numbers, kind=st.sampled_from([int, np.int64, np.int8, np.array]))
def test_an_int_gives_the_row_that_numpy_gives(matrix, row, kind):
    np.testing.assert_array_equal(matrix[kind(row)], SLICE[row], strict=True)


@given(key=st.slices(COUNT + 5))
def test_a_slice_gives_the_rows_that_numpy_gives(matrix, key):
    np.testing.assert_array_equal(matrix[key], SLICE[key], strict=True)


@given(rows=st.lists(row_numbers, max_size=2 * COUNT))
def test_lists_and_arrays_give_the_rows_that_numpy_gives_in_their_order_with_repeats(matrix, rows):
    wanted = SLICE[np.array(rows, dtype=int)]
    np.testing.assert_array_equal(matrix[rows], wanted, strict=True)
    np.testing.assert_array_equal(matrix[np.array(rows, dtype=np.int16)], wanted, strict=True)


@given(mask=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT))
def test_a_mask_gives_the_rows_that_numpy_gives(matrix, mask):
    np.testing.assert_array_equal(matrix[np.array(mask)], SLICE[mask], strict=True)
    np.testing.assert_array_equal(matrix[mask], SLICE[mask], strict=True)


@settings(max_examples=200)
@given(
    first=st.one_of(row_numbers, st.slices(COUNT), st.lists(row_numbers, min_size=2, max_size=2).map(np.array)),
    rest=st.tuples(
        st.one_of(st.integers(-4, 3), st.slices(4), st.just(Ellipsis), st.just(np.array([3, 0])), st.none())
    ),
)
def test_a_tuple_addresses_rows_first_and_the_block_after(matrix, first, rest):
    np.testing.assert_array_equal(matrix[(first, *rest)], SLICE[(first, *rest)], strict=True)


@pytest.mark.parametrize(
    "key",
    [
        ...,
        (),
        (...,),
        (..., 1),
        (..., None),
        (..., [0, 1], slice(None)),
        (..., 2, 1),
        (..., slice(2, 9), 2, 1),
        (4, slice(None), [0, 1]),
        ([0, 5], [1, 1], [0, 1]),
        (slice(None, None, -3), 2),
        np.array([[0, 3], [-1, 3]]),
        (np.array([[0, 3], [-1, 3]]), 1),
        range(9, 2, -2),
        np.array([4, 2], np.uint64),
    ],
    ids=repr,
)
def test_ellipsis_tuples_and_arrays_of_indices_follow_numpy(matrix, key):
    np.testing.assert_array_equal(matrix[key], SLICE[key], strict=True)


def test_one_axis_gives_numpy_scalars(path):
    labels = HDF5Matrix(path, "labels", 5)
    assert labels[2] == 7
    assert isinstance(labels[2], np.int16)
    np.testing.assert_array_equal(labels[[3, 0, 3]], np.array([8, 5, 8], np.int16), strict=True)


def test_results_are_contiguous_and_belong_to_the_caller(matrix):
    block = matrix[::-1]
    assert block.flags.c_contiguous
    block[:] = 0
    np.testing.assert_array_equal(matrix[::-1], SLICE[::-1])


@pytest.mark.parametrize("key", [COUNT, -COUNT - 1, [0, COUNT], np.array([-COUNT - 1]), (COUNT, 0)], ids=repr)
def test_a_row_past_the_end_is_an_index_error_though_the_file_has_it(matrix, key):
    with pytest.raises(IndexError, match=rf"rows from -{COUNT} to {COUNT - 1}, got row -?\d+"):
        matrix[key]


@pytest.mark.parametrize(
    "key", ["x", 1.0, None, True, np.True_, [0.5], [[True]], pytest.param(object(), id="object")], ids=repr
)
def test_what_is_no_index_is_an_index_error(matrix, key):
    with pytest.raises(IndexError, match="expected"):
        matrix[key]


def test_a_mask_of_another_length_is_an_index_error(matrix):
    with pytest.raises(IndexError, match=rf"shape \({COUNT},\).*got shape \(2,\)"):
        matrix[[True, False]]


def test_too_many_axes_are_an_index_error(matrix):
    with pytest.raises(IndexError):
        matrix[0, 0, 0, 0]
    with pytest.raises(IndexError, match="at most 3 axes"):
        matrix[..., 0, 0, 0, 0]


def test_iteration_gives_each_row_once(matrix):
    np.testing.assert_array_equal(np.stack(list(matrix)), SLICE)


def test_asarray_reads_everything_and_takes_numpy_2_arguments(matrix):
    np.testing.assert_array_equal(np.asarray(matrix), SLICE, strict=True)
    np.testing.assert_array_equal(np.array(matrix, dtype=np.float64, copy=True), SLICE.astype(np.float64), strict=True)
    with pytest.raises(ValueError, match="copy must be None or True, got False"):
        matrix.__array__(copy=False)


def test_the_normalizer_sees_each_fetched_block_and_decides_dtype_and_shape(path):
    seen = []

    def normalizer(block):
        seen.append(block.shape)
        return block.reshape(*block.shape[:-2], 8).astype(np.float64) / 2

    matrix = HDF5Matrix(path, "x", START, END, normalizer)
    assert (matrix.shape, matrix.dtype) == ((COUNT, 8), np.float64)
    wanted = SLICE.reshape(COUNT, 8) / np.float64(2)
    seen.clear()
    np.testing.assert_array_equal(matrix[2:6], wanted[2:6], strict=True)
    np.testing.assert_array_equal(matrix[[5, 1, 5]], wanted[[5, 1, 5]], strict=True)
    np.testing.assert_array_equal(matrix[4, 1:3], wanted[4, 1:3], strict=True)
    np.testing.assert_array_equal(matrix[4], wanted[4], strict=True)
    assert seen == [(4, 4, 2), (3, 4, 2), (4, 2), (4, 2)]
    np.testing.assert_array_equal(np.asarray(matrix), wanted, strict=True)


def test_a_normalizer_is_not_called_on_no_rows(path):
    matrix = HDF5Matrix(path, "labels", normalizer=lambda block: block / np.max(block, initial=1) * len(block[:]))
    assert matrix[5:5].shape == (0,)
    assert matrix[5:5].dtype == matrix.dtype == np.float64


def test_a_matrix_may_have_no_rows(path):
    assert HDF5Matrix(path, "x", 4, 4)[:].shape == (0, 4, 2)
    empty = HDF5Matrix(path, "none", normalizer=np.log)
    assert (len(empty), empty.shape, list(empty)) == (0, (0, 3), [])


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (-1, None, "start must be from 0 to 23.*got -1"),
        (24, None, "start must be from 0 to 23.*got 24"),
        (0, 24, "end must be from start=0 to 23.*got 24"),
        (5, 4, "end must be from start=5 to 23.*got 4"),
        (5, -1, "end must be from start=5 to 23.*got -1"),
    ],
)
def test_bounds_outside_the_data_set_are_value_errors_that_name_the_argument(path, start, end, message):
    with pytest.raises(ValueError, match=message):
        HDF5Matrix(path, "x", start, end)


@pytest.mark.parametrize(("start", "end"), [(1.0, None), ("1", None), (None, 3), (True, None), (0, 3.0)])
def test_bounds_that_are_no_ints_are_type_errors(path, start, end):
    with pytest.raises(TypeError, match=r"(start|end) must be an int, got"):
        HDF5Matrix(path, "x", start, end)


def test_a_normalizer_that_cannot_be_called_is_a_type_error(path):
    with pytest.raises(TypeError, match="normalizer must be callable or None, got 255"):
        HDF5Matrix(path, "x", normalizer=255)


def test_a_missing_file_is_a_file_not_found_error_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"datapath must be an existing HDF5 file.*nowhere\.h5") as caught:
        HDF5Matrix(tmp_path / "nowhere.h5", "x")
    assert caught.value.filename == str(tmp_path / "nowhere.h5")


def test_a_file_of_another_format_is_an_os_error(tmp_path):
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(OSError, match="datapath must be an HDF5 file"):
        HDF5Matrix(tmp_path / "text.h5", "x")
    with pytest.raises(IsADirectoryError):
        HDF5Matrix(tmp_path, "x")


@pytest.mark.parametrize("name", ["y", "group", "x/deeper", "group/y", "/"])
def test_a_missing_data_set_is_a_key_error_that_lists_those_there_are(path, name):
    with pytest.raises(KeyError, match="'chunked', 'group/inner', 'labels', 'none', 'scalar', 'x'"):
        HDF5Matrix(path, name)


def test_data_without_rows_is_a_value_error(path):
    with pytest.raises(ValueError, match=r"dataset must have at least one axis.*shape \(\)"):
        HDF5Matrix(path, "scalar")


def test_matrices_on_one_file_share_a_handle_that_the_last_one_closes(tmp_path):
    name = tmp_path / "shared.h5"
    with h5py.File(name, "w") as file:
        file["x"] = WHOLE
    os.symlink(name, tmp_path / "link.h5")
    first, second = HDF5Matrix(name, "x"), HDF5Matrix(tmp_path / "link.h5", "x")
    assert first._file is second._file
    first.close()
    first.close()
    assert first.closed
    assert not second.closed
    np.testing.assert_array_equal(second[:2], WHOLE[:2])
    with pytest.raises(ValueError, match=r"expected an open HDF5Matrix, got one of .*shared\.h5.* closed"):
        first[0]
    del second
    gc.collect()
    with h5py.File(name, "r+") as file:  # HDF5 refuses this while the file is open for reading
        file["x"][0] = 7
    assert HDF5Matrix(name, "x")[0, 0, 0] == 7


def test_the_file_is_open_for_reading_only_and_stays_as_it_was(path):
    before = Path(path).read_bytes()
    with HDF5Matrix(path, "x") as matrix:
        assert matrix._file.mode == "r"
        assert matrix[0, 0, 0] == 0
    assert Path(path).read_bytes() == before


def test_a_file_put_in_the_place_of_an_open_one_is_read_by_new_matrices(tmp_path):
    for value in (1, 2):
        with h5py.File(tmp_path / f"{value}.h5", "w") as file:
            file["x"] = np.full((2, 1), value)
    old = HDF5Matrix(tmp_path / "1.h5", "x")
    os.replace(tmp_path / "2.h5", tmp_path / "1.h5")
    assert HDF5Matrix(tmp_path / "1.h5", "x")[0, 0] == 2
    assert old[0, 0] == 1


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_open_the_file_anew(path, again, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(path).parent)
    original = HDF5Matrix(Path(path).name, "x", START, END, normalizer=np.negative)
    original.close()
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(again(original)[:], -SLICE)


def test_a_matrix_can_be_sent_to_another_process(path):
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[-1].sum())"
    data = pickle.dumps(HDF5Matrix(path, "x", START, END))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], input=data, capture_output=True, check=True)
    assert float(done.stdout) == SLICE[-1].sum()


def test_the_module_imports_neither_keras_nor_torch():
    code = "import sys, fastdp.data.hdf5; sys.exit(bool({'keras', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_read_the_right_rows(matrix):
    wrong = []

    def read(thread):
        for turn in range(50):
            rows = np.random.default_rng((thread, turn)).integers(0, COUNT, 6)
            if not np.array_equal(matrix[rows], SLICE[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def leaving(tmp_path, path):
    """A file whose data lies elsewhere, in each way that HDF5 knows."""
    name = tmp_path / "leaving.h5"
    (tmp_path / "raw.bin").write_bytes(WHOLE.tobytes())
    layout = h5py.VirtualLayout(WHOLE.shape, WHOLE.dtype)
    layout[:] = h5py.VirtualSource(str(path), "x", WHOLE.shape)
    with h5py.File(name, "w") as file:
        file["external"] = h5py.ExternalLink(str(path), "x")
        file["soft"] = h5py.SoftLink("/external")
        file["outside"] = h5py.ExternalLink(str(path), "/")
        file.create_dataset(
            "raw", WHOLE.shape, WHOLE.dtype, external=[(str(tmp_path / "raw.bin"), 0, h5py.h5f.UNLIMITED)]
        )
        file.create_virtual_dataset("virtual", layout)
    return name


@pytest.mark.parametrize("name", ["external", "soft", "outside/x", "raw", "virtual"])
def test_data_outside_the_file_is_refused_unless_asked_for(leaving, name):
    with pytest.raises(ValueError, match="follow_external=True"):
        HDF5Matrix(leaving, name)
    matrix = HDF5Matrix(leaving, name, START, END, follow_external=True)
    np.testing.assert_array_equal(matrix[:], SLICE)
    np.testing.assert_array_equal(copy.copy(matrix)[:], SLICE)


def test_an_external_link_is_refused_without_opening_what_it_names(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "missing.h5"), "x")
    with pytest.raises(ValueError, match=r"an external link to .*missing\.h5"):
        HDF5Matrix(tmp_path / "a.h5", "x")
    with pytest.raises(KeyError, match="no data set"):
        HDF5Matrix(tmp_path / "a.h5", "x", follow_external=True)


def test_soft_links_inside_the_file_are_followed_and_circles_end(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/x"] = WHOLE
        file["deep/here"] = h5py.SoftLink("x")
        file["there"] = h5py.SoftLink("/deep")
        file["circle"] = h5py.SoftLink("/circle")
    np.testing.assert_array_equal(HDF5Matrix(tmp_path / "a.h5", "there/here")[:], WHOLE)
    with pytest.raises(KeyError, match="deep/x"):
        HDF5Matrix(tmp_path / "a.h5", "circle")


class CountingReads:
    """A data set that takes what h5py takes, and counts."""

    def __init__(self, data):
        self.data, self.reads = data, []

    def __getitem__(self, key):
        if isinstance(key, np.ndarray):
            assert (np.diff(key) > 0).all(), "h5py wants increasing, unique rows"
        else:
            assert (key.step or 1) > 0, "h5py wants a positive step"
        block = self.data[key]
        self.reads.append(len(block))
        return block


@given(rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=40))
def test_each_row_is_read_once_and_no_more_than_twice_what_is_asked_for(rows):
    data = CountingReads(WHOLE)
    np.testing.assert_array_equal(read_rows(data, np.array(rows), START), SLICE[rows])
    assert len(data.reads) == 1
    assert data.reads[0] <= 2 * len(set(rows))


@given(key=st.slices(COUNT))
def test_parsed_slices_are_ranges_of_existing_rows(key):
    assert list(parse_rows(key, COUNT)) == list(range(COUNT))[key]


def test_split_key_writes_a_leading_ellipsis_out():
    assert split_key((..., 0), 3) == (slice(None), (slice(None), 0))
    assert split_key((..., 1, 0), 2) == (1, (0, ...))


def test_the_representation_names_file_rows_and_shape(path):
    matrix = HDF5Matrix(path, "x", START, END)
    assert "rows 3 to 20, shape (17, 4, 2), dtype float32" in repr(matrix)
    matrix.close()
    assert repr(matrix).endswith("closed>")


@pytest.mark.parametrize("shuffle", [False, True, "chunks"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_give_each_row_once_in_a_seeded_order(matrix, shuffle, ahead):
    batches = list(matrix.batches(4, shuffle=shuffle, seed=1, ahead=ahead))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 1]
    found = np.concatenate(batches)
    np.testing.assert_array_equal(found[np.argsort(found[:, 0, 0])], SLICE, strict=True)
    assert np.array_equal(found, SLICE) == (shuffle is False)
    again = np.concatenate(list(matrix.batches(4, shuffle=shuffle, seed=1, ahead=ahead)))
    np.testing.assert_array_equal(found, again)
    assert len(list(matrix.batches(4, drop_last=True, ahead=ahead))) == 4


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 2, "shuffle": "rows"}, {"batch_size": 2, "ahead": -1}]
)
def test_wrong_arguments_of_batches_are_value_errors_that_name_them(matrix, wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        next(matrix.batches(**wrong))
