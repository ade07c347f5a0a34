"""The command `run`: runs an unmodified Keras or torch script, or a module, on several devices.

    fastdp run train.py --epochs 3
    fastdp run --gpus 8 train.py --epochs 3
    fastdp run --gpus auto train.py
    fastdp run --gpus 8 --always train.py
    fastdp run --virtual 4 -m package.train
    fastdp run --shards 8 train.py
    fastdp run --restarts 3 train.py

Keras models run their steps on all devices. So do the calls of a torch module that an optimizer trains: the outputs of
`model(x)` and the gradients of `loss.backward()` are those of one device. What cannot be split exactly runs as in plain
Keras or torch, and a warning says why, with what to write instead. Keras steps that are not captured (those with a
`train_step` or layers of the script's own, predictions) are timed on all devices and on one in the first steps, and
run on one where that is faster, with a line that says so; `--always` keeps all. At the end a line for each torch module
says what it ran on (on the error stream, as the output is the script's).

`--shards 8` cuts every batch into 8 parts: results are the same to the last bit on any number of devices of one kind up
to 8.

Everything else is as with plain `python`: sys.argv, sys.path, `__main__`, exit status and tracebacks. Keras runs on
torch, whatever backend the script names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdp.cli.arguments import shown, whole_number
from fastdp.cli.imported import when_imported
from fastdp.cli.optional import choose_torch
from fastdp.cli.restarts import MOST_RESTARTS, is_supervised, supervise
from fastdp.cli.status import OK, WRONG_USE, say
from fastdp.comm.processes import launched, several
from fastdp.options import MOST_SHARDS, Options
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.select import AUTO, resolve, set_default_devices, set_virtual_devices
from fastdp.runtime.shards import on_shards
from fastdp.settings import MOST_VIRTUAL_DEVICES
from fastdp.tracing.trace import trace

_RUNPY = ("<frozen runpy>", runpy.__file__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add devices and options, then the script or module with its own arguments."""
    parser.usage = "fastdp run [options] (SCRIPT | -m MODULE) [arguments]"
    parser.add_argument(
        "--gpus",
        type=_gpus,
        default=None,
        metavar="GPUS",
        help="how many devices; or which, such as 0,2; or auto: all, and without a GPU the CPU (default: all)",
    )
    parser.add_argument(
        "--virtual",
        type=whole_number(1, MOST_VIRTUAL_DEVICES),
        metavar="N",
        help="have N virtual devices, as FASTDP_VIRTUAL_DEVICES=N",
    )
    parser.add_argument(
        "--compile", choices=["none", "trace", "inductor", "auto"], default="auto", help="how steps run"
    )
    parser.add_argument(
        "--graph",
        choices=["none", "bucket", "step", "auto"],
        default="auto",
        help="CUDA graphs of steps: none, one for each bucket of gradients, one for the step with its all-reduces",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="results repeat bit for bit; operations that cannot are errors"
    )
    parser.add_argument(
        "--shards",
        type=whole_number(1, MOST_SHARDS),
        metavar="N",
        help="cut every batch into N parts: the same bits on any number of devices up to N (implies --deterministic)",
    )
    parser.add_argument(
        "--local-batch-norm", action="store_true", help="normalize by each device's rows, not by the global batch"
    )
    parser.add_argument(
        "--always",
        action="store_true",
        help="keep all devices where Keras steps are faster on one (default: steps that are not captured are timed)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a trace of the whole run, for https://ui.perfetto.dev: step.json, step.json.gz",
    )
    parser.add_argument(
        "--json", action="store_true", help="at the end, one line of JSON on the error stream: what ran on what"
    )
    parser.add_argument(
        "--restarts",
        type=whole_number(0, MOST_RESTARTS),
        default=0,
        metavar="N",
        help="start the script again when it fails, N times at most: it goes on from its checkpoint, if it has one",
    )
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="module",
        help="run a module; the rest of the line is its arguments",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="script.py", help="the script and its arguments")


def run(options: argparse.Namespace) -> int:
    """Install fastdp and run the script to its end; returns 2 if there is no such script, module or device.

    The script's exceptions, exits and signals are not caught: the process ends as under plain `python`.
    """
    by_name = options.module is not None
    command = options.module if by_name else [part for i, part in enumerate(options.script) if i or part != "--"]
    if not command:
        return _say("name a script, or a module after -m.", WRONG_USE)
    name = command[0]
    unfit = None if by_name else _why_not_a_script(name)
    if unfit is not None:
        return _say(f"can't open file {os.path.abspath(name)!r}: {unfit}", WRONG_USE)
    if not is_supervised() and options.restarts:
        return supervise(name, options.restarts)
    # As in `python`: the script's own folder, or the current folder for a module.
    sys.path[0] = os.getcwd() if by_name else str(Path(name).resolve().parent)
    sys.argv[:] = command
    if by_name and not _module_exists(name):
        return _say(f"no module named {name}", WRONG_USE)
    try:
        if options.virtual is not None:
            set_virtual_devices(options.virtual)
        devices = resolve(options.gpus, caller="fastdp run")
        on_shards(devices, Options(shards=options.shards), launched())
    except ValueError as error:
        hint = " Here: fastdp run --virtual n." if "set_virtual_devices" in str(error) else ""
        return _say(f"{error}{hint}", WRONG_USE)
    if options.gpus is not None:
        set_default_devices(options.gpus)
    choose_torch("run")
    script = _Script(options, devices, name)
    when_imported("torch", script.install_torch)
    when_imported("keras", script.install_keras)
    sys.excepthook = _without_own_frames
    try:
        with _traced(options.trace):
            if by_name:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
    finally:
        script.tell()
    return 0


def _traced(path: str | None) -> AbstractContextManager[object]:
    """Writes a trace of the script to a file, if one is named. A process that the script forks writes none.

    Raises:
        SystemExit: the file cannot be written.
    """
    if path is None:
        return nullcontext()
    try:
        return trace(path).start()
    except OSError as error:
        raise SystemExit(_say(f"argument --trace: {error}", WRONG_USE)) from error


class _Script:
    """What the libraries of a script get when it imports them, and what is told at its end.

    Args:
        options: of the command line.
        devices: those that it names.
        name: of the script or module.
    """

    def __init__(self, options: argparse.Namespace, devices: Sequence[QueueDevice], name: str) -> None:
        self._options, self._devices, self._name = options, devices, name
        self._process = os.getpid()
        self._torch: Any = None
        self._keras = False

    def install_torch(self) -> None:
        """Split the calls of the script's torch modules. One device is plain torch."""
        options = self._options
        if len(self._devices) > 1 or several() or options.shards is not None:
            chosen = Options(
                sync_batch_norm=not options.local_batch_norm,
                deterministic=options.deterministic,
                shards=options.shards,
            )
            given = on_shards(self._devices, chosen, launched())
            self._torch = importlib.import_module("fastdp.torch.script_calls").install(*given)
        self._keep_apart()

    def install_keras(self) -> None:
        """Split the steps of the script's Keras models."""
        options = self._options
        try:
            importlib.import_module("fastdp.keras.install").install(
                options.gpus,
                sync_batch_norm=not options.local_batch_norm,
                compile=None if options.compile == "none" else options.compile,
                graph=None if options.graph == "none" else options.graph,
                deterministic=options.deterministic,
                shards=options.shards,
                always=options.always,
            )
        except (ValueError, RuntimeError) as error:
            raise SystemExit(_say(str(error), WRONG_USE)) from error
        self._keras = True
        self._keep_apart()

    def _keep_apart(self) -> None:
        """Leave the torch modules in steps of Keras models to Keras."""
        if self._torch is not None and self._keras:
            self._torch.stay_out(importlib.import_module("fastdp.keras.steps.own_loops").within_step)

    def tell(self) -> None:
        """Print what the script's torch modules ran on, or that none did. What Keras does is told by Keras."""
        if os.getpid() != self._process:  # a child that the script forked
            return
        if self._options.json:
            devices = [device.name for device in self._devices]
            torch = [] if self._torch is None else self._torch.counts()
            found = {"script": self._name, "devices": devices, "keras": self._keras, "torch": torch}
            print(json.dumps(found), file=sys.stderr)
        elif self._torch is not None:
            for line in self._torch.summary():
                _say(line, OK)


def _gpus(text: str) -> str | int | list[int]:
    """Parse a number of devices, a list of ordinals, or auto."""
    if text.strip() == AUTO:
        return AUTO
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number, ordinals such as 0,2, or auto, got {shown(text)}"
        ) from None
    return numbers if "," in text else numbers[0]


def _why_not_a_script(name: str) -> str | None:
    """Why a path cannot be run, as far as can be seen from outside; None if it can."""
    if not os.path.exists(name):
        return "no such file"
    if not os.access(name, os.R_OK):
        return "it cannot be read"
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "__main__.py")):
        return "a folder needs a __main__.py"
    return None


def _module_exists(name: str) -> bool:
    """Whether a module can be found. Imports its parent packages, as `python -m` does."""
    if "" in name.split("."):  # find_spec takes `.x` for a relative name
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # no such parent, or a module without a spec such as __main__
        return False


def _say(message: str, status: int) -> int:
    """Print a line of this command and return the exit status."""
    say("run", message)
    return status


def _without_own_frames(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception as plain Python does, with a traceback that starts in the script."""
    shown, frame = traceback, traceback
    while frame is not None:
        file, frame = frame.tb_frame.f_code.co_filename, frame.tb_next
        if file == __file__ or (file in _RUNPY and frame is not None and shown is not None and shown.tb_next is frame):
            shown = frame
    error.__traceback__ = shown or traceback
    sys.__excepthook__(kind, error, shown or traceback)
