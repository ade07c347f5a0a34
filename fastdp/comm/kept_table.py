"""Keeps the measured table of a set of devices in a file of this user, so that later processes choose alike."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from fastdp.launch.cubin import cache_folder

FOLDER = "all-reduce"
MOST_NBYTES = 1 << 16
# What makes sure that a file is this user's own is POSIX's.
POSSIBLE = hasattr(os, "O_NOFOLLOW") and os.open in os.supports_dir_fd and hasattr(os, "geteuid")


def path_of(key: dict[str, Any]) -> Path:
    """The file of the devices that this key describes."""
    return cache_folder() / FOLDER / _name(key)


def load(key: dict[str, Any]) -> dict[str, Any] | None:
    """What was kept for these devices, or None.

    A file of another user or behind a link, a torn one, and one of other devices count as none.
    """
    try:
        with _folder(make=False) as folder:
            return _read(folder, key)
    except OSError:
        return None


def writable() -> bool:
    """Whether a table can be kept."""
    try:
        with _folder(make=True) as folder:
            return os.access(".", os.W_OK | os.X_OK, dir_fd=folder)
    except OSError:
        return False


def keep(key: dict[str, Any], table: dict[str, Any], *, replace: bool) -> dict[str, Any] | None:
    """Keep a table, unless another process has kept one first and `replace` is False.

    Returns:
        What is kept now, by whoever; None if nothing can be kept there.
    """
    if not POSSIBLE:
        return None
    try:
        with _folder(make=True) as folder:
            part = f".{secrets.token_hex(8)}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(part, flags, 0o600, dir_fd=folder), "w", encoding="utf-8") as file:
                json.dump({"key": key, "table": table}, file)
            try:
                return _put(folder, part, key, replace=replace)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=folder)
    except OSError:
        return None


def _put(folder: int, part: str, key: dict[str, Any], *, replace: bool) -> dict[str, Any] | None:
    """Give the file its name: the first process that does wins."""
    name = _name(key)
    if not replace:
        try:
            os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            replace = _read(folder, key) is None
    if replace:
        os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    return _read(folder, key)


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".json"


@contextlib.contextmanager
def _folder(*, make: bool) -> Any:
    """The folder, opened. It is this user's own, and nobody else can write to it.

    Raises:
        OSError: it is missing, or is not so.
    """
    if not POSSIBLE:
        raise OSError("files cannot be checked here")
    path = cache_folder() / FOLDER
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _check(os.fstat(descriptor), path.name)
        yield descriptor
    finally:
        os.close(descriptor)


def _check(found: os.stat_result, name: str) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{name} belongs to another user, or others can write to it")


def _read(folder: int, key: dict[str, Any]) -> dict[str, Any] | None:
    """The table of this key in the folder, or None."""
    try:
        descriptor = os.open(_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        try:
            _check(found, "the table")
        except PermissionError:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_NBYTES:
            return None
        text = file.read(MOST_NBYTES)
    try:
        kept = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(kept, dict) or kept.get("key") != key or not isinstance(kept.get("table"), dict):
        return None
    table: dict[str, Any] = kept["table"]
    return table
