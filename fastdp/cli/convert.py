"""The command `convert`: turns an .h5 file of a Keras 2 parallel model into a plain file of the model inside.

    fastdp convert parallel.h5 plain.h5

The old file is only read. The new one appears when it is whole.
"""

from __future__ import annotations

import argparse
import warnings

from fastdp.cli.arguments import add_json
from fastdp.cli.optional import choose_torch, load
from fastdp.cli.output import print_json
from fastdp.cli.status import FAILED, OK, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add source, destination and `--json`."""
    parser.add_argument("source", help="the old .h5 file")
    parser.add_argument("destination", help="the file to write; must not exist")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Convert one file; returns 1 if it cannot be converted."""
    choose_torch("convert")
    try:
        load("fastdp.data.h5_checks", "keras").check_conversion(options.source, options.destination)  # before Keras
        notes = _convert(options.source, options.destination)
    except (OSError, ValueError) as error:
        say("convert", str(error))
        return FAILED
    if options.json:
        print_json({"source": options.source, "destination": options.destination, "notes": notes})
        return OK
    for note in notes:
        say("convert", note)
    print(f"Wrote {options.destination}")
    return OK


def _convert(source: str, destination: str) -> list[str]:
    """Convert a file, and return what it warns of."""
    convert = load("fastdp.keras.h5_files.convert", "keras").convert
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        convert(source, destination)
    return [str(one.message) for one in caught if one.category is UserWarning]
