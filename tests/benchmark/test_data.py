"""Batches that are drawn, and those that are read from HDF5 files."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from fastdp.benchmark.arrays import Array, draw
from fastdp.benchmark.data import POOL, batches_of, split
from fastdp.benchmark.request import Request
from fastdp.benchmark.target import Target

INPUTS = (Array("image", (2, 2)),)
TARGETS = (Array("label", (), "int64", 5),)
TARGET = Target("t", "torch", None, None, None, INPUTS, TARGETS)


def request(data: str = "synthetic", batch: int = 3) -> Request:
    return Request(target="mlp", framework="torch", batch=batch, data=data)


@pytest.fixture
def file(tmp_path):
    """A file of ten rows, under the given names."""

    def write(x: str = "x", y: str = "y", shape=(2, 2)):
        path = tmp_path / "data.h5"
        with h5py.File(path, "w") as made:
            made[x] = np.arange(10.0)[:, None, None] + np.zeros((10, *shape))
            made[y] = np.arange(10)
        return str(path)

    return write


def test_drawn_batches_come_again_and_are_the_same_for_a_seed():
    batches = batches_of(TARGET, request())
    x, y = batches(1)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((3, 2, 2), np.float32, (3,), np.int64)
    assert batches(1 + POOL)[0] is x
    assert not np.array_equal(batches(0)[0], x)
    np.testing.assert_array_equal(batches_of(TARGET, request())(1)[0], x)


def test_arrays_are_drawn_within_their_limits():
    x, y = draw([Array("a", (1000,), "uint8", 3), Array("b", (2,), "bool")], 2, seed=0)
    assert set(np.unique(x)) == {0, 1, 2}
    assert y.dtype == bool


@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("image", "label"), ("images", "labels"), ("x_train", "y_train")])
def test_a_file_is_read_in_order_by_the_model_s_names_or_usual_ones(file, x, y):
    batches = batches_of(TARGET, request(file(x, y)))
    assert [list(batches(number)[1]) for number in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]]
    assert batches(1)[0][2, 0, 0] == 5.0
    assert batches(1)[0].dtype == np.float32  # the file has float64
    batches.close()


def test_data_sets_may_be_named(file):
    path = file("group/a", "b")
    assert split(f"{path}:group/a,b") == (path, ["group/a", "b"])
    batches = batches_of(TARGET, request(f"{path}:group/a,b"))
    assert list(batches(0)[1]) == [0, 1, 2]
    batches.close()


def test_a_process_reads_its_own_rows_in_the_model_s_dtypes(file):
    batches = batches_of(TARGET, request(file()), part=slice(1, 3))
    x, y = batches(1)
    assert x[:, 0, 0].tolist() == [4.0, 5.0]
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    batches.close()


def test_drawn_batches_are_cut_in_any_nest():
    nest = ({"a": np.arange(4), "b": [np.arange(8).reshape(4, 2), 0.5]}, None)
    own = Target("t", "torch", None, None, None, (), (), make_batch=lambda rows: nest)
    (named, targets) = batches_of(own, request(batch=4), part=slice(2, 4))(0)
    assert named["a"].tolist() == [2, 3]
    assert named["b"][0].tolist() == [[4, 5], [6, 7]]
    assert named["b"][1] == 0.5
    assert targets is None


@pytest.mark.parametrize(
    ("names", "shape", "batch", "data", "said"),
    [
        (("pictures", "y"), (2, 2), 3, "{}", r"no data set for 'image'.*'pictures', 'y'.*--data .*:inputs,labels"),
        (("x", "y"), (4,), 3, "{}", r"rows of 'x'.*\(4,\), and the model takes \(2, 2\)"),
        (("x", "y"), (2, 2), 11, "{}", "has 10 rows, and a batch has 11. Use a smaller --batch"),
        (("x", "y"), (2, 2), 3, "{}:x", "must name 2 data sets, for image, label"),
    ],
)
def test_a_file_that_does_not_fit_is_said_with_what_it_has(tmp_path, names, shape, batch, data, said):
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as made:
        made[names[0]] = np.zeros((10, *shape))
        made[names[1]] = np.arange(10)
    with pytest.raises(ValueError, match=said):
        batches_of(TARGET, request(data.format(path), batch))


def test_a_target_with_batches_of_its_own_does_not_read_files(file):
    own = Target("t", "torch", None, None, None, (), (), lambda rows: (np.zeros(rows), ()))
    with pytest.raises(ValueError, match="come from its make_batch"):
        batches_of(own, request(file()))
