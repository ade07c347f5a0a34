"""Turns the arguments of `fastdp bench` into settings: which target, which ways, on which devices."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastdp.benchmark import user_file
from fastdp.benchmark.models import MODELS, find, is_builtin
from fastdp.benchmark.request import LIBRARIES, MODES, SYNTHETIC, Request
from fastdp.benchmark.settings import Settings
from fastdp.runtime.select import devices

# Libraries that train on several devices in a way of their own; the others train on one.
SEVERAL = ("ddp", "keras-jax", "keras-tensorflow")
DEFAULT_BATCH = 32
_NO_GPU = "no GPU is visible here: one CPU device is measured. Several virtual ones: --virtual 1,2,4"


def settings_of(options: argparse.Namespace, command: Sequence[str], framework_of: Callable[[str], str]) -> Settings:
    """The settings that a command line asks for.

    Args:
        options: as the command `bench` parses them.
        command: the command line itself, for the result.
        framework_of: what the model of a "file.py:function" is made of; runs the user's code.

    Raises:
        ValueError: an argument is wrong; the message names it, with the remedy.
    """
    target = target_of(options.target)
    kind, counts = devices_of(options.gpus, options.virtual)
    modes = names(options.mode, MODES, "--mode")
    if "graph" in modes and kind != "gpu":
        raise ValueError("`--mode graph` records CUDA graphs, and there are none without GPUs. Leave it out.")
    framework = options.framework or _framework(target, framework_of)
    known = find(target) if is_builtin(target) else None
    batch = options.batch or (known.batch if known is not None else DEFAULT_BATCH)
    data = options.data if options.data == SYNTHETIC else _data(options.data)

    def request(library: str, count: int, mode: str) -> Request:
        return Request(
            target=target,
            framework=_form(target, library, framework),
            library=library,
            devices=count,
            kind=kind if library == "fastdp" or kind == "gpu" else "cpu",
            mode=mode,
            batch=batch * count if options.per_device else batch,
            precision=options.precision,
            data=data,
            loss=options.loss,
            optimizer=options.optimizer,
            seed=options.seed,
        )

    libraries = names(options.compare, [name for name in LIBRARIES if name != "fastdp"], "--compare")
    ways = [request("fastdp", count, mode) for mode in modes for count in counts]
    ways += [request(*way) for library in libraries for way in _peers(library, counts, modes)]
    return Settings(
        target=target,
        name=options.target,
        framework=framework,
        ways=ways,
        batch=batch,
        precision=options.precision,
        data=data,
        seed=options.seed,
        per_device=options.per_device,
        steps=options.steps,
        seconds=options.seconds,
        rounds=options.rounds,
        timeout=options.timeout,
        find_batch=options.find_batch,
        traces=Path(options.output or ".") if options.profile else None,
        command=command,
        note=_NO_GPU if kind == "cpu" else "",
    )


def _peers(library: str, counts: Sequence[int], modes: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """The ways of a library: on one device, or on as many as fastdp where it can; torch also in modes asked for."""
    if library == "torch":
        yield from ((library, 1, mode) for mode in ("eager", "compiled", "graph") if mode == "eager" or mode in modes)
    elif library in SEVERAL:
        yield from ((library, count, "auto") for count in counts if count > 1 or library != "ddp" or len(counts) == 1)
    else:
        yield library, 1, "auto"


def target_of(text: str) -> str:
    """The built-in name, or the target with an absolute path.

    Raises:
        ValueError: it is neither, or there is no such file.
    """
    if is_builtin(text):
        find(text)
        return text
    named = user_file.split(text)
    path = named[0] if named is not None else Path(text)
    if named is None and path.suffix != ".keras":
        raise ValueError(
            f"`{text}` is neither a built-in model ({', '.join(MODELS)}), nor a .keras file, nor file.py:function with "
            "a function that returns a model."
        )
    if not path.is_file():
        raise ValueError(f"`{text}`: there is no file {path.absolute()}")
    return f"{path.resolve()}:{named[1]}" if named is not None else str(path.resolve())


def devices_of(gpus: str | None, virtual: str | None) -> tuple[str, list[int]]:
    """The kind of devices, and the counts to measure: of --gpus, of --virtual, else all GPUs and one, else one CPU.

    Raises:
        ValueError: both are given, a count is none, or there are not so many GPUs.
    """
    if gpus is not None and virtual is not None:
        raise ValueError("`--gpus` and `--virtual` exclude each other: give one of them.")
    if virtual is not None:
        return "virtual", _counts(virtual, "--virtual")
    found = devices()
    kind = "virtual" if found and found[0].kind == "virtual" else "gpu"
    if gpus is None:
        return (kind, sorted({1, len(found)})) if found else ("cpu", [1])
    counts = _counts(gpus, "--gpus")
    if max(counts) > len(found):
        there = f"this machine has {len(found)}" if found else "this machine has no visible NVIDIA GPU"
        raise ValueError(f"`--gpus {gpus}`: {there}. Without GPUs, use --virtual {gpus}")
    return kind, counts


def _counts(text: str, option: str) -> list[int]:
    """Counts of devices, each once, in their order."""
    try:
        counts = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"`{option}` must be counts of devices from 1, such as 1,2,4. Received: {text!r}")
    return counts


def names(text: str | None, choices: Sequence[str], option: str) -> list[str]:
    """Names divided by commas, each once.

    Raises:
        ValueError: one is not among the choices.
    """
    found = list(dict.fromkeys(part.strip() for part in text.split(","))) if text else []
    for name in found:
        if name not in choices:
            raise ValueError(f"`{option}` must be some of {','.join(choices)}. Received: {name!r}")
    return found


def _framework(target: str, framework_of: Callable[[str], str]) -> str:
    """What a model is made of. A built-in one has a form for Keras, if it is installed, and one for torch."""
    if is_builtin(target):
        known = find(target).frameworks
        return next((one for one in known if importlib.util.find_spec(one) is not None), known[0])
    return framework_of(target) if user_file.split(target) is not None else "keras"


def _form(target: str, library: str, framework: str) -> str:
    """The form of the model that a library trains: built-in models have one for each."""
    if not is_builtin(target) or library == "fastdp":
        return framework
    return "keras" if library.startswith("keras") else "torch"


def _data(text: str) -> str:
    """The data with an absolute path.

    Raises:
        ValueError: there is no such file.
    """
    path, colon, rest = text.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"`--data {text}`: there is no file {Path(path).absolute()}. Or use: --data {SYNTHETIC}")
    return f"{Path(path).resolve()}{colon}{rest}"
