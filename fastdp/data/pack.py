"""Packs images into an HDF5 file for training, in parts, so that it goes on after an interruption."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.file_speed import chunk_rows
from fastdp.data.image_folder import BrokenImageError, ImageFolder, load_image
from fastdp.runtime.host.job_threads import SHARED

CODECS = ("blosc2", "lzf", "gzip", "none")
CHUNKS_OF_PART = 16


@dataclass(frozen=True)
class PackSettings:
    """How images are packed.

    Attributes:
        height, width: of each image.
        codec: how chunks are stored: "blosc2" (needs hdf5plugin), "lzf", "gzip" or "none".
        chunk_nbytes: about how many bytes of images a chunk has.
        skip_broken: leave images out that cannot be decoded; otherwise they are an error.
    """

    height: int = 224
    width: int = 224
    codec: str = "blosc2"
    chunk_nbytes: int = 1 << 20
    skip_broken: bool = False

    @property
    def chunk_rows(self) -> int:
        """The images of a chunk."""
        return chunk_rows((self.height, self.width, 3), 1, self.chunk_nbytes, 1 << 30)

    def options(self) -> dict[str, Any]:
        """What h5py's `create_dataset` gets.

        Raises:
            ImportError: blosc2 without hdf5plugin.
        """
        chunks = {"chunks": (self.chunk_rows, self.height, self.width, 3)}
        if self.codec == "blosc2":
            return {**chunks, **importlib.import_module("hdf5plugin").Blosc2(cname="lz4", clevel=5)}
        return {**chunks, **({} if self.codec == "none" else {"compression": self.codec})}


class Packer:
    """Packs a folder of images into a file. What was packed before an interruption is not packed again.

    Args:
        images: the images.
        path: the file; it appears when it is whole. Until then its parts are in the folder `path` + ".parts".
        settings: how they are packed.

    The file has the data sets `images`, uint8 of shape (rows, height, width, 3), and, where there are classes,
    `labels`, int64; attributes of the file: `classes`, a JSON list of names, and `skipped`, one of files left out.

    Example:
        >>> packer = Packer(list_images(folder, 0), Path("train.h5"), PackSettings())  # doctest: +SKIP
        >>> for part in packer.waiting: packer.pack(part)  # doctest: +SKIP
        >>> packer.finish()  # doctest: +SKIP
    """

    def __init__(self, images: ImageFolder, path: Path, settings: PackSettings) -> None:
        self.images, self.path, self.settings = images, path, settings
        self.folder = path.with_name(path.name + ".parts")
        self._digest = images.digest(asdict(settings))
        self._size = settings.chunk_rows * CHUNKS_OF_PART
        self.count = -(-len(images.files) // self._size)

    def begin(self) -> int:
        """Make the folder of parts, or take over that of an interrupted run of the same images and settings.

        Returns:
            The number of images that were packed before.
        """
        sign = self.folder / "images.json"
        try:
            same = json.loads(sign.read_text("utf-8")) == self._digest
        except (FileNotFoundError, ValueError):
            same = False
        if not same and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not same:
            sign.write_text(json.dumps(self._digest), "utf-8")
        return sum(len(self.rows(part)) for part in range(self.count) if self._part(part).exists())

    @property
    def waiting(self) -> Iterator[int]:
        """The parts that are not packed yet."""
        return (part for part in range(self.count) if not self._part(part).exists())

    def rows(self, part: int) -> range:
        """The images of a part, by number."""
        return range(part * self._size, min((part + 1) * self._size, len(self.images.files)))

    def pack(self, part: int) -> None:
        """Decode the images of a part in threads, and write it. It appears under its name when it is whole.

        Raises:
            BrokenImageError: an image cannot be decoded, and `skip_broken` is off.
            OSError: the part cannot be written.
        """
        rows, settings = self.rows(part), self.settings
        block = np.zeros((len(rows), settings.height, settings.width, 3), np.uint8)
        good = np.ones(len(rows), bool)
        SHARED.use()
        try:
            jobs = [functools.partial(self._load, row, place, block, good) for place, row in enumerate(rows)]
            SHARED.run(jobs)
        finally:
            SHARED.release()
        labels = self.images.labels
        with _new_file(self._part(part)) as file:
            self._images(file, int(good.sum()))[:] = block[good]
            file["rows"] = np.asarray(rows)[good]
            if labels is not None:
                file["labels"] = labels[rows.start : rows.stop][good]

    def finish(self) -> Iterator[NDArray[np.int64]]:
        """Put the parts together, chunk by chunk as they are stored, and name the file `path`.

        Yields:
            The numbers of the images of each part, when they are in the file.

        Raises:
            OSError: the file cannot be written.
            ValueError: no image could be decoded.
        """
        whole, total = self.folder / "whole.h5", 0
        kept: list[NDArray[np.int64]] = []
        for part in range(self.count):
            with h5py.File(self._part(part)) as source:
                kept.append(source["rows"][:])
        rows = np.concatenate(kept)
        if not len(rows):
            raise ValueError(f"No image of {self.images.folder} could be decoded: nothing was written")
        with _new_file(whole) as file:
            images = self._images(file, len(rows))
            for part, numbers in enumerate(kept):
                with h5py.File(self._part(part)) as source:
                    self._append(images, total, source["images"])
                total += len(numbers)
                yield numbers
            if self.images.labels is not None:
                file["labels"] = self.images.labels[rows]
            left = sorted(set(range(len(self.images.files))) - set(rows.tolist()))
            file.attrs["classes"] = json.dumps(self.images.classes)
            file.attrs["skipped"] = json.dumps([self.images.files[row] for row in left])
        os.replace(whole, self.path)
        shutil.rmtree(self.folder)

    def _append(self, images: h5py.Dataset, start: int, source: h5py.Dataset) -> None:
        """Copy whole chunks as they are stored if they fall on chunks of the file; other rows by value."""
        height, done = self.settings.chunk_rows, 0
        if start % height == 0:
            for done in range(0, len(source) // height * height, height):
                skipped, stored = source.id.read_direct_chunk((done, 0, 0, 0))
                images.id.write_direct_chunk((start + done, 0, 0, 0), stored, skipped)
            done = len(source) // height * height
        if done < len(source):
            images[start + done : start + len(source)] = source[done:]

    def _images(self, file: h5py.File, rows: int) -> h5py.Dataset:
        """The data set of the images; it can grow, since a chunk may have more rows than there are."""
        shape = (rows, self.settings.height, self.settings.width, 3)
        return file.create_dataset("images", shape, np.uint8, maxshape=(None, *shape[1:]), **self.settings.options())

    def _load(self, row: int, place: int, block: NDArray[np.uint8], good: NDArray[np.bool_]) -> None:
        try:
            block[place] = load_image(
                self.images.folder / self.images.files[row], self.settings.height, self.settings.width
            )
        except BrokenImageError:
            if not self.settings.skip_broken:
                raise
            good[place] = False

    def _part(self, part: int) -> Path:
        return self.folder / f"{part:08}.h5"


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    """A file that gets its name when it is whole and on the disk."""
    unfinished = path.with_name(path.name + ".unfinished")
    with h5py.File(unfinished, "w") as file:
        yield file
    with open(unfinished, "rb") as written:
        os.fsync(written.fileno())
    os.replace(unfinished, path)
