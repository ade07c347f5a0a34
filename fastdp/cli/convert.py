"""Turn an .h5 file that Keras 2 wrote from a parallel model into a plain file of the model inside."""

from __future__ import annotations

import argparse
import importlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from and where to."""
    parser.add_argument("source", help="the old .h5 file")
    parser.add_argument("destination", help="the file to write; must not exist")


def run(options: argparse.Namespace) -> int:
    """Convert one file."""
    convert = importlib.import_module("fastdp.keras.convert").convert
    convert(options.source, options.destination)
    print(f"Wrote {options.destination}")
    return 0
