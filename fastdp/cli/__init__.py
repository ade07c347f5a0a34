"""The command line: `python -m fastdp COMMAND`, also installed as `fastdp`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastdp._version import __version__
from fastdp.cli.optional import MissingLibraryError

COMMANDS = {
    "devices": "list the devices that `gpus=` counts",
    "demo": "train a convolutional network on real digits, on several devices and on one, and compare",
    "bench": "measure how fast a model trains: built-in ones, a .keras file, or a function of your own",
    "run": "run an unmodified Keras or torch script on several devices",
    "convert": "turn an old parallel-model .h5 file into a plain one",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Each command is a module of this package with `add_arguments(parser)` and `run(options) -> int`. The modules
    load Keras and other optional libraries only in `run`, so that `devices` and `--help` work without them.
    """
    parser = argparse.ArgumentParser(prog="fastdp", description="Data-parallel training from one process.")
    parser.add_argument("--version", action="version", version=f"fastdp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f"fastdp.cli.{name}") for name in COMMANDS}
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, help=COMMANDS[name], description=module.__doc__))
    options = parser.parse_args(arguments)
    try:
        return int(modules[options.command].run(options))
    except MissingLibraryError as error:
        print(f"fastdp {options.command}: {error}", file=sys.stderr)
        return 1
