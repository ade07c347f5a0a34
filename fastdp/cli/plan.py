r"""The command `plan`: models steps and scaling on 1 to 8 GPUs of a box, from what one device takes.

    fastdp plan --profile RESULT.json --box dgx-h100
    fastdp bench mlp --json | \
        fastdp plan --profile - --box pcie5
    fastdp plan resnet50 --step-ms 26 --box dgx-a100
    fastdp plan resnet50 --step-ms 90 --box pcie4 --json
    fastdp plan --parameters 25.6e6 --batch 64 32 \
        --step-ms 50 28 --box pcie5
    fastdp plan vit-b16 --step-ms 90 \
        --bus-gbps 200 --latency-us 50

Nothing is measured: each line says that it is modelled. Columns: GPUs, rows of the global batch, milliseconds of a
step, rows per second, speedup, efficiency (speedup by GPU) of devices that differ a little, and at best. An `a` marks
steps that wait for the all-reduce, an `h` those that wait for the host. docs/plan.md has the method, and how well it
fits published figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdp.benchmark.models import MODELS
from fastdp.benchmark.plan.boxes import BOXES, MOST_GPUS, Box, own_box
from fastdp.benchmark.plan.known_buckets import KNOWN_BUCKETS
from fastdp.benchmark.plan.model import BACKWARD_SHARE, JITTER
from fastdp.benchmark.plan.profile import GRADIENT_NBYTES, Profile, from_files, from_points
from fastdp.benchmark.plan.table import lines, plan
from fastdp.cli.arguments import add_json, counts, number, whole_number
from fastdp.cli.output import print_json, print_sentence
from fastdp.cli.status import OK, WrongUseError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, what one device takes, the box, and what is assumed."""
    parser.set_defaults(help=parser.format_help)
    parser.add_argument(
        "model", nargs="?", help=f"a built-in model ({', '.join(MODELS)}), or a case of the files; else any name"
    )
    one = parser.add_argument_group("one device: measured, or given")
    one.add_argument(
        "--profile",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="results of fastdp bench (- is the standard input), or of make gpu-check",
    )
    one.add_argument(
        "--step-ms", nargs="+", type=number("milliseconds", 1e-6, 1e9), metavar="MS", help="of a step, one per batch"
    )
    one.add_argument(
        "--batch",
        nargs="+",
        type=whole_number(1, 1 << 30),
        metavar="ROWS",
        help="of one device, one per step (default: that of the built-in model)",
    )
    one.add_argument("--parameters", type=number("parameters", 1, 1e12), metavar="N", help="such as 25.6e6")
    one.add_argument(
        "--host-ms",
        type=number("milliseconds", 0, 1e9),
        default=0.0,
        metavar="MS",
        help="to issue one device's step",
    )
    box = parser.add_argument_group("the box")
    named = "; ".join(f"{name} ({known.title})" for name, known in BOXES.items())
    box.add_argument("--box", choices=[*BOXES], metavar="BOX", help=named)
    box.add_argument(
        "--bus-gbps",
        type=number("GB/s", 1e-3, 1e6),
        metavar="GB/S",
        help="bus bandwidth of nccl-tests, of your own box",
    )
    box.add_argument(
        "--latency-us",
        type=number("microseconds", 0, 1e9),
        metavar="US",
        help="of an all-reduce, of your own box",
    )
    box.add_argument("--gpus", type=counts(MOST_GPUS), default=[1, 2, 4, 8], metavar="1,2,4,8", help="how many")
    what = parser.add_argument_group("what is assumed")
    what.add_argument(
        "--gradients", choices=[*GRADIENT_NBYTES], default="fp32", help="as they are reduced (default: fp32)"
    )
    what.add_argument(
        "--jitter",
        type=number("percent", 0, 100),
        default=100 * JITTER,
        metavar="PERCENT",
        help=f"by which a device's steps differ (default: {100 * JITTER:g})",
    )
    what.add_argument(
        "--backward-share",
        type=number("percent", 0, 100),
        default=100 * BACKWARD_SHARE,
        metavar="PERCENT",
        help=f"of a step that is backward (default: {100 * BACKWARD_SHARE:.0f})",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the modelled steps; returns 2 where what is given does not make a model."""
    if options.model is None and options.profile is None and options.step_ms is None:
        print(options.help())
        return OK
    box, profiles = _box(options), _profiles(options)
    planned = [plan(one, box, options.gpus, options.jitter / 100) for one in profiles]
    if options.json:
        print_json(planned[0] if len(planned) == 1 else planned)
        return OK
    for number_of, found in enumerate(planned):
        if number_of:
            print()
        for line, breaks in lines(found):
            print_sentence(line) if breaks else print(line)
    return OK


def _box(options: argparse.Namespace) -> Box:
    """The named box, or the user's own."""
    own = options.bus_gbps is not None or options.latency_us is not None
    if options.box is not None:
        if own:
            raise WrongUseError("argument --box: leave it out where --bus-gbps and --latency-us describe the box")
        return BOXES[options.box]
    if options.bus_gbps is None or options.latency_us is None:
        raise WrongUseError(
            f"argument --box: name one of {', '.join(BOXES)}, or describe your own by --bus-gbps and --latency-us"
        )
    return own_box(options.bus_gbps, options.latency_us)


def _profiles(options: argparse.Namespace) -> list[Profile]:
    """What one device takes: from the files, or as given."""
    given = {"--step-ms": options.step_ms, "--batch": options.batch, "--parameters": options.parameters}
    if options.profile is None:
        return [_given(options)]
    for name, value in given.items():
        if value is not None:
            raise WrongUseError(f"argument {name}: leave it out: the files of --profile have it")
    try:
        found = from_files(options.profile, options.model, options.gradients)
    except (OSError, ValueError) as error:
        raise WrongUseError(f"argument --profile: {error}") from error
    return [one.with_share(options.backward_share / 100, options.host_ms / 1e3) for one in found]


def _given(options: argparse.Namespace) -> Profile:
    """A profile from the figures on the command line."""
    name, known = options.model or "the model", MODELS.get(options.model or "")
    parameters = options.parameters or (known.parameters if known is not None else None)
    if parameters is None:
        raise WrongUseError(f"argument --parameters: expected for a model that is not built in ({', '.join(MODELS)})")
    if options.step_ms is None:
        raise WrongUseError("argument --step-ms: expected, the milliseconds of a step of one device; or --profile FILE")
    batches = options.batch or ([known.batch] if known is not None else None)
    if batches is None:
        raise WrongUseError("argument --batch: expected, the rows of the step that --step-ms took")
    if len(batches) != len(options.step_ms) or len(set(batches)) != len(batches):
        raise WrongUseError(
            f"argument --step-ms: expected one for each of the different batches {batches}, got {options.step_ms}"
        )
    points = {rows: milliseconds / 1e3 for rows, milliseconds in zip(batches, options.step_ms, strict=True)}
    buckets = () if options.parameters else KNOWN_BUCKETS.get(name, ())
    profile = from_points(name, points, round(parameters), gradients=options.gradients, buckets=buckets)
    return profile.with_share(options.backward_share / 100, options.host_ms / 1e3)
