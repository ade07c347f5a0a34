"""Checks of HDF5 files from elsewhere: data lies in the file itself, and sizes are those of what is stored.

A file may name any other file of the machine (external links, external storage, virtual data sets), and may declare
petabytes that it does not store, or stores compressed. Both are found here before anything is read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

# HDF5's own filters make data no smaller than that: deflate reaches 1,032. A larger array is one that a file only
# declares, or one that was packed again and again to fill memory.
MOST_COMPRESSION = 1100
FREE_NBYTES = 1 << 20  # an array this small is read without asking: fill values are not stored
_HEAP = b"GCOL\1\0\0\0"
# What h5py and Keras raise where a file is damaged, besides OSError, TypeError and ValueError.
_DAMAGED = (AttributeError, EOFError, IndexError, KeyError, MemoryError, OverflowError, RuntimeError, AssertionError)


@contextlib.contextmanager
def damage_named(path: str, argument: str, *, type_errors: bool = False) -> Iterator[None]:
    """Turn what libraries raise about a damaged file into errors that name the file.

    OSError and ValueError stay what they are, and get the file's name if they lack it; with `type_errors` also
    TypeError, by which Keras tells of classes that it does not know. All else that comes from damage becomes a
    ValueError. Errors that name the file pass as they are.
    """
    try:
        yield
    except (*_DAMAGED, TypeError) as error:
        if path in str(error):
            raise
        if type_errors and isinstance(error, TypeError):
            raise TypeError(f"{argument} {path!r} cannot be read: {error}") from error
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(
            f"{argument} must be a whole HDF5 file, got {path!r}, which is damaged ({said}): take another copy of it"
        ) from error
    except (OSError, ValueError) as error:
        if path in str(error) or (isinstance(error, OSError) and error.filename is not None):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{argument} {path!r} cannot be read: {error}") from error


def check_conversion(source: str, destination: str) -> None:
    """Check the two paths of a conversion, which needs no library but h5py.

    Raises:
        OSError, ValueError: there is no such HDF5 file, or no new file of that name can be written.
    """
    if not os.path.exists(source):
        raise FileNotFoundError(f"source must be an existing .h5 file, got {source!r}: check the path")
    if not h5py.is_hdf5(source):
        raise OSError(f"source must be an HDF5 file, got {source!r} of another format: pass a Keras 2 .h5 file")
    if not destination.endswith((".h5", ".hdf5")) or destination.endswith(".weights.h5"):
        raise ValueError(
            f"destination must end in .h5 or .hdf5, and not in .weights.h5, which Keras 3 reads as another "
            f"format, got {destination!r}: rename it"
        )
    if os.path.lexists(destination):
        raise FileExistsError(f"destination must be a new file, got {destination!r}, which exists: choose another")


def declared_nbytes(shape: tuple[int, ...] | None, dtype: np.dtype[Any]) -> int:
    """The size of an array in memory, by numbers that do not overflow. An empty data set has no shape."""
    return 0 if shape is None else math.prod(map(int, shape)) * dtype.itemsize


def check_stored(data: h5py.Dataset, nbytes: int, path: str, argument: str, stored: int | None = None) -> None:
    """Refuse to read `nbytes` of a data set if the file stores too little for that.

    `stored` is what the file stores of it, if that is known: HDF5 adds up all chunks each time it is asked.

    Raises:
        ValueError: they are more than 1 MiB, and more than 1,100 times what is stored.
    """
    if nbytes <= FREE_NBYTES:
        return
    # A damaged file declares storage too.
    stored = min(data.id.get_storage_size() if stored is None else stored, os.path.getsize(path))
    if nbytes > MOST_COMPRESSION * stored:
        raise ValueError(
            f"{argument} must store what it declares, got {path!r} with {nbytes:,} bytes declared for {data.name!r} "
            f"and {stored:,} stored: the file is damaged, or it is made to fill the memory"
        )


def check_tree(group: h5py.Group, path: str, argument: str) -> int:
    """Make sure that all below a group lies in the file itself and is stored, and return its declared bytes.

    Links that Keras never writes are refused: external and soft ones, and a group that is reached twice. Data sets must
    be numbers. The whole may be 1,100 times as large as the file.

    Raises:
        ValueError: it is not so.
    """
    check_texts(path, argument)
    size, total, seen, waiting = os.path.getsize(path), 0, set(), [group]
    while waiting:
        here = waiting.pop()
        place = h5py.h5o.get_info(here.id).addr
        if place in seen:
            raise _refused(path, argument, f"the group {here.name!r}, which is reached twice")
        seen.add(place)
        _check_attributes(here, size, path, argument)
        for name in here:
            link = here.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _refused(path, argument, f"{name!r} in {here.name!r}, a link to elsewhere ({_target(link)})")
            item = here[name]
            if isinstance(item, h5py.Group):
                waiting.append(item)
            elif isinstance(item, h5py.Dataset):
                total += _checked_nbytes(item, path, argument)
            else:
                raise _refused(path, argument, f"{name!r} in {here.name!r}, which is neither a group nor an array")
        if total > MOST_COMPRESSION * size:
            raise ValueError(
                f"{argument} must store what it declares, got {path!r} of {size:,} bytes with arrays of more than "
                f"{total:,}: the file is damaged, or it is made to fill the memory"
            )
    return total


def check_texts(path: str, argument: str) -> None:
    """Make sure that texts of variable length can be read: HDF5 loops for ever where one of their heaps does.

    Looks for heaps in the whole file. Source of the format: the HDF5 file format specification, III.E, "Global Heap".

    Raises:
        ValueError: an object of a heap leads back or out of it, or the file has no 8-byte sizes, as all of h5py's have.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        sizes = content[13:15] if content[8:9] < b"\2" else content[9:11]
        steps = -1 if content[:8] != b"\x89HDF\r\n\x1a\n" or sizes != b"\x08\x08" else size // 4
        start = content.find(_HEAP)
        while start >= 0 and steps >= 0:
            place, end = start + 16, start + int.from_bytes(content[start + 8 : start + 16], "little")
            while place + 16 <= min(end, size) and steps >= 0:
                number, nbytes = content[place : place + 2], int.from_bytes(content[place + 8 : place + 16], "little")
                length = 16 + (nbytes + 7) // 8 * 8 if number != b"\0\0" else nbytes
                steps = steps - 1 if 0 < length <= end - place else -1
                place += length
            start = content.find(_HEAP, start + 1)
    if steps < 0:
        raise ValueError(
            f"{argument} must be a whole HDF5 file, got {path!r} with texts that cannot be read: the file is damaged"
        )


def _checked_nbytes(data: h5py.Dataset, path: str, argument: str) -> int:
    """The declared size of a data set of numbers that lies in the file."""
    if data.external or data.is_virtual:
        raise _refused(path, argument, f"{data.name!r}, whose data lies in other files")
    if data.dtype.kind not in "biuf":
        raise _refused(path, argument, f"{data.name!r} of dtype {data.dtype}, which are no numbers")
    nbytes = declared_nbytes(data.shape, data.dtype)
    check_stored(data, nbytes, path, argument)
    return nbytes


def _check_attributes(holder: h5py.Group, size: int, path: str, argument: str) -> None:
    """Attributes are never compressed: none is larger than the file."""
    for name in holder.attrs:
        found = holder.attrs.get_id(name)
        if declared_nbytes(found.shape, found.dtype) > size:
            raise _refused(path, argument, f"the attribute {name!r} of {holder.name!r}, which is larger than the file")


def _target(link: Any) -> str:
    return f"{link.filename!r}" if isinstance(link, h5py.ExternalLink) else f"{getattr(link, 'path', link)!r}"


def _refused(path: str, argument: str, what: str) -> ValueError:
    return ValueError(f"{argument} must hold its data itself, got {path!r} with {what}: do not trust this file")


def own_data(group: h5py.Group, name: str, path: str, argument: str) -> np.ndarray[Any, Any]:
    """The values of an array below a group, which must lie in the file itself.

    Raises:
        ValueError: there is none, its name leads out of the group, its data lies elsewhere or is not stored.
    """
    if any(part in ("", ".") for part in name.split("/")):
        raise _refused(path, argument, f"an array named {name!r}, which leads out of its group")
    here: Any = group
    for part in name.split("/"):
        link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
        if link is not None and not isinstance(link, h5py.HardLink):
            raise _refused(path, argument, f"{name!r}, a link to elsewhere ({_target(link)})")
        here = None if link is None else here[part]
    if not isinstance(here, h5py.Dataset):
        raise ValueError(
            f"{argument} must hold each weight it lists, got {path!r} without {name!r}: the file is damaged"
        )
    _checked_nbytes(here, path, argument)
    return np.asarray(here[()])


def read_names(group: h5py.Group, name: str) -> list[str]:
    """Read a list of names that Keras stores in one attribute or splits over several.

    Raises:
        ValueError: it is no list of names, or has a name twice: arrays would be read again and again.
    """
    if name in group.attrs:
        chunks = [group.attrs[name]]
    else:
        chunks = []
        while f"{name}{len(chunks)}" in group.attrs:
            chunks.append(group.attrs[f"{name}{len(chunks)}"])
    items = [item for chunk in chunks for item in (chunk.ravel() if isinstance(chunk, np.ndarray) else [None])]
    names: list[Any] = [item.decode() if isinstance(item, bytes) else item for item in items]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"{name} must be a list of different names, got {str(chunks)[:100]}: the file is damaged")
    return names
