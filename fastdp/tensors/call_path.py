"""Names the part of a torch module whose forward is running, by the path of the parts that called it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)


def running_part() -> str:
    """The dotted name of the innermost module whose forward this thread runs, its kind, and the line that called it.

    Found on the thread's stack, so it costs microseconds per call, and nothing where it is not asked for.
    """
    parts: list[nn.Module] = []
    line = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        part = frame.f_locals["self"] if "self" in code.co_varnames[: code.co_argcount] else None
        if isinstance(part, nn.Module) and not (parts and parts[-1] is part):
            parts.append(part)
        if parts and not line and not code.co_filename.startswith(_TORCH):
            line = f", line {frame.f_lineno} of {Path(code.co_filename).name}"
        frame = frame.f_back
    if not parts:
        return "a function outside of any module"
    names = [_name_in(owner, part) for part, owner in itertools.pairwise(parts)]
    return f"{'.'.join(name for name in reversed(names) if name) or 'the module'} ({type(parts[0]).__name__}{line})"


def _name_in(owner: nn.Module, part: nn.Module) -> str:
    """The name of a part in its owner, or its place in a plain list or dict of the owner; empty if it has none."""
    for name, child in owner._modules.items():
        if child is part:
            return name
    for name, child in owner.named_modules():
        if child is part:
            return name
    for name, value in vars(owner).items():
        if isinstance(value, (list, tuple, dict)):
            for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                if one is part:
                    return f"{name}[{key!r}]"
    return ""
