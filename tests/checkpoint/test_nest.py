"""A state comes back as it was: kinds, dtypes and bits; it shares no memory, and what is no data is named."""

from __future__ import annotations

import collections
import io
import random
import zipfile

import numpy as np
import pytest
import torch

from fastdp.checkpoint import nest
from fastdp.checkpoint.generators import read_generators, write_generators
from fastdp.tensors import checkpoints


def back(value, folder):
    packed = nest.pack(value, checkpoints)
    folder.mkdir(exist_ok=True)
    packed.write(folder)
    return nest.read(folder, checkpoints)


def test_plain_data_comes_back_as_it_was(tmp_path):
    value = {
        1: [None, True, 2**200, -0.0, 1e-320, float("inf"), "ä", b"\x00\xff"],
        "t": (1, (2.5, [])),
        ("a", 0): collections.OrderedDict(b=1, a=2),
        "c": collections.Counter({3: 2}),
        "n": np.float32(0.1),
    }
    found = back(value, tmp_path / "state")
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64", "bool", "complex64", "uint8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_come_back_with_dtype_shape_and_bits(tmp_path, dtype, shape):
    value = torch.randn(shape).to(getattr(torch, dtype)) if dtype != "bool" else torch.ones(shape, dtype=torch.bool)
    found = back({"x": value, "transposed": value.T if value.ndim == 2 else value}, tmp_path / "state")
    assert found["x"].dtype == value.dtype
    assert torch.equal(found["x"], value)
    assert torch.equal(found["transposed"], value.T if value.ndim == 2 else value)


def test_sparse_tensors_come_back(tmp_path):
    value = torch.sparse_coo_tensor([[0, 2, 2]], torch.tensor([[1.0], [2.0], [3.0]]), (4, 1), check_invariants=True)
    found = back(value, tmp_path / "state")
    assert found.is_sparse
    assert not found.is_coalesced()
    assert torch.equal(found.to_dense(), value.to_dense())


def test_a_snapshot_does_not_follow_what_it_was_made_of(tmp_path):
    array, tensor = np.zeros(2), torch.zeros(2)
    packed = nest.pack([array, tensor], checkpoints)
    array += 1
    tensor += 1
    packed.write(tmp_path)
    assert [float(part.sum()) for part in nest.read(tmp_path, checkpoints)] == [0, 0]


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, [np.array([None])]])
def test_what_is_no_data_is_an_error_that_names_its_place(value):
    with pytest.raises(TypeError, match=r"type (object|set|ndarray) at state(\['a'\]|\[0\])?\."):
        nest.pack(value, checkpoints)


def declared(shape):
    """A file whose one array says that it has a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(16)


@pytest.mark.parametrize(
    ("content", "how"), [(declared((2**40,)), zipfile.ZIP_STORED), (declared((2,)), zipfile.ZIP_DEFLATED)]
)
def test_an_array_that_is_larger_than_what_is_stored_of_it_is_refused_before_it_is_allocated(tmp_path, content, how):
    nest.pack([np.zeros(2)]).write(tmp_path)
    with zipfile.ZipFile(tmp_path / nest.ARRAYS, "w", how) as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match="declares more than it stores"):
        nest.read(tmp_path)


def test_parts_of_an_archive_that_lie_upon_each_other_are_refused_and_a_damaged_header_is_named(tmp_path):
    path = tmp_path / nest.ARRAYS
    nest.pack([]).write(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", declared((2,)).replace(b"(2,)", b"(2, "))
    with pytest.raises(ValueError, match="header is damaged"):
        nest.read(tmp_path)
    nest.pack([np.zeros(50)]).write(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:  # a second name for the same part
        archive.filelist.append(archive.filelist[0])
        archive._didModify = True
    with pytest.raises(ValueError, match="declares more than it stores"):
        nest.read(tmp_path)


def test_all_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.normal(), float(torch.randn(())), random.gauss(0, 1)  # noqa: NPY002

    draw()
    states = back(read_generators(), tmp_path / "state")
    first = draw()
    write_generators(states)
    assert draw() == first
