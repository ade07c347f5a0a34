"""Opens HDF5 files and data sets by name: one handle per file, and links that stay in the file."""

from __future__ import annotations

import errno
import os
import posixpath
import threading
import weakref

import h5py

# One read-only handle per file, by (device, inode). HDF5 closes it when the last matrix drops it.
_open_files: weakref.WeakValueDictionary[tuple[int, int], h5py.File] = weakref.WeakValueDictionary()
_open_files_lock = threading.Lock()

MOST_NAMES_SHOWN = 20
MOST_SOFT_LINKS = 64


def open_file(path: str) -> h5py.File:
    """The shared read-only handle of the file that is now at `path`."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        problem = "datapath must be an existing HDF5 file, check the path; found no file"
        raise FileNotFoundError(errno.ENOENT, problem, path) from None
    key = (status.st_dev, status.st_ino)
    with _open_files_lock:
        file = _open_files.get(key)
        if not file:  # none yet, or a handle that was closed elsewhere
            with open(path, "rb"):
                pass  # a folder or a file without permission raises its own OSError here
            if not h5py.is_hdf5(path):
                raise OSError(f"datapath must be an HDF5 file, got {path!r} of another format: convert it first")
            file = _open_files[key] = h5py.File(path, "r")
    return file


def open_dataset(file: h5py.File, name: str, follow_external: bool) -> h5py.Dataset:
    """Open the data set `name`. It must have rows and, unless `follow_external`, lie in the file itself."""
    place = name if follow_external else _resolve(file, name)
    data = None if place is None else file.get(place)
    if not isinstance(data, h5py.Dataset):
        found: list[str] = []
        file.visititems(lambda path, item: found.append(path) if isinstance(item, h5py.Dataset) else None)
        shown = ", ".join(repr(path) for path in sorted(found)[:MOST_NAMES_SHOWN]) or "none"
        more = f" and {len(found) - MOST_NAMES_SHOWN} more" if len(found) > MOST_NAMES_SHOWN else ""
        what = "a group" if isinstance(data, h5py.Group) else "no data set"
        raise KeyError(f"dataset must name a data set of {file.filename!r}: {name!r} is {what}, it has {shown}{more}")
    if not follow_external and (data.external or data.is_virtual):
        raise _leaves_file(file, name, "external storage" if data.external else "a virtual data set")
    if not data.shape:
        raise ValueError(
            f"dataset must have at least one axis, its rows; {name!r} has shape {data.shape}: store an array"
        )
    return data


def _resolve(file: h5py.File, name: str) -> str | None:
    """Resolve `name` to a path of hard links, or None. Follows soft links, rejects external ones."""
    parts, here, soft_links = name.split("/"), "/", 0
    while parts:
        part = parts.pop(0)
        if part in ("", "."):
            continue
        group = file[here]
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None or soft_links > MOST_SOFT_LINKS:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise _leaves_file(file, name, f"an external link to {link.filename!r}")
        if isinstance(link, h5py.SoftLink):
            soft_links += 1
            here = "/" if link.path.startswith("/") else here
            parts = link.path.split("/") + parts
        else:
            here = posixpath.join(here, part)
    return here


def _leaves_file(file: h5py.File, name: str, why: str) -> ValueError:
    return ValueError(
        f"dataset must lie in {file.filename!r} itself; {name!r} is {why}: "
        "pass follow_external=True if you trust where this file comes from"
    )
