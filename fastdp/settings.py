"""The FASTDP_* environment variables: each is read and checked here, and a wrong value is the same kind of error."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

VIRTUAL_DEVICES = "FASTDP_VIRTUAL_DEVICES"
VIRTUAL_KIND = "FASTDP_VIRTUAL_KIND"
ALL_REDUCE = "FASTDP_ALL_REDUCE"
CACHE_DIR = "FASTDP_CACHE_DIR"
REMEMBER = "FASTDP_REMEMBER"
FINGERPRINT = "FASTDP_FINGERPRINT"

# Each virtual device is a thread with memory of its own: more than this is a slip of the keyboard.
MOST_VIRTUAL_DEVICES = 1024
RESTARTED = "_FASTDP_RESTARTED"  # set by `fastdp run --restarts` alone
VIRTUAL_KINDS = ("host", "gpu")
# How gradients are added up on GPUs: by the limits that were measured on them, by the built-in ones, by our kernels
# alone or by NCCL alone.
ALL_REDUCES = ("measured", "fixed", "kernels", "nccl")
REMEMBERS = ("on", "off")

# What the help of the command line says about each.
MEANINGS = {
    VIRTUAL_DEVICES: "have this many virtual devices, 0 to 1024",
    VIRTUAL_KIND: "what virtual devices are parts of: host, or gpu",
    ALL_REDUCE: "how GPUs add up gradients: measured, fixed, kernels or nccl",
    CACHE_DIR: "the folder of compiled kernels and steps, and of what was measured",
    REMEMBER: "whether the next run starts with the compiled steps of this one: on, or off",
    FINGERPRINT: "append a hash of each training step to this file, for `fastdp verify`",
}


def virtual_devices() -> int:
    """The number of virtual devices that FASTDP_VIRTUAL_DEVICES asks for; 0 if it is not set.

    Raises:
        ValueError: it is not a whole number from 0 to 1024.
    """
    text = _text(VIRTUAL_DEVICES)
    if not text:
        return 0
    # Python refuses to convert thousands of digits, with an error that names no variable.
    if not (text.isascii() and text.isdecimal() and len(text) <= 18 and int(text) <= MOST_VIRTUAL_DEVICES):
        raise _wrong(VIRTUAL_DEVICES, f"a whole number from 0 to {MOST_VIRTUAL_DEVICES}, such as 8")
    return int(text)


def virtual_kind() -> str | None:
    """What FASTDP_VIRTUAL_KIND says virtual devices are parts of, "host" or "gpu"; None if it is not set.

    Raises:
        ValueError: it is neither.
    """
    return _choice(VIRTUAL_KIND, VIRTUAL_KINDS)


def all_reduce() -> str:
    """The way to add up gradients that FASTDP_ALL_REDUCE names; "measured" if it is not set.

    Raises:
        ValueError: it is none of the choices.
    """
    return _choice(ALL_REDUCE, ALL_REDUCES) or ALL_REDUCES[0]


def remembers() -> bool:
    """Whether compiled steps, and decisions between forms of a step, are kept for later runs: unless FASTDP_REMEMBER
    is "off".

    Raises:
        ValueError: it is neither "on" nor "off".
    """
    return _choice(REMEMBER, REMEMBERS) != "off"


def cache_dir() -> Path | None:
    """The folder that FASTDP_CACHE_DIR names, which need not exist yet; None if it is not set."""
    text = os.environ.get(CACHE_DIR, "")
    return Path(text) if text else None


def fingerprint() -> Path | None:
    """The file that FASTDP_FINGERPRINT names, which need not exist yet; None if it is not set."""
    text = os.environ.get(FINGERPRINT, "")
    return Path(text) if text else None


def restarted() -> bool:
    """Whether `fastdp run --restarts` has started this process again, since the one before it failed."""
    return os.environ.get(RESTARTED) == "1"


def problems() -> list[str]:
    """What is wrong with the variables that are set, one sentence each; empty if all is well."""
    found = []
    for check in (virtual_devices, virtual_kind, all_reduce, remembers):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    folder = cache_dir()
    if folder is not None and os.path.lexists(folder) and not folder.is_dir():
        found.append(str(_wrong(CACHE_DIR, "a folder, or a path where one can be made")))
    file = fingerprint()
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        found.append(str(_wrong(FINGERPRINT, "a file in a folder that exists")))
    return found


def misspelt() -> list[str]:
    """A sentence for each variable that is set and is no variable of fastdp, but nearly called like one."""
    unknown = sorted(name for name in os.environ if name.startswith("FASTDP_") and name not in MEANINGS)
    pairs = ((name, difflib.get_close_matches(name, MEANINGS, 1, cutoff=0.85)) for name in unknown)
    return [f"{name} is no variable of fastdp. Did you mean {close[0]}?" for name, close in pairs if close]


def _text(name: str) -> str:
    return os.environ.get(name, "").strip()


def _choice(name: str, choices: Sequence[str]) -> str | None:
    """The value of a variable that names one of several choices; None if it is not set."""
    text = _text(name)
    if text and text not in choices:
        raise _wrong(name, f"one of {', '.join(choices)}")
    return text or None


def _wrong(name: str, expected: str) -> ValueError:
    received = repr(os.environ.get(name, ""))
    received = received if len(received) <= 80 else f"{received[:80]}..."
    return ValueError(
        f"The environment variable {name} must be {expected}. Received: {received}. Correct it, or unset it."
    )
