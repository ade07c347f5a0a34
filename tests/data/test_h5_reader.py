"""Rows that threads read from HDF5 files, against what h5py reads: random files, and files that are damaged."""

import gc
import io
import os
import shutil
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdp.data import h5_layout
from fastdp.data.h5_blosc2 import block_shape
from fastdp.data.h5_codecs import NAMES, DecodeError, Pipeline, gzip_library
from fastdp.data.h5_rows import StoredRows
from fastdp.data.hdf5 import HDF5Matrix
from fastdp.runtime.host.job_threads import JobThreads

hdf5plugin = pytest.importorskip("hdf5plugin")

FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip", "compression_opts": 1},
    "lzf": {"compression": "lzf"},
    "shuffle": {"shuffle": True},
    "all of HDF5's": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf, shuffle": {"compression": "lzf", "shuffle": True},
    "fletcher32": {"fletcher32": True},
    "blosc": {**hdf5plugin.Blosc()},
    "blosc2": {**hdf5plugin.Blosc2(cname="zstd", clevel=1)},
    "zstd": {"shuffle": True, "fletcher32": True, **hdf5plugin.Zstd(clevel=1)},
}
DTYPES = ["u1", "i2", "<f4", ">f4", "f8", "f2", "?", ">u8", "c8"]


def drawn(shape, dtype, seed=0):
    """Numbers that can be compressed, of any bits that are no NaN."""
    numbers = np.random.default_rng(seed).integers(0, 7, shape)
    return numbers.astype(dtype)


@st.composite
def files(draw):
    """Arguments of a data set, the shape that it is given later, the part that is written, and rows to read."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    shape = (draw(st.integers(0, 40)), *shape[1:])
    dtype = draw(st.sampled_from(DTYPES))
    chunks = draw(st.none() | st.tuples(st.integers(1, 11), *(st.integers(1, max(1, side)) for side in shape[1:])))
    options = {"dtype": dtype, "shape": shape}
    if chunks is not None:
        options |= {"chunks": chunks, "maxshape": (None,) * len(shape), **FILTERS[draw(st.sampled_from([*FILTERS]))]}
    if draw(st.booleans()):
        options["fillvalue"] = np.ones((), dtype)
        options["fill_time"] = draw(st.sampled_from(["ifset", "alloc", "never"]))
    later = (draw(st.integers(0, 40)), *shape[1:]) if chunks is not None and draw(st.booleans()) else shape
    written = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted))
    last = later[0] - 1
    rows = st.slices(later[0]) if last < 0 else st.slices(later[0]) | st.lists(st.integers(0, last), max_size=30)
    return options, later, slice(*written), draw(st.lists(rows, min_size=1, max_size=3))


@settings(max_examples=250, deadline=None)
@given(case=files(), libver=st.sampled_from(["earliest", "latest"]), block=st.sampled_from([0, 512]))
def test_rows_of_random_files_are_bit_equal_to_those_of_h5py(folder, case, libver, block):
    options, later, written, wanted = case
    path = folder / "random.h5"
    with h5py.File(path, "w", libver=libver, userblock_size=block) as file:
        data = file.create_dataset("x", **options)
        data[written] = drawn(data[written].shape, data.dtype)
        if later != data.shape:
            data.resize(later)
    with h5py.File(path) as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(h5_layout, "LEAST_CHUNK_NBYTES", 0)
        rows, whole = StoredRows(file["x"]), file["x"][()]
        assert rows.why_h5py in ("", "a compact data set")
        for key in wanted:
            index = range(len(whole))[key] if isinstance(key, slice) else np.array(key, np.int64)
            found = rows.read(index)
            assert found.tobytes() == whole[np.asarray(index, np.int64)].tobytes()
            assert (found.dtype, found.shape) == (whole.dtype, (len(index), *whole.shape[1:]))
        reader = rows.reader()
        assert all("edge" in why for why in reader.left_to_h5py)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("random")


@pytest.fixture(scope="module", autouse=True)
def no_reader_is_left():
    """What `pytest.raises` has caught holds frames, and these a reader, until a collection."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file whose chunks have 64 KiB, by name of their filters, and the array in each."""
    path = tmp_path_factory.mktemp("large") / "large.h5"
    array = drawn((300, 64, 32), "u2")
    with h5py.File(path, "w") as file:
        for name, options in FILTERS.items():
            file.create_dataset(name, data=array, chunks=(16, 64, 32), **options)
        file["one piece"] = array
    return path, array


@pytest.mark.parametrize("name", [*FILTERS, "one piece"])
def test_many_threads_read_slices_and_shuffled_rows_of_each_filter(large, name):
    path, array = large
    order = np.random.default_rng(1).permutation(len(array))
    with HDF5Matrix(path, name) as matrix:
        results = {}

        def read(number):
            results[number] = (matrix[number : number + 100], matrix[order[number::2]])

        threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for number, (part, mixed) in results.items():
            np.testing.assert_array_equal(part, array[number : number + 100], strict=True)
            np.testing.assert_array_equal(mixed, array[order[number::2]], strict=True)
        assert len(results) == 4
        assert matrix.stored().describe().startswith("by threads")


def test_a_chunk_of_which_a_batch_took_a_part_is_decoded_once(large, monkeypatch):
    path, array = large
    decoded = []
    monkeypatch.setattr(Pipeline, "decode", lambda *args, real=Pipeline.decode: decoded.append(1) or real(*args))
    with HDF5Matrix(path, "gzip") as matrix:
        for start in range(0, 300, 10):
            np.testing.assert_array_equal(matrix[start : start + 10], array[start : start + 10])
    assert len(decoded) == -(-300 // 16)


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    [((8, 64, 64, 3), "u1"), ((16, 96, 96), "f4"), ((13, 61, 67), "i2"), ((9, 300, 300), "c16"), ((70000,), "u1")],
)
def test_chunks_of_blosc2_that_lie_in_blocks_come_in_order(tmp_path, chunk, dtype):
    array = np.random.default_rng(0).integers(0, 99, chunk).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=chunk, **hdf5plugin.Blosc2())
        stored = file["x"].id.read_direct_chunk((0,) * len(chunk))[1]
    blocks = block_shape(stored[:4096], chunk)
    assert (blocks is None) == (len(chunk) == 1)
    with h5py.File(tmp_path / "a.h5") as file:
        rows = StoredRows(file["x"])
        np.testing.assert_array_equal(rows[:], array, strict=True)
        assert not rows.reader().left_to_h5py


# What threads leave to h5py.


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("scaleoffset", {"scaleoffset": 4, "dtype": "i4"}),
        ("only 16 bytes", {"chunks": (16,), "dtype": "u1"}),
        ("dtype", {"dtype": np.dtype([("a", "f4")])}),
        ("dtype", {"dtype": h5py.string_dtype()}),
    ],
)
def test_what_threads_do_not_know_is_read_by_h5py_and_said(tmp_path, why, options):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(4096,), **{"chunks": (4096,), **options})
    with h5py.File(tmp_path / "a.h5") as file:
        rows = StoredRows(file["x"])
        assert np.array_equal(rows[3:8], file["x"][3:8])
        assert rows.reader() is None
        expected = "the filter 6" if why == "scaleoffset" else why
        assert rows.describe().startswith("by h5py: ")
        assert expected in rows.describe()


def test_files_in_memory_files_being_written_and_virtual_data_sets_are_read_by_h5py(tmp_path):
    path, array = tmp_path / "a.h5", drawn((100, 100), "f4")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["x"] = array
        assert "fileobj" in StoredRows(file["x"]).describe()
        np.testing.assert_array_equal(StoredRows(file["x"])[5:90], array[5:90])
    with h5py.File(path, "w") as file:
        file["x"] = array
        layout = h5py.VirtualLayout((100, 100), "f4")
        layout[:] = h5py.VirtualSource(file["x"])
        file.create_virtual_dataset("virtual", layout)
        rows = StoredRows(file["x"])
        assert "open for writing" in rows.describe()
        file["x"][7] = -1
        assert (rows[6:9][1] == -1).all()
    with h5py.File(path, driver="core") as file:
        assert "'core'" in StoredRows(file["x"]).describe()
        assert "virtual" in StoredRows(file["virtual"]).describe()
        assert (StoredRows(file["virtual"])[6:9][1] == -1).all()


# Files that change, end, or are damaged.


@pytest.fixture
def own(large, tmp_path):
    return shutil.copy(large[0], tmp_path / "own.h5"), large[1]


@pytest.mark.parametrize("name", ["gzip", "none", "one piece"])
def test_a_file_that_is_cut_while_it_is_read_is_named(own, name):
    path, _ = own
    with HDF5Matrix(path, name) as matrix:
        matrix[:40]
        reader = matrix.stored().reader()
        place = reader.layout.offset if name == "one piece" else int(reader.layout.places[10])
        os.truncate(path, place + 10)
        with pytest.raises(OSError, match=r"own\.h5.*changed after it was opened"):
            matrix[:]
        reader._stamp = (reader._stamp[0], os.stat(path).st_mtime_ns)
        reader._check_file = lambda: None
        with pytest.raises(OSError, match=r"own\.h5.* is cut: .*Take another copy"):
            matrix[:]


def test_a_file_that_is_written_while_it_is_read_is_an_error_that_names_it(own):
    path, _ = own
    with HDF5Matrix(path, "gzip") as matrix:
        matrix[:40]
        os.utime(path, ns=(1, 1))
        with pytest.raises(OSError, match=r"own\.h5.*changed.*open it again"):
            matrix[:40]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_or_replaced_is_read_on_as_it_was_opened(own, replaced):
    path, array = own
    with h5py.File(path) as file:
        os.remove(path)
        if replaced:
            path.write_bytes(b"another file")
        rows = StoredRows(file["gzip"])
        np.testing.assert_array_equal(rows[10:60], array[10:60])
        assert rows.describe().startswith("by threads")


def test_a_file_that_is_closed_while_its_data_set_is_read_is_an_error_that_names_it(own):
    with h5py.File(own[0]) as file:
        rows = StoredRows(file["gzip"])
        rows[:40]
    with pytest.raises(ValueError, match=r"own\.h5' was closed"):
        rows[:40]


@pytest.mark.parametrize("name", [name for name in FILTERS if name not in ("none", "shuffle")])
def test_a_damaged_chunk_is_never_other_numbers_and_its_error_names_the_file(own, name):
    path, array = own
    with h5py.File(path) as file:
        info = file[name].id.get_chunk_info(5)
    random = np.random.default_rng(0)
    with open(path, "r+b") as file:
        file.seek(info.byte_offset + info.size // 2)
        file.write(random.bytes(min(40, info.size // 4)))
    with h5py.File(path) as file:
        try:
            # HDF5 leaves what lzf does not fill as it was in memory.
            expected = None if "lzf" in name else file[name][:]
        except OSError:
            expected = None
    with HDF5Matrix(path, name) as matrix:
        if expected is None:
            with pytest.raises(OSError, match=r"own\.h5"):
                matrix[:]
        else:
            np.testing.assert_array_equal(matrix[:], expected)
        np.testing.assert_array_equal(matrix[100:180], array[100:180])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), code=st.sampled_from([1, 3, 32000, 32001, 32015, 32026]))
def test_hostile_chunks_decode_to_the_declared_size_or_to_an_error(stored_chunks, data, code):
    pipeline, stored = stored_chunks[code]
    content = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 120) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    guarded = np.full(pipeline.nbytes + 64, 7, np.uint8)
    try:
        found = pipeline.decode(np.frombuffer(bytes(content), np.uint8), 0, guarded[: pipeline.nbytes])
    except DecodeError as error:
        assert "bytes" in str(error)  # noqa: PT017
    else:
        assert len(found) == pipeline.nbytes
    assert (guarded[pipeline.nbytes :] == 7).all()


@pytest.fixture(scope="module")
def stored_chunks(tmp_path_factory):
    """A pipeline and a stored chunk for each filter."""
    path, chunks = tmp_path_factory.mktemp("chunks") / "a.h5", {}
    options = [FILTERS[name] for name in ("gzip", "fletcher32", "lzf", "blosc", "blosc2")] + [{**hdf5plugin.Zstd()}]
    with h5py.File(path, "w") as file:
        for number, option in enumerate(options):
            data = file.create_dataset(f"{number}", data=drawn((32, 64), "i2"), chunks=(32, 64), **option)
            pipeline = h5_layout.read_layout(data).pipeline
            chunks[pipeline.filters[-1][0]] = pipeline, data.id.read_direct_chunk((0, 0))[1]
    assert all(code in NAMES for code in chunks)
    return chunks


def test_chunks_beyond_the_file_and_of_more_than_it_stores_are_refused(own, monkeypatch):
    path, _ = own
    with HDF5Matrix(path, "gzip") as matrix:
        reader = matrix.stored().reader()
        reader.layout.sizes[3] = 1 << 50
        with pytest.raises(OSError, match=r"own\.h5.* is cut"):
            matrix[:]
        reader.layout.sizes[3] = 100
        reader.stored_nbytes = 100
        with pytest.raises(ValueError, match=r"must store what it declares, got .*own\.h5"):
            matrix[:]


# Threads and processes.


def test_the_first_error_of_a_job_is_raised_when_none_runs_any_more():
    running, done = [], threading.Event()

    def slow():
        running.append(1)
        done.wait(10)
        running.pop()

    def failing():
        done.set()
        raise KeyError("of a job")

    threads = JobThreads(3)
    threads.use()
    with pytest.raises(KeyError, match="of a job"):
        threads.run([slow, failing, *[lambda: None] * 50])
    assert running == []
    threads.run([])
    threads.release()


def test_a_forked_process_reads_on(large):
    path, array = large
    code = f"""
import os, numpy as np
from fastdp.data.hdf5 import HDF5Matrix
m = HDF5Matrix({str(path)!r}, "gzip")
before = m[:200]
child = os.fork()
if child == 0:
    os._exit(0 if (m[:200] == before).all() and (m[100:] == m[100:]).all() else 1)
assert os.waitpid(child, 0)[1] == 0
print(before.sum())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(out.stdout) == int(array[:200].sum())


def test_gzip_is_decoded_by_isal_where_it_is_installed():
    assert gzip_library() == "isal"
