"""Files in the user's cache folder: private to the user, checked when they are opened, and whole or not there.

What lies in a cache is loaded into processes: machine code of kernels, compiled steps, measured tables. So a folder and
a file count only if they are this user's own, if nobody else can write to them, and if no link led to them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastdp import settings

# What makes sure that a file is this user's own is POSIX's.
POSSIBLE = hasattr(os, "O_NOFOLLOW") and os.open in os.supports_dir_fd and hasattr(os, "geteuid")
MOST_LINKS = 40
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """The folder of all that fastdp keeps: FASTDP_CACHE_DIR, or the platform's cache folder of this user.

    A user without a home folder has none that is private: the path then is one that can neither be read nor made.
    """
    chosen = settings.cache_dir()
    if chosen is not None:
        return chosen
    home = Path(os.path.expanduser("~"))  # unlike Path.home(), no error where there is none
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "fastdp" / "Cache"
    if sys.platform not in ("win32", "darwin") and os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "fastdp"
    if not home.is_absolute():
        return Path(os.devnull) / "no-home-folder"
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "fastdp" / "Cache"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastdp"


@contextlib.contextmanager
def opened_folder(path: Path, *, make: bool) -> Iterator[int]:
    """A folder, opened as a descriptor for `read` and `put`. It is this user's own, and nobody else can write to it.

    Args:
        path: the folder. Links may lead to its parent, not to itself.
        make: make it, with mode 0700, where it is missing.

    Raises:
        OSError: it is missing, is no folder, or is not private.
    """
    if not POSSIBLE:
        raise OSError("the owners of files cannot be checked on this platform")
    if make:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _check_private(os.fstat(descriptor), path)
        yield descriptor
    finally:
        os.close(descriptor)


def read(folder: int, name: str, most_nbytes: int) -> bytes | None:
    """The content of a file in an opened folder.

    None where there is none, or where it is no regular file, is a link, belongs to another user, can be written by
    others, or is larger than `most_nbytes`. Waits for nobody, even if the file is a pipe.
    """
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        private = found.st_uid == os.geteuid() and not found.st_mode & _WRITABLE_BY_OTHERS
        if not private or not stat.S_ISREG(found.st_mode) or found.st_size > most_nbytes:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(found.st_size + 1)
    finally:
        os.close(descriptor)
    return content if len(content) <= found.st_size else None  # it grew meanwhile


def put(folder: int, name: str, content: bytes, *, replace: bool) -> bool:
    """Write a file with mode 0600 into an opened folder: readers find all of it or nothing.

    Returns: False where a file of this name exists and `replace` is False: the first process that writes wins.

    Raises:
        OSError: it cannot be written.
    """
    part = f".{secrets.token_hex(8)}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(part, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
        if replace:
            os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            return True
        try:
            os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            return False
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=folder)


def remove(folder: int, name: str) -> None:
    """Remove a file from an opened folder. Does nothing where there is none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def keep_newest(folder: int, most: int, *, seconds: float = 3600.0) -> None:
    """Remove files from an opened folder until `most` are left: the oldest first, and none younger than `seconds`.

    Files that another process removes meanwhile count as removed.
    """
    names = os.listdir(folder)
    if len(names) <= most:
        return
    ages: list[tuple[float, str]] = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            ages.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime, name))
    for written, name in sorted(ages)[: max(0, len(ages) - most)]:
        if written < time.time() - seconds:
            remove(folder, name)


def check_path(path: Path) -> None:
    """Make sure that nobody but this user and root can put another folder in the place of `path`.

    Needed where a library opens files below `path` by their names. Each folder and link on the way must belong to this
    user or root, and be closed to the writing of others; a folder with the sticky bit, as /tmp, may be open. Group
    members may write where the group is the user's private one, which has the user's number.

    Raises:
        OSError: it is not so, or a part of the path is missing.
    """
    if not POSSIBLE:
        raise OSError("the owners of files cannot be checked on this platform")
    here, waiting, links = Path("/"), [*Path(os.path.abspath(path)).parts[1:]][::-1], 0
    _check_place(os.lstat(here), here)
    while waiting:
        part = waiting.pop()
        if part == "..":
            here = here.parent
            continue
        place = here / part
        found = os.lstat(place)
        _check_place(found, place)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MOST_LINKS:
                raise OSError(f"{path} leads through more than {MOST_LINKS} links")
            target = Path(os.readlink(place))
            here = Path("/") if target.is_absolute() else here
            waiting += [one for one in target.parts if one != "/"][::-1]
        else:
            here = place


def private_folder(path: Path) -> Path:
    """Make a folder that libraries may use by its name, and return it: private, on a path that only this user and root
    can change.

    Raises:
        OSError: it cannot be made, or is not private.
    """
    with opened_folder(path, make=True):
        check_path(path)
    return path


def _check_private(found: os.stat_result, path: Path) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(f"{path} belongs to another user, or others can write to it")


def _check_place(found: os.stat_result, path: Path) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} belongs to another user")
    if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX:
        return
    own_group = found.st_gid == os.getegid() == os.geteuid()
    if found.st_mode & (stat.S_IWOTH if own_group else _WRITABLE_BY_OTHERS):
        raise PermissionError(f"others can write to {path}")
