"""Unpacks tar and zip archives that may be hostile: nothing is written outside the folder."""

from __future__ import annotations

import os
import pathlib
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence

from fastdp.keras.keras2.archive_limits import Budget, DamagedArchiveError, damage_named, is_tar, opened_tar

ARCHIVE_FORMATS = ("tar", "zip")


def extract_archive(
    path: str,
    folder: str,
    formats: Sequence[str] = ARCHIVE_FORMATS,
    *,
    top_folder: str | None = None,
    max_nbytes: int | None = None,
) -> None:
    """Unpack `path` into the existing `folder`, over files of the same name.

    The archive is first unpacked into a new folder. Its content moves to `folder` only if all of it is
    harmless: no absolute path, no `..`, no device, no link that leads out. Files keep only their
    executable bit. With `top_folder`, an archive whose content is not a single folder of that name is
    unpacked into such a folder.

    `max_nbytes` limits what is unpacked, where each member counts at least 4 KiB. None means 200 times the size of
    the archive, but at least 1 GiB.

    Raises:
        DamagedArchiveError: the archive is cut or damaged. It is a ValueError.
        ValueError: the archive has none of the `formats`, is too large, or a member would leave the folder.
        OSError: there is no space for it.

    Example:
        >>> extract_archive("flowers.tar.gz", "datasets")
    """
    kind = _kind(path, formats)
    budget = Budget(path, folder, max_nbytes)
    with tempfile.TemporaryDirectory(prefix=".extract-", dir=folder) as temporary:
        content = tempfile.mkdtemp(dir=temporary)  # a name that no link in the archive can guess
        with damage_named(path):
            _extract_tar(path, content, budget) if kind == "tar" else _extract_zip(path, content, budget)
        if top_folder is not None and os.listdir(content) != [top_folder]:
            wrapped = tempfile.mkdtemp(dir=temporary)
            os.rename(content, os.path.join(wrapped, top_folder))
            content = wrapped
        _merge(content, folder)


def _kind(path: str, formats: Sequence[str]) -> str:
    """Which of the formats an archive has: by its content, since it may be named anything."""
    if "tar" in formats and is_tar(path):
        return "tar"
    with open(path, "rb") as file:
        cut_zip = file.read(4) == b"PK\3\4"  # the rest of a zip makes it one for the library
    if "zip" in formats and (cut_zip or zipfile.is_zipfile(path)):
        return "zip"
    raise ValueError(
        f"archive_format must fit the file, expected {' or '.join(formats)}, got {path!r} of another "
        "format: check what was downloaded, or pass extract=False"
    )


def _inside(root: str, name: str, archive: str) -> str:
    """The target path of a member, after checking that it stays inside the folder."""
    parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or (os.name == "nt" and ":" in name):
        raise _leaves_folder(archive, name)
    return os.path.join(root, *parts)


def _leaves_folder(archive: str, name: str) -> ValueError:
    return ValueError(
        f"archive members must stay inside their folder, got {name!r} in {archive!r}: nothing was unpacked; "
        "do not trust this file"
    )


def _extract_zip(path: str, root: str, budget: Budget) -> None:
    """Write a zip's folders and files. Links become files that contain their target."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            target = _inside(root, member.filename, path)
            budget.begin(member.filename)
            if member.is_dir():
                os.makedirs(target, exist_ok=True)
                continue
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with archive.open(member) as source:
                budget.copy(source, target, member.file_size)
            _keep_executable(target, member.external_attr >> 16)


def _extract_tar(path: str, root: str, budget: Budget) -> None:
    """Write a tar's folders and files, then its links, so that nothing is written through a link."""
    links: list[tarfile.TarInfo] = []
    place = -1
    with opened_tar(path) as archive:
        for member in archive:
            if member.offset <= place or member.size < 0:  # Python before 2025 would read it for ever
                raise DamagedArchiveError(f"{path!r} is damaged: its member {member.name!r} leads back")
            place = member.offset
            target = _inside(root, member.name, path)
            budget.begin(member.name)
            if member.isdir():
                os.makedirs(target, exist_ok=True)
            elif member.isreg():
                os.makedirs(os.path.dirname(target), exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None  # a regular member has content
                with source:
                    budget.copy(source, target, member.size)
                _keep_executable(target, member.mode)
            elif member.issym() or member.islnk():
                links.append(member)
            else:
                raise _leaves_folder(path, member.name)
    _make_links(links, root, path, budget)


def _make_links(links: list[tarfile.TarInfo], root: str, archive: str, budget: Budget) -> None:
    """Make a tar's links: copy the file for a hard link, and allow symbolic links that stay inside the folder."""
    for member in links:
        if member.islnk():
            target, source = _inside(root, member.name, archive), _inside(root, member.linkname, archive)
            if not os.path.isfile(source):
                raise _leaves_folder(archive, member.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(source, "rb") as file:
                budget.copy(file, target, os.path.getsize(source))
    symbolic = {_inside(root, member.name, archive): member for member in links if member.issym()}
    for target in symbolic:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    for target, member in symbolic.items():
        if os.path.isabs(member.linkname) or os.path.lexists(target):
            raise _leaves_folder(archive, member.name)
        os.symlink(member.linkname, target)
    for target, member in symbolic.items():  # after all links exist, because one may lead through another
        real = os.path.realpath(target)
        if not pathlib.Path(real).is_relative_to(os.path.realpath(root)):
            raise _leaves_folder(archive, member.name)


def _keep_executable(path: str, mode: int) -> None:
    """Set the file's executable bit for its owner if the archive has it."""
    if mode & 0o100:
        os.chmod(path, os.stat(path).st_mode | 0o100)


def _merge(source: str, target: str) -> None:
    """Move the content of one folder into another, replacing files."""
    for entry in os.scandir(source):
        place = os.path.join(target, entry.name)
        if entry.is_dir(follow_symlinks=False) and os.path.isdir(place) and not os.path.islink(place):
            _merge(entry.path, place)
        else:
            os.replace(entry.path, place)
