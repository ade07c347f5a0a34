"""Mutations of HDF5 files and archives: what a damaged disk, a careless program or a hostile hand makes of them."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SECRET = 42.5  # the value of all numbers in files outside, which nothing may ever return
SECRET_TEXT = b"SECRET"
LARGE = (1 << 20, 1 << 26, 1 << 31, 1 << 32, 1 << 40, 1 << 62)
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**6, 10**12, "", "x", "../x", "/", "\0", "a" * 300, [], {}, [[]], "é")


def write_secrets(folder: Path) -> None:
    """The files outside that hostile ones point at."""
    with h5py.File(folder / "secret.h5", "w") as file:
        file["x"] = np.full((3, 4), SECRET, np.float32)
    np.full(1 << 10, SECRET, np.float32).tofile(folder / "secret.bin")
    (folder / "secret.txt").write_bytes(SECRET_TEXT)


def _items(file: h5py.File) -> list[tuple[h5py.Group, str]]:
    """Every hard link, as its group and its name."""
    found, waiting = [], [file]
    while waiting:
        group = waiting.pop()
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.HardLink):
                found.append((group, name))
                if isinstance(group[name], h5py.Group) and len(found) < 200:
                    waiting.append(group[name])
    return found


def _link(file: h5py.File, draw: random.Random, folder: Path) -> None:
    """Put a link in the place of something."""
    group, name = draw.choice(_items(file))
    targets = [
        h5py.ExternalLink(str(folder / "secret.h5"), "x"),
        h5py.ExternalLink(str(folder / "secret.h5"), "/"),
        h5py.ExternalLink("secret.h5", "x"),
        h5py.ExternalLink(str(folder / "nowhere.h5"), "x"),
        h5py.SoftLink("/"),
        h5py.SoftLink("."),
        h5py.SoftLink(f"{group.name}/{name}"),
        h5py.SoftLink(draw.choice(_items(file))[1]),
    ]
    del group[name]
    group[name] = draw.choice(targets)


def _hard_link(file: h5py.File, draw: random.Random, folder: Path) -> None:
    """Let something be found at a second place, perhaps inside itself."""
    (one, name), (other, _) = draw.choice(_items(file)), draw.choice(_items(file))
    other[f"{name}{draw.randrange(3)}"] = one[name]


def _move(file: h5py.File, draw: random.Random, folder: Path) -> None:
    """Rename or delete something."""
    group, name = draw.choice(_items(file))
    if draw.random() < 0.5:
        group.move(name, draw.choice(["x", name + "_1", "a/b/c", name[:-1] or "y", "é", "x" * 5000]))
    else:
        del group[name]


def _data(file: h5py.File, draw: random.Random, folder: Path) -> None:
    """Put another data set in the place of something."""
    group, name = draw.choice(_items(file))
    shape = group[name].shape if isinstance(group[name], h5py.Dataset) and group[name].shape else (3, 4)
    del group[name]
    kind = draw.choice(["external", "virtual", "huge", "packed", "dtype", "shape", "text", "empty", "group", "objects"])
    if kind == "external":
        group.create_dataset(name, shape, "f4", external=[(str(folder / "secret.bin"), 0, h5py.h5f.UNLIMITED)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((3, 4), "f4")
        layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "x", (3, 4))
        group.create_virtual_dataset(name, layout)
    elif kind == "huge":
        sizes = tuple(draw.choice(LARGE) for _ in range(draw.randrange(1, 4)))
        group.create_dataset(name, sizes, "f4", chunks=(1,) * (len(sizes) - 1) + (1024,))
    elif kind == "packed":
        group.create_dataset(name, data=np.zeros(1 << 18, "f4"), compression="gzip", shuffle=True)
    elif kind == "dtype":
        dtype = draw.choice(["f2", "f8", "i1", "u8", "c8", "S9", "V3", "?", [("a", "f4")], h5py.string_dtype()])
        group.create_dataset(name, shape, dtype)
    elif kind == "shape":
        group[name] = np.ones([draw.randrange(4) for _ in range(draw.randrange(4))], "f4")
    elif kind == "text":
        group[name] = "text"
    elif kind == "empty":
        group[name] = h5py.Empty("f4")
    elif kind == "group":
        group.create_group(name)
    else:
        group.create_dataset(name, data=[b"a", b"bc"], dtype=h5py.special_dtype(vlen=bytes))


def _attribute(file: h5py.File, draw: random.Random, folder: Path) -> None:
    """Change, delete or make an attribute."""
    holders = [file, *(group[name] for group, name in _items(file))]
    holder = draw.choice([one for one in holders if len(one.attrs)] or holders)
    name = draw.choice(sorted(holder.attrs) or ["weight_names"])
    old = holder.attrs.get(name)
    if old is not None:
        del holder.attrs[name]
    values: list[Any] = [
        np.asarray(old)[::-1] if isinstance(old, np.ndarray) else b"x",
        np.repeat(old, 2) if isinstance(old, np.ndarray) else 5,
        np.asarray(old)[:-1] if isinstance(old, np.ndarray) and old.size > 1 else "",
        [b"../x", b"/x", b"."],
        np.zeros((2, 2)),
        h5py.Empty("f4"),
        np.bytes_(b"\xff\xfe"),
        "[" * 3000,
        [b"a/" * 500],
        1.5,
    ]
    if draw.random() < 0.9:
        holder.attrs[name] = draw.choice(values)


def _configuration(file: h5py.File, draw: random.Random, folder: Path) -> None:
    """Change a value deep in a model's configuration or its compile settings."""
    names = [name for name in ("model_config", "training_config") if isinstance(file.attrs.get(name), (str, bytes))]
    if not names:
        return _attribute(file, draw, folder)
    name = draw.choice(names)
    try:
        config = json.loads(file.attrs[name])
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    waiting = [config]
    while waiting:
        here = waiting.pop()
        keys = here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        places += [(here, key) for key in keys]
        waiting += [here[key] for key in keys]
    if places:
        here, key = draw.choice(places)
        other = draw.choice(places)
        here[key] = draw.choice([draw.choice(ODD), json.loads(json.dumps(other[0][other[1]]))])
    file.attrs[name] = json.dumps(config)
    return None


H5_MUTATIONS: dict[str, Callable[[h5py.File, random.Random, Path], None]] = {
    "link": _link,
    "hard link": _hard_link,
    "move": _move,
    "data": _data,
    "attribute": _attribute,
    "configuration": _configuration,
}
BYTE_MUTATIONS = ("flip", "cut", "fill", "copy", "insert")


def mutate_h5(path: Path, kind: str, seed: int, folder: Path) -> None:
    """Change an HDF5 file by one mutation. What h5py itself refuses to do to it stays undone."""
    if kind in BYTE_MUTATIONS:
        path.write_bytes(mutated_bytes(path.read_bytes(), kind, seed))
        return
    try:
        with h5py.File(path, "a") as file:
            if _items(file):
                H5_MUTATIONS[kind](file, random.Random(seed), folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError):  # it is damaged already
        return


def mutated_bytes(content: bytes, kind: str, seed: int) -> bytes:
    """Content with some bytes changed."""
    draw, changed = random.Random(seed), bytearray(content)
    if not changed:
        return content
    start = draw.randrange(len(changed))
    length = draw.choice([1, 2, 8, 64, 512])
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 2, 8, 64])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[start:]
    elif kind == "fill":
        piece = changed[start : start + length]
        changed[start : start + length] = bytes([draw.choice([0, 0xFF, 0x7F, 0x80])]) * len(piece)
    elif kind == "copy":
        other = draw.randrange(len(changed))
        piece = changed[other : other + length]
        changed[start : start + len(piece)] = piece
    else:
        changed[start:start] = bytes(draw.randrange(256) for _ in range(length))
    return bytes(changed)


HARMLESS = tuple(f"d/{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
UP = ("../up", "/tmp/fastdp-fuzz-up", "a/../../up", "..")
ODD_NAMES = ("a", "a/b", "b.txt", *UP, "", ".", "a\0b", "x" * 300, "é", "a//b", "archive")
TARGETS = ("a", "../secret.txt", "/etc/passwd", ".", "..", "b.txt", "", "a/b", "l", "../../secret.txt")


def _name(draw: random.Random) -> str:
    return draw.choice(HARMLESS if draw.random() < 0.85 else ODD_NAMES)


def write_archive(path: Path, seed: int) -> None:
    """A tar or a zip of some members, harmless and hostile ones."""
    draw = random.Random(seed)
    if draw.random() < 0.4:
        with zipfile.ZipFile(path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for _ in range(draw.randrange(1, 6)):
                name = _name(draw) + draw.choice(["", "", "", "", "/"])
                info = zipfile.ZipInfo(name or "z")
                info.external_attr = draw.choice([0o644, 0o755, 0o120777, 0o6777]) << 16
                if name not in archive.namelist():
                    archive.writestr(info, draw.choice([b"", b"data", bytes(1 << 16), SECRET_TEXT[::-1]]))
        return
    mode = draw.choice(["w", "w:gz", "w:bz2", "w:xz"])
    kinds = [tarfile.REGTYPE] * 16 + [
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
    ]
    kinds += [tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"]
    form = draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(path, mode, format=form) as archive:
        for _ in range(draw.randrange(1, 6)):
            info = tarfile.TarInfo(_name(draw)[: 90 if form == tarfile.USTAR_FORMAT else None])
            info.type = draw.choice(kinds)
            info.mode = draw.choice([0o644, 0o755, 0o6777, 0])
            content = draw.choice([b"", b"data", bytes(1 << 16)]) if info.type == tarfile.REGTYPE else b""
            info.size = len(content)
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = draw.choice(TARGETS)
            if form == tarfile.PAX_FORMAT and draw.random() < 0.3:
                key = draw.choice(
                    ["size", "path", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset"]
                )
                info.pax_headers = {key: draw.choice(["-1", "1" * 30, "0,1", "1", "../up", "-2048", "x"])}
            archive.addfile(info, io.BytesIO(content))
