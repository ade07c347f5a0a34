"""HDF5 files that mean harm: no other file is read, nothing is allocated that they do not store, no code runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from fastdp.data.h5_checks import check_tree, damage_named, own_data
from fastdp.keras.h5_files.convert import convert
from fastdp.utils import HDF5Matrix, load_model, load_weights

HUGE = 1 << 40
SECRET = np.full((3, 4), 42.0, np.float32)
# A marshalled `lambda x: x`.
CODE = "4wEAAAAAAAAAAAAAAAEAAAACAAAAQwAAAHMEAAAAfABTACkBTqkAKQHaAXhyAQAAAHIBAAAA+gEu2gg8bGFtYmRhPgEAAADzAAAAAA=="


def build() -> keras.Model:
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(1, name="last")(keras.layers.Dense(4, name="first")(x)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A trained model's file, with the state of its optimizer."""
    model = build()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.train_on_batch(np.ones((2, 3), np.float32), np.ones((2, 1), np.float32))
    path = tmp_path_factory.mktemp("whole") / "m.h5"
    model.save(path)
    return path.read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    """A file to change, beside another one that it may not reach."""
    (tmp_path / "m.h5").write_bytes(whole)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = SECRET
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    return tmp_path / "m.h5"


def weight_of(group: h5py.Group) -> str:
    """The name of an array of shape (3, 4) below a group."""
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if getattr(item, "shape", None) == (3, 4) else None)
    return found[0]


def external_link(group: h5py.Group, name: str, folder: Path) -> None:
    group[name] = h5py.ExternalLink(str(folder / "secret.h5"), "x")


def soft_link(group: h5py.Group, name: str, folder: Path) -> None:
    group[name] = h5py.SoftLink("/model_weights")


def external_storage(group: h5py.Group, name: str, folder: Path) -> None:
    group.create_dataset(name, (3, 4), "f4", external=[(str(folder / "secret.bin"), 0, h5py.h5f.UNLIMITED)])


def virtual(group: h5py.Group, name: str, folder: Path) -> None:
    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "x", (3, 4))
    group.create_virtual_dataset(name, layout)


def not_stored(group: h5py.Group, name: str, folder: Path) -> None:
    group.create_dataset(name, (HUGE,), "f4", chunks=(1024,))


def overflowing(group: h5py.Group, name: str, folder: Path) -> None:
    """Sizes whose product is 0 in 64 bits."""
    group.create_dataset(name, (1 << 32, 1 << 32), "f4", chunks=(1, 1024))


def packed(group: h5py.Group, name: str, folder: Path) -> None:
    """32 MiB of zeros, deflated twice: a few hundred bytes."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((1 << 22,))
    for _ in range(2):
        made.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (9,))
    space = h5py.h5s.create_simple((1 << 23,))
    parent, _, last = name.rpartition("/")
    owner = group.require_group(parent) if parent else group
    data = h5py.h5d.create(owner.id, last.encode(), h5py.h5t.NATIVE_FLOAT, space, made)
    h5py.Dataset(data)[:] = 0


def pairs(group: h5py.Group, name: str, folder: Path) -> None:
    group.create_dataset(name, data=np.zeros((3, 4), [("a", "f4"), ("b", "f4")]))


def texts(group: h5py.Group, name: str, folder: Path) -> None:
    group.create_dataset(name, data=["text"] * 3)


def opaque(group: h5py.Group, name: str, folder: Path) -> None:
    group.create_dataset(name, (3, 4), "V4")


FAULTS = [external_link, soft_link, external_storage, virtual, not_stored, overflowing, packed, pairs, texts, opaque]
ARGUMENT = r"must (hold its data itself|store what it declares)"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["model_weights", "optimizer_weights"])
def test_what_lies_elsewhere_or_nowhere_is_refused_by_load_model(
    path: Path, where: str, fault: Callable[[h5py.Group, str, Path], None]
) -> None:
    with h5py.File(path, "a") as file:
        name = weight_of(file[where])
        del file[where][name]
        fault(file[where], name, path.parent)
    with pytest.raises(ValueError, match=ARGUMENT) as error:
        load_model(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("by_name", [True, False])
def test_what_lies_elsewhere_or_nowhere_is_refused_by_load_weights_and_nothing_changes(
    path: Path, by_name: bool, fault: Callable[[h5py.Group, str, Path], None]
) -> None:
    with h5py.File(path, "a") as file:
        name = weight_of(file["model_weights"])
        del file["model_weights"][name]
        fault(file["model_weights"], name, path.parent)
    model = build()
    before = model.get_weights()
    with pytest.raises(ValueError, match=ARGUMENT) as error:
        load_weights(model, path, by_name=by_name)
    assert str(path) in str(error.value)
    for value, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("fault", [external_link, not_stored])
def test_convert_refuses_such_a_file_whichever_part_of_it_it_is(
    path: Path, fault: Callable[[h5py.Group, str, Path], None]
) -> None:
    with h5py.File(path, "a") as file:
        fault(file, "more", path.parent)
    with pytest.raises(ValueError, match=rf"source {ARGUMENT}"):
        convert(path, path.parent / "new.h5")


def test_names_that_are_listed_twice_or_lead_out_of_their_group_are_refused(path: Path) -> None:
    """One array, read for each of 60,000 names, would fill any memory."""
    with h5py.File(path, "a") as file:
        group = file["optimizer_weights"]
        names = list(group.attrs["weight_names"])
        group.attrs["weight_names"] = [*names, names[-1]]
    with pytest.raises(ValueError, match="weight_names must be a list of different names"):
        load_model(path)
    with h5py.File(path) as file:
        name = weight_of(file["model_weights"])
        np.testing.assert_equal(own_data(file["model_weights"], name, str(path), "x").shape, (3, 4))
        for other in (f"/model_weights/{name}", f"./{name}", f"{name}/", ""):
            with pytest.raises(ValueError, match="leads out of its group"):
                own_data(file["model_weights"], other, str(path), "x")
        with pytest.raises(ValueError, match="without 'nowhere/at/all'"):
            own_data(file["model_weights"], "nowhere/at/all", str(path), "x")


def test_a_group_that_is_reached_twice_is_refused(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["model_weights/again"] = file["model_weights"]
    with pytest.raises(ValueError, match="which is reached twice"), h5py.File(path) as file:
        check_tree(file, str(path), "filepath")


def test_many_small_arrays_that_are_not_stored_are_refused_together(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for number in range(40):
            file.create_dataset(f"n{number}", (1 << 18,), "f4")
    with pytest.raises(ValueError, match="with arrays of more than"):
        load_model(path)


def configured(path: Path, name: str, change: Callable[[Any], None]) -> None:
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs[name])
        change(config)
        file.attrs[name] = json.dumps(config)


@pytest.mark.parametrize("units", [10**10, 10**6, 10**18])
def test_a_layer_far_larger_than_the_weights_of_the_file_is_not_made(path: Path, units: int) -> None:
    """A million units on a million inputs are four terabytes."""

    def change(config: Any) -> None:
        for layer in config["config"]["layers"][1:]:
            layer["config"]["units"] = units

    configured(path, "model_config", change)
    with pytest.raises(ValueError, match=r"a model of the size of its weights|cannot be read|damaged") as error:
        load_model(path)
    assert str(path) in str(error.value)


LAMBDA = {
    "class_name": "Lambda",
    "config": {"name": "l", "function": [CODE, None, None], "function_type": "lambda"},
    "name": "l",
    "inbound_nodes": [],
}
FOREIGN = {"module": "os", "class_name": "system", "config": {"command": "exit 1"}, "registered_name": "system"}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("model_config", "layers", LAMBDA),
        ("training_config", "loss", {"class_name": "__lambda__", "config": {"value": CODE}}),
        ("training_config", "loss", FOREIGN),
        ("training_config", "metrics", [FOREIGN]),
        ("training_config", "loss", FOREIGN | {"class_name": "function", "module": "builtins", "config": "eval"}),
        ("training_config", "optimizer_config", FOREIGN),
    ],
)
def test_safe_mode_is_keras_own_no_code_of_the_file_and_no_foreign_function_runs(
    path: Path, name: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("os.system", ran.append)

    def change(config: Any) -> None:
        if key == "layers":
            config["config"]["layers"].append(value)
        else:
            config[key] = value

    configured(path, name, change)
    with pytest.raises((ValueError, TypeError), match=r"safe_mode=False|Could not (locate|interpret)") as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert ran == []


@pytest.mark.parametrize("name", ["model_config", "training_config"])
@pytest.mark.parametrize("text", ["[" * 60_000, "[1]", "{}", "null", 5, "{", '{"class_name": 1}', b"\xff\xfe"])
def test_a_configuration_that_is_none_is_an_error_that_names_the_file(path: Path, name: str, text: Any) -> None:
    with h5py.File(path, "a") as file:
        del file.attrs[name]
        file.attrs[name] = np.bytes_(text) if isinstance(text, bytes) else text
    with pytest.raises((ValueError, TypeError)) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_a_huge_row_or_chunk_that_is_not_stored_is_not_allocated(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("row", (4, HUGE), "f4", chunks=(1, 1024))
        file.create_dataset("chunk", (4, 1 << 26), "f4", chunks=(1, 1 << 26), compression="gzip")
        file.create_dataset("overflow", (4, 1 << 32, 1 << 32), "f4", chunks=(1, 1, 1024))
        file.create_dataset("rows", (HUGE, 4), "f4", chunks=(1024, 4))
        file["real"] = np.zeros((1000, 1000), np.float32)
    for name in ("row", "chunk", "overflow"):
        with pytest.raises(ValueError, match=rf"datapath must store what it declares, got .*a\.h5.*'/{name}'"):
            HDF5Matrix(tmp_path / "a.h5", name)
    with HDF5Matrix(tmp_path / "a.h5", "rows") as rows:
        assert rows[HUGE // 2].tolist() == [0.0] * 4, "few rows of what is not stored are fill values"
        with pytest.raises(ValueError, match="datapath must store what it declares"):
            np.asarray(rows)
    with HDF5Matrix(tmp_path / "a.h5", "real") as real:
        assert np.asarray(real).nbytes == 4_000_000


def heap_of(content: bytes) -> int:
    """Where the texts of variable length lie in a file."""
    return content.index(b"GCOL\1\0\0\0")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("nbytes", [0, (1 << 64) - 16, 1 << 40])
def test_texts_whose_sizes_lead_back_do_not_hang_any_reader(path: Path, nbytes: int, tmp_path: Path) -> None:
    """HDF5 2.0 reads such a heap for ever, and no signal ends it."""
    with h5py.File(path, "a") as file:
        file["texts"] = ["a", "b"]
    content = bytearray(path.read_bytes())
    place = heap_of(content) + 16
    while content[place : place + 2] != b"\0\0":
        place += 16 + (int.from_bytes(content[place + 8 : place + 16], "little") + 7) // 8 * 8
    content[place + 8 : place + 16] = nbytes.to_bytes(8, "little")
    path.write_bytes(content)
    for read in (load_model, lambda p: load_weights(build(), p), lambda p: HDF5Matrix(p, "texts")):
        with pytest.raises(ValueError, match=r"with texts that cannot be read: the file is damaged"):
            read(path)


def test_errors_of_libraries_get_the_name_of_the_file_and_keep_their_class() -> None:
    for raised, expected in (
        (KeyError("x"), ValueError),
        (MemoryError(), ValueError),
        (RecursionError("deep"), ValueError),
        (OSError("torn"), OSError),
        (json.JSONDecodeError("bad", "{", 1), ValueError),
        (TypeError("kind"), ValueError),
    ):
        with pytest.raises(expected, match=re.escape("argument '/a/b.h5' cannot be read|damaged").replace(r"\|", "|")):
            _raise_within(raised)
    with (
        pytest.raises(TypeError, match=r"'/a/b\.h5' cannot be read: kind"),
        damage_named("/a/b.h5", "argument", type_errors=True),
    ):
        raise TypeError("kind")
    named = KeyError("no data set in '/a/b.h5'")
    with pytest.raises(KeyError) as error:
        _raise_within(named)
    assert error.value is named
    with pytest.raises(ZeroDivisionError), damage_named("/a/b.h5", "argument"):
        raise ZeroDivisionError


def _raise_within(error: Exception) -> None:
    with damage_named("/a/b.h5", "argument"):
        raise error
