"""Code under `torch.compile`: what it leaves alone, when it runs uncompiled, and how copies of it are compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_LEFT_ALONE = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def skipped(function: FunctionT) -> FunctionT:
    """Let `torch.compile` not begin with a function, which it may follow where it has begun."""
    code: Any = function
    eval_frame.set_code_exec_strategy(code.__code__, _LEFT_ALONE)
    return function


def not_compiled(function: FunctionT) -> FunctionT:
    """Let `torch.compile` leave a function alone, with all that it calls. Code that it calls may be compiled itself.

    As `torch.compiler.disable`, which takes a second to import.
    """
    plain: Any = function
    plain._torchdynamo_disable = True
    plain._torchdynamo_disable_msg = "fastdp runs it on several devices. Compile the module in place of it."
    return skipped(function)


def uncompiled() -> AbstractContextManager[Any]:
    """Within this scope compiled code runs as it was before it was compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def compile_alike(module: nn.Module, twin: nn.Module) -> None:
    """Compile the parts of a copy of a module on which the user has called `compile`, with the same options."""
    for part, own in zip(module.modules(), twin.modules(), strict=True):
        compiled: Any = part._compiled_call_impl
        if compiled is None:
            continue
        kept = [cell.cell_contents for cell in compiled.__closure__ or ()]
        options = next((one for one in kept if type(one).__name__ == "OptimizeContext"), None)
        if options is not None:
            own._compiled_call_impl = options(own._call_impl)
