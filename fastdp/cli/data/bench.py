"""The command `data bench`: measures how fast an HDF5 file is read, and what other chunks would give.

fastdp data bench train.h5
fastdp data bench train.h5:images --batch 512
fastdp data bench train.h5 --no-trials --json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from fastdp.cli.arguments import add_json, positive, whole_number
from fastdp.cli.output import print_json
from fastdp.cli.status import FAILED, OK, WrongUseError, say
from fastdp.data.file_speed import FileSpeed, measure, names_of_arrays
from fastdp.rendering.blocks import Block, Paragraph, Table
from fastdp.rendering.terminal import in_terminal
from fastdp.rendering.text import as_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, and how it is read."""
    parser.add_argument("file", metavar="FILE[:DATASET]", help="an HDF5 file, and an array in it (default: all)")
    parser.add_argument(
        "--batch", type=whole_number(1, 1 << 24), default=256, metavar="ROWS", help="rows of a batch (default: 256)"
    )
    parser.add_argument(
        "--seconds",
        type=positive("seconds", most=3600),
        default=1.0,
        metavar="S",
        help="time for each way of reading (default: 1)",
    )
    parser.add_argument("--no-trials", action="store_true", help="do not write a sample of the rows in other layouts")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns 1 if the file cannot be read."""
    path, names = _parsed(options.file)
    try:
        found = [
            measure(path, name, batch_size=options.batch, seconds=options.seconds, trials=not options.no_trials)
            for name in names or _arrays(path)
        ]
    except KeyError as error:
        raise WrongUseError(str(error.args[0])) from error
    except ValueError as error:
        say("data bench", str(error))
        return FAILED
    if options.json:
        print_json({"file": path, "datasets": [asdict(one) for one in found]})
        return OK
    blocks = [block for one in found for block in _blocks(path, one)]
    sys.stdout.write(in_terminal(blocks) or as_text(blocks))
    sys.stdout.write("\n")
    return OK


def _parsed(text: str) -> tuple[str, list[str]]:
    """The file, and the data set after a colon; a file that has such a name is a file."""
    path, colon, name = text.rpartition(":")
    if os.path.exists(text) or not colon:
        path, name = text, ""
    if not os.path.exists(path):
        raise WrongUseError(f"there is no file {path!r}: pass FILE.h5 or FILE.h5:DATASET")
    return path, [name] if name else []


def _arrays(path: str) -> list[str]:
    names = names_of_arrays(path)
    if not names:
        raise ValueError(f"{path!r} has no array of numbers with rows: nothing can be measured")
    return names


def _blocks(path: str, found: FileSpeed) -> Sequence[Block]:
    """What was measured of a data set, as tables."""
    mb = found.rows * found.row_nbytes / 1e6
    stored = found.stored_nbytes / max(1, found.rows * found.row_nbytes)
    blocks: list[Block] = [
        Paragraph(
            f"{found.dataset} in {path}: {found.rows:,} rows of {found.row_nbytes:,} bytes ({found.dtype}), "
            f"{mb:,.1f} MB in memory, of which {stored:.0%} are stored. It is read {found.how}."
        ),
        Table(
            "As it is",
            ["how", "rows/s", "GB/s"],
            [[one.how, f"{one.rows_per_second:,.0f}", f"{one.gb_per_second:.2f}"] for one in found.speeds],
            f"{found.threads} threads. The index of its chunks was read in {1e3 * found.index_seconds:,.1f} ms, once.",
        ),
    ]
    total = sum(found.shares.values())
    if total:
        parts = ", ".join(f"{name} {part / total:.0%}" for name, part in found.shares.items())
        blocks.append(Paragraph(f"Where the time of one thread goes, in order: {parts}."))
    if found.trials:
        rows = [
            [
                one.layout,
                f"{one.size:.0%}",
                f"{one.in_order.rows_per_second:,.0f}",
                f"{one.by_chunks.rows_per_second:,.0f}",
            ]
            for one in found.trials
        ]
        best = max(found.trials, key=lambda one: one.by_chunks.rows_per_second)
        header = ["layout", "stored", "rows/s in order", 'rows/s shuffle="chunks"']
        blocks.append(Table("A sample of its rows in other layouts", header, rows, f"Fastest shuffled: {best.layout}."))
    return blocks
