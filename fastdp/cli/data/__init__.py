"""The command `data`: measures how fast an HDF5 file is read, or packs images into one for training.

    fastdp data bench train.h5
    fastdp data bench train.h5:images --batch 512 --json
    fastdp data pack images/ train.h5 --size 224x224
    fastdp data pack images/ train.h5 --codec lzf --json

`bench` reads each array of numbers in the file in batches: in order, shuffled by chunks and uniformly, and by h5py for
comparison. It says where the time goes, and how fast a sample of the rows would be in other layouts, which it writes
into temporary files.

`pack` takes a folder with a subfolder of images for each class. Images are scaled and cut to one size, mixed, and
stored as `images` (uint8) and `labels`. Called again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import argparse

from fastdp.cli.data import bench, pack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `bench` and `pack` with their arguments."""
    parts = parser.add_subparsers(dest="part", metavar="PART", title="parts", required=True)
    for name, module in (("bench", bench), ("pack", pack)):
        what = module.__doc__ or ""
        first = what.split("\n", 1)[0].removeprefix(f"The command `data {name}`: ").rstrip(".")
        module.add_arguments(parts.add_parser(name, help=first, description=what[what.index(": ") + 2 :]))


def run(options: argparse.Namespace) -> int:
    """Run one of both; returns its exit status."""
    return bench.run(options) if options.part == "bench" else pack.run(options)
