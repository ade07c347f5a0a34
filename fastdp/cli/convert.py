"""The command `convert`: turns an .h5 file of a Keras 2 parallel model into a plain file of the model inside."""

from __future__ import annotations

import argparse
import sys

from fastdp.cli.optional import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add source and destination."""
    parser.add_argument("source", help="the old .h5 file")
    parser.add_argument("destination", help="the file to write; must not exist")


def run(options: argparse.Namespace) -> int:
    """Convert one file; returns 1 if it cannot be converted."""
    load("keras", "keras")
    convert = load("fastdp.keras.h5_files.convert", "keras").convert
    try:
        convert(options.source, options.destination)
    except (OSError, ValueError) as error:
        print(f"fastdp convert: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {options.destination}")
    return 0
