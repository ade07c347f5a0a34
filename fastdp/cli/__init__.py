"""The command line: `python -m fastdp COMMAND`, also installed as `fastdp`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fastdp import settings
from fastdp._version import __version__
from fastdp.cli.arguments import Parser
from fastdp.cli.status import TEXT, WRONG_USE, ended, say

COMMANDS = {
    "devices": "list the devices that `gpus=` counts, and what is missing to use GPUs",
    "demo": "train a convolutional network on real digits, on several devices and on one, and compare",
    "bench": "measure how fast a model trains: built-in ones, a .keras file, or a function of your own",
    "plan": "model steps and scaling on 1 to 8 GPUs of a box, from what one device takes",
    "run": "run an unmodified Keras or torch script on several devices",
    "verify": "compare two runs bit by bit: their checkpoints, or the fingerprints of their steps",
    "data": "measure how fast an HDF5 file is read, or pack images into one for training",
    "convert": "turn an old parallel-model .h5 file into a plain one",
}
_DESCRIPTION = """Data-parallel training on all GPUs of one machine, from one process: Keras 3, torch, NumPy and CuPy.

Examples:
  fastdp devices
  fastdp demo
  fastdp run --gpus auto train.py --epochs 3
  fastdp COMMAND --help"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status (`fastdp.cli.status`); without a command, print the help.

    Each command is a module of this package with `add_arguments(parser)` and `run(options) -> int`. The modules
    load Keras and other optional libraries only in `run`, so that `devices` and `--help` work without them.

    Raises:
        SystemExit: after `--help` and `--version`, and where the arguments are wrong.
    """
    if sys.stdout is None:  # closed by the caller: `fastdp devices >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process
    parser, parsers = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers.get(options.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help()
        parser.exit()
    wrong = settings.problems()
    for problem in [*wrong, *settings.misspelt()]:
        say(options.command, problem)
    if wrong:
        return WRONG_USE
    run = importlib.import_module(f"fastdp.cli.{options.command}").run
    if options.command == "run":  # a script has its own status and tracebacks
        return int(run(options))
    return ended(options.command, lambda: int(run(options)))


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of all arguments, and those of the commands by name."""
    variables = "\n".join(f"  {name:22}  {meaning}" for name, meaning in settings.MEANINGS.items())
    parser = Parser(prog="fastdp", description=_DESCRIPTION, epilog=f"Environment variables:\n{variables}\n\n{TEXT}")
    parser.add_argument("--version", action="version", version=f"fastdp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {}
    for name in COMMANDS:
        module = importlib.import_module(f"fastdp.cli.{name}")
        what = (module.__doc__ or "").removeprefix(f"The command `{name}`: ")
        parsers[name] = commands.add_parser(name, help=COMMANDS[name], description=what[:1].upper() + what[1:])
        module.add_arguments(parsers[name])
    return parser, parsers
