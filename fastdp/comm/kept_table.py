"""Keeps the measured table of a set of devices in a file of this user, so that later processes choose alike."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fastdp import private_files

FOLDER = "all-reduce"
MOST_NBYTES = 1 << 16


def path_of(key: dict[str, Any]) -> Path:
    """The file of the devices that this key describes."""
    return _folder() / _name(key)


def load(key: dict[str, Any]) -> dict[str, Any] | None:
    """What was kept for these devices, or None.

    A file of another user or behind a link, a torn one, and one of other devices count as none.
    """
    try:
        with private_files.opened_folder(_folder(), make=False) as folder:
            return _read(folder, key)
    except OSError:
        return None


def writable() -> bool:
    """Whether a table can be kept."""
    try:
        with private_files.opened_folder(_folder(), make=True) as folder:
            return os.access(".", os.W_OK | os.X_OK, dir_fd=folder)
    except OSError:
        return False


def keep(key: dict[str, Any], table: dict[str, Any], *, replace: bool) -> dict[str, Any] | None:
    """Keep a table, unless another process has kept one first and `replace` is False.

    Returns:
        What is kept now, by whoever; None if nothing can be kept there.
    """
    content = json.dumps({"key": key, "table": table}).encode()
    try:
        with private_files.opened_folder(_folder(), make=True) as folder:
            first = private_files.put(folder, _name(key), content, replace=replace)
            if not first and _read(folder, key) is None:
                private_files.put(folder, _name(key), content, replace=True)
            return _read(folder, key)
    except OSError:
        return None


def _folder() -> Path:
    return private_files.cache_folder() / FOLDER


def _name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".json"


def _read(folder: int, key: dict[str, Any]) -> dict[str, Any] | None:
    """The table of this key in the folder, or None."""
    text = private_files.read(folder, _name(key), MOST_NBYTES)
    try:
        kept = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(kept, dict) or kept.get("key") != key or not isinstance(kept.get("table"), dict):
        return None
    table: dict[str, Any] = kept["table"]
    return table
