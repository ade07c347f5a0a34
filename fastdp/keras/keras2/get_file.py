"""`get_file` with Keras 2's arguments: downloads once, checks, unpacks, keeps in a cache folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

import keras

from fastdp.keras.keras2.archive_limits import DamagedArchiveError
from fastdp.keras.keras2.archives import ARCHIVE_FORMATS, extract_archive
from fastdp.warn import warn_user

CHUNK_NBYTES = 1 << 20
NETWORK_TIMEOUT_SECONDS = 60
HEX_DIGITS = {"md5": 32, "sha256": 64}


def get_file(
    fname: str | os.PathLike[str] | None,
    origin: str,
    untar: bool = False,
    md5_hash: str | None = None,
    file_hash: str | None = None,
    cache_subdir: str = "datasets",
    hash_algorithm: str = "auto",
    extract: bool = False,
    archive_format: str | Sequence[str] | None = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    max_extracted_nbytes: int | None = None,
) -> str:
    """Download a file unless it is in the cache, and return its path.

    Keras 3's own function unpacks to another place, returns another path and keeps a file whose hash is
    wrong. This function has Keras 2's arguments and return values.

    Args:
        fname: name of the file in the cache, or an absolute path; None takes the last part of the URL.
        origin: URL, which may be a `file://` URL.
        untar: unpack a tar archive, kept as `<fname>.tar.gz`, and return the folder `fname` instead. It is
            unpacked once per download. An archive without a top folder of that name is unpacked into a new one.
        md5_hash: old name of `file_hash` with `hash_algorithm="md5"`.
        file_hash: hexadecimal hash that the file must have. A cached file with another hash is fetched again.
        cache_subdir: folder inside `cache_dir`, or an absolute path.
        hash_algorithm: "md5", "sha256", or "auto" to infer it from the length of the hash.
        extract: unpack the archive into its folder on each call, and return the path of the archive.
        archive_format: "tar", "zip", "auto" for both, a list of these, or None to unpack nothing.
        cache_dir: None means `$KERAS_HOME`, else `~/.keras`.
        max_extracted_nbytes: what an archive may unpack to. None means 200 times its size, but at least 1 GiB.

    The file appears under its name only when it is complete and its hash is right, so several processes may
    fetch it at the same time. No archive member is written outside its folder. Without a hash, a cached archive that
    turns out to be cut or damaged is fetched once more, and is not kept if that one is damaged too.

    Raises:
        ValueError: the hash is wrong (nothing is kept), the hash or the name is invalid, or the archive has
            another format, is damaged or too large, or holds a path or link that leaves its folder.
        OSError: the origin cannot be fetched, or the folder cannot be written.

    Example:
        >>> path = get_file("mnist.npz", origin="https://example.org/mnist.npz", file_hash="731c5ac6...")
    """
    if md5_hash is not None and file_hash is None:
        file_hash, hash_algorithm = md5_hash, "md5"
    if max_extracted_nbytes is not None and max_extracted_nbytes < 0:
        raise ValueError(f"max_extracted_nbytes must be 0 or more bytes, or None, got {max_extracted_nbytes!r}")
    algorithm = None if file_hash is None else _check_hash_arguments(file_hash, hash_algorithm)
    formats = ["tar"] if untar else _check_formats(archive_format)
    folder = _cache_folder(cache_dir, cache_subdir)
    path = os.path.join(folder, _check_name(fname, origin))
    archive = path + ".tar.gz" if untar else path
    os.makedirs(os.path.dirname(archive), exist_ok=True)
    known = os.path.exists(archive) and (algorithm is None or hash_file(archive, algorithm) == _plain(file_hash))
    if not known:
        _fetch(origin, archive, algorithm, _plain(file_hash))

    def unpack() -> None:
        if untar:
            top = os.path.basename(path)
            extract_archive(archive, os.path.dirname(path), formats, top_folder=top, max_nbytes=max_extracted_nbytes)
        elif extract and formats:
            extract_archive(archive, os.path.dirname(path), formats, max_nbytes=max_extracted_nbytes)

    if untar and known and os.path.exists(path):
        return path
    try:
        unpack()
    except DamagedArchiveError:
        if algorithm is not None:  # it is what the hash says
            raise
        if not known:
            os.remove(archive)
            raise
        _fetch(origin, archive, None, "")
        _unpack_or_remove(unpack, archive)
    return path


def _unpack_or_remove(unpack: Callable[[], None], archive: str) -> None:
    """Unpack an archive that was fetched just now; one that is damaged is not kept."""
    try:
        unpack()
    except DamagedArchiveError:
        os.remove(archive)
        raise


def hash_file(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """The hash of a file in lower-case hexadecimal. `algorithm` is "sha256" or "md5".

    Example:
        >>> hash_file("train.h5")[:8]
        '9f86d081'
    """
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_NBYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _plain(file_hash: str | None) -> str:
    return "" if file_hash is None else str(file_hash).strip().lower()


def _check_hash_arguments(file_hash: str, hash_algorithm: str) -> str:
    """The algorithm of `file_hash`, after checking both arguments."""
    if hash_algorithm not in ("auto", *HEX_DIGITS):
        raise ValueError(f'hash_algorithm must be "auto", "md5" or "sha256", got {hash_algorithm!r}: choose one')
    digits = _plain(file_hash)
    fitting = [name for name, length in HEX_DIGITS.items() if length == len(digits)]
    wanted = fitting if hash_algorithm == "auto" else [hash_algorithm]
    if not fitting or wanted != fitting or set(digits) - set("0123456789abcdef"):
        raise ValueError(
            f"file_hash must be 32 (md5) or 64 (sha256) hexadecimal digits that fit hash_algorithm="
            f"{hash_algorithm!r}, got {file_hash!r}: copy the output of md5sum or sha256sum"
        )
    return wanted[0]


def _check_formats(archive_format: str | Sequence[str] | None) -> list[str]:
    """`archive_format` as a list of formats to try."""
    if archive_format == "auto":
        return list(ARCHIVE_FORMATS)
    formats = [archive_format] if isinstance(archive_format, str) else list(archive_format or ())
    for name in formats:
        if name not in ARCHIVE_FORMATS:
            raise ValueError(
                f'archive_format must be "auto", "tar", "zip", a list of these or None, got '
                f"{archive_format!r}: unpack other archives by hand"
            )
    return formats


def _check_name(fname: str | os.PathLike[str] | None, origin: str) -> str:
    """The file's name; the last part of the URL if none is given."""
    if fname is None:
        name = os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(origin).path))
        if name in ("", ".", ".."):
            raise ValueError(f"fname must be given where origin ends in no file name, got {origin!r}: pass a name")
        return name
    name = os.path.expanduser(os.fspath(fname))
    if not os.path.basename(name) or ".." in pathlib.PurePath(name).parts:
        raise ValueError(f"fname must be a file name or an absolute path without '..', got {name!r}: pass one")
    return name


def _cache_folder(cache_dir: str | os.PathLike[str] | None, cache_subdir: str) -> str:
    """The folder for the file, created if needed; a temporary folder if the home cannot be written."""
    if cache_dir is not None:
        folder = os.path.join(os.path.expanduser(os.fspath(cache_dir)), cache_subdir)
        os.makedirs(folder, exist_ok=True)
        return folder
    home = os.path.expanduser(os.environ.get("KERAS_HOME") or os.path.join("~", ".keras"))
    folder = os.path.join(home, cache_subdir)
    try:
        if home.startswith("~"):  # not a folder of that name in the current one
            raise PermissionError("this user has no home folder")
        os.makedirs(folder, exist_ok=True)
    except PermissionError as error:
        folder = tempfile.mkdtemp(prefix="keras-")
        warn_user(f"{error}: files go to {folder} for this call, pass cache_dir to keep them")
    return folder


def _fetch(origin: str, path: str, algorithm: str | None, file_hash: str) -> None:
    """Download to a temporary neighbour of `path`, check, and move it there in one step."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=os.path.dirname(path)) as folder:
        partial = os.path.join(folder, "partial")
        _download(origin, partial)
        found = None if algorithm is None else hash_file(partial, algorithm)
        if found is not None and found != file_hash:
            pathlib.Path(path).unlink(missing_ok=True)  # an existing file has a wrong hash too
            raise ValueError(
                f"file_hash must be the {algorithm} of {origin!r}: expected {file_hash}, got {found}; "
                "the file was not kept. Check the hash, or fetch from a source you trust"
            )
        os.replace(partial, path)


def _download(origin: str, path: str) -> None:
    """Download a URL into a new file, with Keras's progress bar."""
    try:
        with (
            urllib.request.urlopen(origin, timeout=NETWORK_TIMEOUT_SECONDS) as response,
            open(path, "xb") as file,
        ):
            length = response.headers.get("Content-Length") or ""
            total = int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else None
            bar, done = keras.utils.Progbar(total), 0
            while chunk := response.read(CHUNK_NBYTES):
                file.write(chunk)
                done += len(chunk)
                bar.update(done)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise OSError(f"origin must be a URL that can be fetched, got {origin!r}: {error}; check it") from error
    if total is not None and done != total:
        raise OSError(f"origin {origin!r} broke off: expected {total} bytes, got {done}; try again")
