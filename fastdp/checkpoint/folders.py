"""One checkpoint is one folder of plain files with checksums: written whole, and checked before it is read.

A checkpoint `step-00001234/` has its files and a `manifest.json` with the size and the SHA-256 of each, and of itself.
It is written under another name beside its place, brought to the disk, and renamed: at no moment does a part of one
have a checkpoint's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdp._version import __version__
from fastdp.checkpoint import damage

FORMAT = 1
MANIFEST = "manifest.json"
_PARTIAL = ".tmp"
_NAME = re.compile(r"step-(\d{8,18})")
_PARTIAL_NAME = re.compile(r"step-\d{8,18}(\.old)?\.tmp")
_MOST_MANIFEST = 1 << 20


def name_of(step: int) -> str:
    """The name of the folder of a step."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest first. Nothing is checked yet."""
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(one[1]) for one in found if one is not None), reverse=True)


def partial_in(folder: Path) -> list[Path]:
    """What a process that ended while it wrote has left."""
    return sorted(path for path in folder.iterdir() if _PARTIAL_NAME.fullmatch(path.name))


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write a checkpoint. If there is one of this step, the new one takes its place.

    Args:
        folder: where the checkpoints are.
        step: its number.
        fill: writes its files into the folder that it gets.

    Raises:
        OSError: it cannot be written. What has been written of it is gone, if it can be removed.
    """
    place = folder / name_of(step)
    new, old = folder / f"{place.name}{_PARTIAL}", folder / f"{place.name}.old{_PARTIAL}"
    for rest in (new, old):  # of a failed try, which could not remove it
        remove_rest(rest)
    try:
        new.mkdir()
        fill(new)
        files = sorted(new.iterdir())
        for file in files:
            _sync(file)
        manifest = _manifest(step, files)
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        _sync(new / MANIFEST)
        _sync(new)
        if os.path.lexists(place):
            place.rename(old)
        new.rename(place)
        _sync(folder)
    except BaseException:
        # It may have failed between the two renames: the one before is still the best.
        if os.path.lexists(old) and not os.path.lexists(place):
            old.rename(place)
        shutil.rmtree(new, ignore_errors=True)
        raise
    remove_rest(old)
    return place


def what_is_wrong(place: Path) -> str | None:
    """Why a checkpoint must not be read: something is missing, or is not what was written. None where all is well.

    Raises:
        OSError: the machine does not let it be read; the message names it.
    """
    try:
        if not stat.S_ISDIR(place.lstat().st_mode):
            return "it is no folder"
        manifest = _read_manifest(place / MANIFEST)
        if manifest["format"] > FORMAT:
            return f"it has format {manifest['format']}, and this fastdp reads up to {FORMAT}: upgrade fastdp"
        named = _NAME.fullmatch(place.name)
        if named is not None and manifest["step"] != int(named[1]):  # it would hide those of later steps
            return f"it is the checkpoint of step {manifest['step']}, under another name"
        return next((said for name, told in manifest["files"].items() if (said := _differs(place, name, told))), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and damage.of_the_machine(error):
            raise OSError(
                error.errno,
                f"The checkpoint {place} cannot be read now, and no older one is used in its place: {error} Let this "
                "process read it, or remove it, so that the one before it is used.",
            ) from error
        return f"it cannot be read ({error})"
    except (LookupError, TypeError, AttributeError, RecursionError) as error:  # checksums that somebody has made anew
        return f"{MANIFEST} is not what was written ({type(error).__name__})"


def remove(place: Path) -> None:
    """Remove a checkpoint. It loses its name first, so what is left after a kill is no checkpoint.

    Raises:
        OSError: that cannot be done.
    """
    gone = place.with_name(f"{place.name}.old{_PARTIAL}")
    remove_rest(gone)
    place.rename(gone)
    remove_rest(gone)


def remove_rest(path: Path) -> None:
    """Remove what lies at a path: a folder with all that is in it, a file, or a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _manifest(step: int, files: list[Path]) -> dict[str, Any]:
    told = {file.name: {"size": file.stat().st_size, "sha256": _digest_of_file(file)} for file in files}
    manifest: dict[str, Any] = {"format": FORMAT, "fastdp": __version__, "step": step, "files": told}
    return {**manifest, "sha256": _digest(_canonical(manifest))}


def _read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        OSError, ValueError: it is not what was written.
    """
    content = _regular(path, _MOST_MANIFEST)
    with contextlib.suppress(ValueError):
        manifest = json.loads(content)
        if isinstance(manifest, dict) and manifest.pop("sha256", None) == _digest(_canonical(manifest)):
            return manifest
    raise ValueError(f"{MANIFEST} is not what was written")


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _regular(path: Path, most: int) -> bytes:
    """The content of a regular file that is no link and not too large.

    Raises:
        ValueError: it is something else.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        raise ValueError(f"{path.name} is a link, no file, or too large")
    return path.read_bytes()


def _differs(place: Path, name: str, told: dict[str, Any]) -> str | None:
    """What is wrong with one file; None where nothing is."""
    if Path(name).name != name or name in (".", "..", ""):
        return f"{MANIFEST} names a file outside of it: {name!r}"
    found = (place / name).lstat()
    if not stat.S_ISREG(found.st_mode):
        return f"{name} is a link, or no file"
    if found.st_size != told["size"]:
        return f"{name} has {found.st_size} bytes, and {told['size']} were written"
    return None if _digest_of_file(place / name) == told["sha256"] else f"{name} has another checksum than was written"


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():  # which Windows does by itself
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with contextlib.suppress(NotImplementedError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
