"""The random generators of a process in a checkpoint: Python's, NumPy's global one and torch's."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


def torch_side() -> Any:
    """`fastdp.tensors.checkpoints`; None where nobody has imported torch."""
    return importlib.import_module("fastdp.tensors.checkpoints") if "torch" in sys.modules else None


def read_generators() -> dict[str, Any]:
    """The states of all of them, in their own form."""
    version, numbers, gauss = random.getstate()
    library = torch_side()
    return {
        "python": (version, np.array(numbers, np.uint64), gauss),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - whoever uses it wants it to go on
        "torch": library.read_generators() if library is not None else None,
    }


def write_generators(states: Mapping[str, Any]) -> None:
    """Set them to what `read_generators` has returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(int(number) for number in numbers), gauss))
    np.random.set_state(states["numpy"])  # noqa: NPY002
    library = torch_side()
    if library is not None and states["torch"] is not None:
        library.write_generators(states["torch"])


def check_generators(states: Mapping[str, Any]) -> None:
    """Try what `write_generators` would set, and leave all as it is.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RuntimeError: it is not what `read_generators` returns.
    """
    before = read_generators()
    try:
        write_generators(states)
    finally:
        write_generators(before)
