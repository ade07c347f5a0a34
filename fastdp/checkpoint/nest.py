"""Values in any nest of lists, tuples and dicts as JSON and arrays, without pickle: what a state is stored as."""

from __future__ import annotations

import collections
import json
import math
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastdp.checkpoint import damage

STRUCTURE, ARRAYS = "state.json", "state.npz"


class Tensors(Protocol):
    """A library's tensors as arrays. `fastdp.tensors.checkpoints` is torch's."""

    def pack(self, value: Any) -> tuple[str, list[np.ndarray]] | None:
        """A tensor as its kind and copies of its arrays in host memory; None where the value is no tensor."""

    def unpack(self, kind: str, arrays: Sequence[np.ndarray]) -> Any:
        """The tensor, in host memory."""


@dataclass
class Packed:
    """A value that shares no memory with what it was packed from: its structure for JSON, and its arrays."""

    structure: Any
    arrays: list[np.ndarray] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the two files into a folder."""
        (folder / STRUCTURE).write_text(json.dumps(self.structure), "utf-8")
        np.savez(folder / ARRAYS, *self.arrays)


def pack(value: Any, tensors: Tensors | None = None) -> Packed:
    """Copy a value.

    Raises:
        TypeError: a part of it is neither plain data nor an array; the message names its place.
    """
    packed = Packed(None)
    packed.structure = _pack(value, "", packed.arrays, tensors)
    return packed


# What Python's, NumPy's and torch's readers raise for content that nobody has written.
_ODD = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
)


# What models raise for states of others, or for a file of theirs that is none, besides their documented errors.
_UNFIT = (
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)


class NeedsTorchError(ValueError):
    """A checkpoint holds tensors, and nobody has imported torch."""


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """While a checkpoint is read: content that makes no sense, though its checksums do, is one error that names it.

    Raises:
        ValueError: it has such content.
        OSError: the machine does not let it be read.
    """
    try:
        yield
    except NeedsTorchError:
        raise
    except _ODD as error:
        if damage.of_the_machine(error):
            raise
        raise ValueError(
            f"The checkpoint {place} cannot be read, though its checksums are right ({type(error).__name__}: {error})."
        ) from error


@contextmanager
def loading(place: Path) -> Iterator[None]:
    """While what was read is given to models and optimizers: what does not fit them is an error that names it.

    Raises:
        ValueError: a part is missing or of another form. Errors of the models' own (ValueError, TypeError,
            RuntimeError) pass.
        OSError: the machine does not let it be read.
    """
    try:
        yield
    except _UNFIT as error:
        if damage.of_the_machine(error):
            raise
        raise ValueError(
            f"The checkpoint {place} does not fit this run: {type(error).__name__}: {error}. Make the same model and "
            "the same parts as before, or choose another folder."
        ) from error


def read(folder: Path, tensors: Tensors | None = None) -> Any:
    """The value that `Packed.write` has written into a folder, in new memory.

    Raises:
        ValueError: the files are no such value, or hold tensors and there is no torch.
    """
    structure = json.loads((folder / STRUCTURE).read_text("utf-8"))
    check_arrays(folder / ARRAYS)
    with np.load(folder / ARRAYS, allow_pickle=False) as file:
        arrays = [file[f"arr_{i}"] for i in range(len(file.files))]
    return _unpack(structure, arrays, tensors)


def check_stored(path: Path) -> None:
    """Check that an archive stores all that it declares: its readers allocate first.

    Raises:
        ValueError: it does not, or is compressed, which no writer of a checkpoint's files does.
    """
    with zipfile.ZipFile(path) as archive:
        found = archive.infolist()
    stored = all(one.compress_type == zipfile.ZIP_STORED and one.file_size == one.compress_size for one in found)
    if not stored or sum(one.file_size for one in found) > path.stat().st_size:
        raise ValueError(f"{path} declares more than it stores: it is damaged, or made to fill the memory.")


def check_arrays(path: Path) -> None:
    """Check that no array of NumPy's archive is larger than what is stored of it.

    Raises:
        ValueError: one is, or is none, or is compressed.
    """
    check_stored(path)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                shape, dtype = _header(file)
            if dtype is None or math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{path} declares more than it stores: {info.filename} is larger than its part.")


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any] | None]:
    """Shape and dtype of an array in a file; no dtype where it has an unknown format, or is none."""
    known = _HEADERS.get(np.lib.format.read_magic(file))
    try:
        shape, _, dtype = known(file) if known is not None else ((), None, None)
    except tokenize.TokenError as error:  # NumPy reads headers by Python's tokenizer
        raise ValueError(f"its header is damaged ({error})") from error
    return shape, dtype


_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[Any, ...]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def unpack(packed: Packed, tensors: Tensors | None = None) -> Any:
    """The value that was packed. It shares the packed arrays."""
    return _unpack(packed.structure, packed.arrays, tensors)


_PLAIN = (bool, int, float, str)
_DICTS = {"dict": dict, "ordered": collections.OrderedDict, "counter": collections.Counter}


def _pack(value: Any, place: str, arrays: list[np.ndarray], tensors: Tensors | None) -> Any:
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        arrays.append(np.array(value))
        return {"array" if isinstance(value, np.ndarray) else "number": len(arrays) - 1}
    if isinstance(value, bytes):
        arrays.append(np.frombuffer(value, np.uint8).copy())
        return {"bytes": len(arrays) - 1}
    if isinstance(value, (list, tuple)):
        parts = [_pack(part, f"{place}[{i}]", arrays, tensors) for i, part in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    if isinstance(value, dict):
        kind = next((name for name, one in _DICTS.items() if type(value) is one), "dict")
        pairs = [
            [_pack(key, f"{place} key", arrays, tensors), _pack(part, f"{place}[{key!r}]", arrays, tensors)]
            for key, part in value.items()
        ]
        return {kind: pairs}
    packed = tensors.pack(value) if tensors is not None else None
    if packed is not None:
        first = len(arrays)
        arrays.extend(packed[1])
        return {"tensor": [packed[0], first, len(arrays)]}
    if isinstance(value, _PLAIN):  # an enum's, say: its plain value
        return next(kind(value) for kind in _PLAIN if isinstance(value, kind))
    raise TypeError(
        "A state must be plain data: numbers, strings, arrays and tensors in lists, tuples and dicts. "
        f"Received an object of type {type(value).__name__} at state{place}. Leave it out of `state_dict`, or convert "
        "it."
    )


def _unpack(structure: Any, arrays: Sequence[np.ndarray], tensors: Tensors | None) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "array":
        return arrays[content]
    if kind == "number":
        return arrays[content][()]
    if kind == "bytes":
        return arrays[content].tobytes()
    if kind in ("list", "tuple"):
        parts = [_unpack(part, arrays, tensors) for part in content]
        return parts if kind == "list" else tuple(parts)
    if kind in _DICTS:
        pairs = [(_unpack(key, arrays, tensors), _unpack(part, arrays, tensors)) for key, part in content]
        return _DICTS[kind](dict(pairs))
    if kind == "tensor":
        if tensors is None:
            raise NeedsTorchError("The checkpoint holds tensors of torch: import torch before it is restored.")
        return tensors.unpack(content[0], arrays[content[1] : content[2]])
    raise ValueError(
        f"A state of a checkpoint has a part of unknown kind {kind!r}: a newer fastdp may have written it."
    )
