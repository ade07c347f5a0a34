"""The command `bench`: measures how fast a model trains, on several devices and in several ways.

    fastdp bench resnet50 --gpus 1,2,4,8 --batch 64 --precision bf16
    fastdp bench my_model.keras
    fastdp bench my_file.py:make_model --batch 256 --compare torch,ddp
    fastdp bench mlp --virtual 1,2,4              on a machine without GPUs
    fastdp bench resnet50:size=64,classes=10      a built-in model of other sizes
    fastdp bench report A.json B.json             compare results; a page by --output

Every way to train is a process of its own. All warm up until their step time stays the same, and then take turns.
Figures are medians over the rounds, with their spread, and the noise of the machine beside them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastdp.benchmark.arguments import settings_of
from fastdp.benchmark.describe import framework_of
from fastdp.benchmark.display import open_display
from fastdp.benchmark.html import report_page
from fastdp.benchmark.models import MODELS
from fastdp.benchmark.process import WayError
from fastdp.benchmark.request import FRAMEWORKS, LIBRARIES, MODES, PRECISIONS, SYNTHETIC
from fastdp.benchmark.result import FILE, save
from fastdp.benchmark.run import run as measure
from fastdp.cli import bench_report
from fastdp.cli.arguments import add_json, check_folder, positive, whole_number
from fastdp.cli.output import print_json
from fastdp.cli.status import FAILED, OK, WrongUseError, say

COUNT = whole_number(1, 2**31 - 1)
ROUNDS = whole_number(1, 100_000)
STEPS = whole_number(1, 10_000_000)
SECONDS = positive("seconds", most=24 * 3600)  # what would go on for longer is a slip, and would never end
PAGE = "report.html"  # beside the result in the folder of --output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to measure, on what, how, and where the result goes."""
    parser.set_defaults(help=parser.format_help)
    parser.add_argument(
        "target",
        nargs="?",
        help=f"a built-in model ({', '.join(MODELS)}), a .keras file, or file.py:function, which returns a keras.Model "
        "or a torch.nn.Module, alone or with its loss; or `report`, then JSON files",
    )
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--batch", type=COUNT, metavar="ROWS", help="rows of the global batch (default: the model's)")
    what.add_argument("--per-device", action="store_true", help="--batch counts the rows of each device instead")
    what.add_argument("--precision", choices=PRECISIONS, default="float32", help="mixed precision (default: float32)")
    what.add_argument(
        "--data",
        default=SYNTHETIC,
        metavar="FILE.h5[:x,y]",
        help="an HDF5 file, read while training (default: synthetic)",
    )
    what.add_argument("--framework", choices=FRAMEWORKS, help="the form of a built-in model (default: keras)")
    what.add_argument("--loss", help="a loss by name (default: the model's own, or one that fits its output)")
    what.add_argument("--optimizer", help="an optimizer by name (default: the model's own, or a usual one)")
    what.add_argument(
        "--seed", type=whole_number(0, 2**31 - 1), default=0, help="of weights and synthetic data (default: 0)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--gpus", metavar="1,2,4", help="counts of GPUs (default: 1 and all; without GPUs one CPU device)")
    how.add_argument("--virtual", metavar="1,2,4", help="counts of virtual devices in host memory")
    how.add_argument(
        "--mode", default="auto", metavar="MODES", help=f"how fastdp runs steps: {','.join(MODES)} (default: auto)"
    )
    peers = ",".join(name for name in LIBRARIES if name != "fastdp")
    how.add_argument("--compare", metavar="LIBRARIES", help=f"other ways, where they are installed: {peers}")
    how.add_argument("--find-batch", action="store_true", help="find the largest batch that fits, and the fastest one")
    _add_rounds(parser)
    out = parser.add_argument_group("what comes out")
    add_json(parser)
    out.add_argument("--profile", action="store_true", help="write a Chrome trace of a few steps of each way")
    out.add_argument("--output", type=Path, metavar="FOLDER", help="write the result as JSON and as an HTML page there")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    """How long to measure."""
    times = parser.add_argument_group("how long")
    times.add_argument("--rounds", type=ROUNDS, default=5, help="rounds in which the ways take turns (default: 5)")
    times.add_argument("--seconds", type=SECONDS, default=2.0, help="of a round of one way (default: 2)")
    times.add_argument("--steps", type=STEPS, help="of a round, instead of --seconds")
    times.add_argument(
        "--timeout",
        type=SECONDS,
        default=600.0,
        help="seconds until a way must be ready, and answer (default: 600)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure and show; returns 1 if nothing was measured, or one way alone of those that were to be compared.

    Raises:
        WrongUseError: an argument is wrong, or the model's file.
        OSError: a file cannot be written.
    """
    if options.target is None:
        print(options.help())
        return OK
    if options.target == "report":
        return bench_report.run(options.files, as_json=options.json, output=options.output)
    try:
        if options.files:
            raise ValueError(f"one model at a time: {options.target}. Received also: {' '.join(options.files)}")
        settings = settings_of(options, ["fastdp", *sys.argv[1:]], framework_of)
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    except WayError as error:
        say("bench", f"{options.target}: {error}")
        return FAILED
    if options.output is not None:
        check_folder("--output", options.output)
        options.output.mkdir(parents=True, exist_ok=True)
    if settings.note:
        say("bench", settings.note)
    with open_display(sys.stderr if options.json else sys.stdout) as display:
        result = measure(settings, display)
    _write(result, options)
    return OK if len(result["entries"]) >= min(2, len(settings.ways)) else FAILED


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the JSON and write the files that were asked for."""
    if options.output is not None:
        save(result, options.output / FILE)
        page = options.output / PAGE
        page.write_text(report_page(result, options.output), "utf-8")
        print(f"Wrote {options.output / FILE} and {page}", file=sys.stderr)
    if options.json:
        print_json(result)
