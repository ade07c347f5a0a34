"""The command `data pack`: packs a folder of images into an HDF5 file that is laid out for training.

    fastdp data pack images/ train.h5
    fastdp data pack images/ train.h5 --size 256x192 --codec gzip
    fastdp data pack images/ train.h5 --skip-broken --json

The folder has a subfolder for each class, as `images/cat/1.jpg`; without subfolders there are no labels. Each image is
scaled until it covers the size, and cut to its middle. Called again after an interruption, it goes on where it was; the
file appears when it is whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import h5py

from fastdp.cli.arguments import add_json, positive, whole_number
from fastdp.cli.optional import MissingLibraryError, load
from fastdp.cli.output import print_json
from fastdp.cli.status import FAILED, OK, WrongUseError, say
from fastdp.data.image_folder import BrokenImageError, list_images
from fastdp.data.pack import CODECS, Packer, PackSettings
from fastdp.monitoring.progress import progress

MOST_SIDE = 1 << 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the file, and how images are stored."""
    parser.add_argument("images", type=Path, help="the folder of images")
    parser.add_argument("out", type=Path, metavar="OUT.h5", help="the file to write; must not exist")
    parser.add_argument(
        "--size", type=_size, default=(224, 224), metavar="WxH", help="of each image (default: 224x224)"
    )
    parser.add_argument(
        "--codec", choices=CODECS, help="how chunks are stored (default: blosc2, or lzf without hdf5plugin)"
    )
    parser.add_argument(
        "--chunk-mb",
        type=positive("MB", most=1024),
        default=1.0,
        metavar="MB",
        help="of images in a chunk, which is read and mixed as a whole (default: 1)",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--seed", type=whole_number(0, 1 << 62), default=0, metavar="N", help="of the order of the images (default: 0)"
    )
    order.add_argument("--sorted", action="store_true", help="keep the images in the order of their names")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
    add_json(parser)


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for both."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, such as 224x224, got {text!r}")
    width, height = int(parts[0]), int(parts[-1])
    if not (1 <= width <= MOST_SIDE and 1 <= height <= MOST_SIDE):
        raise argparse.ArgumentTypeError(f"must have sides from 1 to {MOST_SIDE}, got {text!r}")
    return width, height


def run(options: argparse.Namespace) -> int:
    """Pack; returns 1 if an image or the file fails."""
    load("PIL.Image", "hdf5")
    packer = _packer(options)
    began = time.perf_counter()
    try:
        before = packer.begin()
        if before:
            say("data pack", f"goes on after {before:,} images that were packed before.")
        for part in progress(_Parts(packer), description="pack"):
            packer.pack(part.number)
        for _ in progress(packer.finish(), total=packer.count, description="put together"):
            pass
    except (BrokenImageError, ValueError) as error:
        remedy = " Pass --skip-broken to leave such images out." if isinstance(error, BrokenImageError) else ""
        say("data pack", f"{error}.{remedy}" if remedy else str(error))
        return FAILED
    result = _result(options.out, time.perf_counter() - began, before)
    if options.json:
        print_json(result)
        return OK
    print(
        f"Wrote {options.out}: {result['rows']:,} images of {len(result['classes'])} classes, "
        f"{result['stored_nbytes'] / 1e6:,.1f} MB for {result['nbytes'] / 1e6:,.1f} MB, in {result['seconds']:.1f} s."
    )
    for name in result["skipped"]:
        say("data pack", f"left out {name}, which cannot be decoded.")
    return OK


def _packer(options: argparse.Namespace) -> Packer:
    """What packs the images, once the arguments are checked."""
    if options.out.exists():
        raise WrongUseError(f"{options.out} exists: pass another name, or remove it")
    if not options.out.absolute().parent.is_dir():
        raise WrongUseError(f"the folder of {options.out} does not exist: make it first")
    has_plugin = importlib.util.find_spec("hdf5plugin") is not None
    codec = options.codec or ("blosc2" if has_plugin else "lzf")
    if codec == "blosc2" and not has_plugin:
        raise MissingLibraryError(
            "--codec blosc2 needs hdf5plugin, which is not installed. Install it with: pip install 'fastdp[hdf5]'"
        )
    try:
        images = list_images(options.images, None if options.sorted else options.seed)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise WrongUseError(str(error)) from error
    width, height = options.size
    return Packer(
        images, options.out, PackSettings(height, width, codec, int(options.chunk_mb * 1e6), options.skip_broken)
    )


class _Part:
    """A part, whose length is its number of images: the bar counts them."""

    def __init__(self, number: int, rows: int) -> None:
        self.number, self.shape = number, (rows,)


class _Parts:
    """The parts that wait."""

    def __init__(self, packer: Packer) -> None:
        self._packer, self._waiting = packer, list(packer.waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Any:
        return (_Part(number, len(self._packer.rows(number))) for number in self._waiting)


def _result(path: Path, seconds: float, before: int) -> dict[str, Any]:
    """What was written."""
    with h5py.File(path) as file:
        images = file["images"]
        return {
            "file": str(path),
            "rows": len(images),
            "shape": list(images.shape[1:]),
            "chunk_rows": images.chunks[0],
            "classes": json.loads(file.attrs["classes"]),
            "skipped": json.loads(file.attrs["skipped"]),
            "stored_nbytes": int(images.id.get_storage_size()),
            "nbytes": int(images.size),
            "packed_before": before,
            "seconds": seconds,
        }
