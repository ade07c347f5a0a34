"""The batches that `fit` takes without torch's DataLoader are those that come out of it, in its order."""

from __future__ import annotations

import itertools

import h5py
import keras
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from keras.src.backend.torch.trainer import TorchEpochIterator
from keras.src.trainers.data_adapters.data_adapter_utils import get_torch_dataloader
from torch.utils.data import DataLoader

import fastdp  # noqa: F401 - chooses Keras's backend
from fastdp.data.hdf5 import HDF5Matrix
from fastdp.keras.fit.array_batches import ArrayBatches
from fastdp.keras.fit.host_batches import batches_of

DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool")


def both(make):
    """The batches of Keras's DataLoader and those taken without it, each with the generators' states afterwards."""
    found = []
    for take in (iter, batches_of):
        keras.utils.set_random_seed(3)
        with keras.device("cpu"):
            epochs = make()
            batches = [list(take(epochs._get_iterator())) for _ in range(2)]
        found.append((batches, torch.get_rng_state(), np.random.get_state()[1]))  # noqa: NPY002
    return found


def assert_same(one, other):
    """Nests of the same types, with tensors of the same bits."""
    assert type(one) is type(other)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_both_same(make):
    (one, *states), (other, *others) = both(make)
    assert_same(one, other)
    for a, b in zip(states, others, strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


def array(rows, dtype, shape, seed):
    return (np.random.default_rng(seed).normal(size=(rows, *shape)) * 50).astype(dtype)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 45),
    shuffle=st.sampled_from([True, False, "batch"]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    shape=st.sampled_from([(), (3,), (2, 0), (2, 1, 2)]),
    kind=st.sampled_from(["arrays", "tensors", "nest", "strided"]),
    classes=st.booleans(),
)
def test_arrays_are_cut_as_keras_cuts_them(rows, size, shuffle, dtypes, shape, kind, classes):
    parts = [array(rows, dtype, shape, seed) for seed, dtype in enumerate(dtypes)]
    if kind == "strided":
        parts = [np.repeat(part, 2, 0)[::-2] for part in parts]
    if kind == "tensors" and dtypes[0] not in ("uint16", "uint32"):
        parts[0] = torch.from_numpy(parts[0])
    if kind == "nest":
        parts[0] = {"b": parts[0], "a": [parts[0], None]}
    weights = None
    if classes and len(parts) == 2:
        parts[1], weights = np.arange(rows) % 3, {0: 1.0, 1: 2.0, 2: 0.5}
    if len(parts) == 3:
        parts[2] = np.abs(array(rows, "float32", (), 9))
    assert_both_same(lambda: TorchEpochIterator(*parts, batch_size=size, shuffle=shuffle, class_weight=weights))


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    kind=st.sampled_from(["tuple", "list", "nest", "tensor", "none"]),
    generator=st.booleans(),
)
def test_batches_of_generators_and_data_sets_are_converted_as_keras_does(dtypes, kind, generator):
    def batch(i):
        parts = tuple(array(i + 1, dtype, (2,), i) for dtype in dtypes)
        if kind == "nest":
            return {"b": parts[0], "a": (parts[0], None)}, *parts[1:]
        if kind == "tensor":
            return torch.arange(i + 1), *parts[1:]
        return (*parts, None)[:3] if kind == "none" else parts

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return list(batch(i)) if kind == "list" else batch(i)

    assert_both_same(lambda: TorchEpochIterator((batch(i) for i in range(5)) if generator else Data()))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_is_the_callers_own(shuffle):
    x = np.zeros((4, 2), "float32")
    for epochs in (
        TorchEpochIterator(x, x, batch_size=2, shuffle=shuffle),
        TorchEpochIterator((x[:2],) * 2 for _ in x),
    ):
        for batch in batches_of(epochs._get_iterator()):
            for part in batch:
                part += 1
    assert not x.any()


def test_a_loader_of_the_users_own_is_left_alone():
    data = torch.utils.data.TensorDataset(torch.arange(6), torch.arange(6))
    loader = DataLoader(data, batch_size=4)
    batches = batches_of(loader)
    assert type(batches).__name__ == "_SingleProcessDataLoaderIter"
    assert [part.tolist() for part in next(batches)] == [[0, 1, 2, 3]] * 2


def test_what_a_generator_raises_comes_out():
    def failing():
        yield (np.zeros((2, 2)),)
        yield (np.ones((2, 2)),)
        yield (np.ones((2, 2)),)
        raise OSError("no more")

    batches = batches_of(TorchEpochIterator(failing())._get_iterator())
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="no more"):
        next(batches)


def test_an_iterator_is_asked_for_when_its_first_batch_is():
    """A tf.data.Dataset shuffles anew for each iterator, and Keras makes one at the end of an epoch for nothing."""
    begun = []

    class Reshuffled:
        def __iter__(self):
            begun.append(len(begun))
            return iter([(np.full((2, 1), begun[-1], "float32"),)])

    for take in (iter, batches_of):
        loader, before = get_torch_dataloader(Reshuffled()), len(begun)
        unused, used = take(loader), take(loader)
        assert len(list(used)) == 1
        assert len(begun) == before + 1
        del unused


class Reused:
    """An array in chunks that hands out the same memory each time."""

    chunks = (4, 3)

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.block = array, array.shape, array.dtype, np.empty((4, 3), "float32")

    def __getitem__(self, rows):
        np.copyto(self.block, self.array[rows])
        return self.block


def test_batches_from_files_are_not_copied_and_no_memory_that_others_write_is_handed_over(tmp_path):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["x"] = x

    def halved(block, kept=np.empty((4, 3), "float32")):  # noqa: B008 - the same memory each time
        return np.multiply(block, 0.5, out=kept[: len(block)])

    with h5py.File(path) as file:
        given = {
            "file": (file["x"], x),
            "matrix": (HDF5Matrix(str(path), "x"), x),
            "normalized": (HDF5Matrix(str(path), "x", normalizer=halved), x / 2),
            "reused": (Reused(x), x),
            "memory": (x, x),
        }
        for name, (array, want) in given.items():
            taken = ArrayBatches(array, batch_size=4, shuffle=False, ahead=0)
            batches = [taken[i][0] for i in range(4)]
            np.testing.assert_array_equal(np.concatenate(batches), want, err_msg=name)
            assert not any(np.shares_memory(a, b) for a, b in itertools.pairwise(batches))
            tensors = [one[0] for one in batches_of(get_torch_dataloader([(b,) for b in batches]), new=True)]
            assert [t.numpy().ctypes.data for t in tensors] == [b.ctypes.data for b in batches]
