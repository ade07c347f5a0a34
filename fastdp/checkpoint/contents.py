"""The numbers of a checkpoint, or of a file of weights, by name, without the model that they belong to."""

from __future__ import annotations

import importlib
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fastdp.checkpoint import folders, nest
from fastdp.data.h5_checks import MOST_COMPRESSION, check_tree, damage_named

# Parts of a state that tell of the clock, of logs and of how steps ran: they may differ where all numbers are equal.
LEFT_OUT = ("captures", "callbacks")
_WEIGHTS = "model.weights.h5"
# What the libraries raise for files that are damaged.
_DAMAGED = (
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
)


class Numbers(dict[str, Any]):
    """Arrays, tensors' bits and plain values by name, in the order of the file. `dtypes` has the names of their types
    where NumPy has none, such as "bfloat16"."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, str] = {}


def read(path: Path) -> Numbers:
    """The numbers of a checkpoint's folder, of a run's folder (its newest whole checkpoint), or of a file.

    Args:
        path: a folder, or a file: `.keras`, `.h5`, `.weights.h5`, `.npz`, `.pt` or `.pth` (a state_dict of tensors).

    Nothing of the files is run. Arrays lie in the files themselves, and are no larger than what is stored.

    Raises:
        OSError: it cannot be read.
        ValueError: it is nothing of the above, or not what was written.
        ImportError: it holds tensors of torch, which is not installed.
    """
    found = Numbers()
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there.")
    if not path.is_dir():
        _read_file(path, "", found)
        return found
    place = _place_in(path)
    wrong = folders.what_is_wrong(place)
    if wrong is not None:
        raise ValueError(f"The checkpoint {place} is not whole: {wrong}.")
    for name in ("model.pt", "model.keras"):
        if (place / name).exists():
            _read_file(place / name, "model/", found)
    with nest.reading(place):
        state = nest.read(place, _torch() if "tensor" in (place / nest.STRUCTURE).read_text("utf-8") else None)
        _add("", state, found)
    return found


def _place_in(path: Path) -> Path:
    """The checkpoint that a folder is, or the newest whole one in it."""
    if (path / folders.MANIFEST).exists():
        return path
    steps = folders.steps_in(path)
    places = [path / folders.name_of(step) for step in steps]
    whole = next((place for place in places if folders.what_is_wrong(place) is None), None)
    if whole is None:
        raise ValueError(
            f"{path} has no whole checkpoint: a folder step-... with a {folders.MANIFEST} and all its files."
        )
    return whole


def _read_file(path: Path, prefix: str, found: Numbers) -> None:
    """Add the numbers of one file.

    Raises:
        OSError, ValueError: that cannot be done; the message names the file.
    """
    try:
        _read_by_name(path, prefix, found)
    except (OSError, *_DAMAGED) as error:
        if str(path) in str(error) and isinstance(error, (OSError, ValueError)):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{path} cannot be read: {said}") from error


def _read_by_name(path: Path, prefix: str, found: Numbers) -> None:
    name = path.name.lower()
    if name.endswith(".keras"):
        _read_keras(path, prefix, found)
    elif name.endswith((".h5", ".hdf5")):
        _read_h5(path, prefix, found)
    elif name.endswith(".npz"):
        nest.check_arrays(path)
        with np.load(path, allow_pickle=False) as file:
            for one in file.files:
                found[prefix + one] = file[one]
    elif name.endswith((".pt", ".pth")):
        _add(prefix.rstrip("/"), _torch_file(path), found)
    else:
        raise ValueError(
            f"{path} is no checkpoint and no file of weights: a folder of fastdp.Checkpoint, or a .keras, .h5, .npz, "
            ".pt or .pth file. Files of fingerprints are told by their first line."
        )


def _read_keras(path: Path, prefix: str, found: Numbers) -> None:
    """The weights of a `.keras` archive, which has one HDF5 file."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as scratch:
        info = archive.getinfo(_WEIGHTS)
        if info.file_size > MOST_COMPRESSION * max(1, info.compress_size):
            raise ValueError(f"{path} declares more than it stores: the file is damaged, or made to fill the disk.")
        _read_h5(Path(archive.extract(info, scratch)), prefix, found, str(path))


def _read_h5(path: Path, prefix: str, found: Numbers, called: str | None = None) -> None:
    with damage_named(called or str(path), "the file"), h5py.File(path, "r") as file:
        check_tree(file, str(path), "the file")
        file.visititems(
            lambda name, item: found.update({prefix + name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )


def _torch() -> Any:
    """Torch's side of checkpoints."""
    return importlib.import_module("fastdp.tensors.checkpoints")


def _torch_file(path: Path) -> Mapping[str, Any]:
    """A state_dict of tensors, and of nests of them."""
    if zipfile.is_zipfile(path):  # older ones are not
        nest.check_stored(path)
    state: Mapping[str, Any] = _torch().read_state(path)
    return state


def _add(name: str, value: Any, found: Numbers) -> None:
    """Add a nest's values by their places."""
    for place, part in _parts(value):
        if place in LEFT_OUT:
            continue
        _add(f"{name}/{place}" if name else place, part, found)
    if isinstance(value, (dict, list, tuple)):
        return
    packed = _torch().pack(value) if type(value).__module__.split(".")[0] == "torch" else None
    if packed is None:
        found[name] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        return
    kind, arrays = packed
    for number, array in enumerate(arrays):
        place = name if len(arrays) == 1 else f"{name}[{number}]"
        found[place], found.dtypes[place] = array, kind


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), part) for number, part in enumerate(value))
