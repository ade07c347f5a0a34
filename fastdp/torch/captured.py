"""The captured steps of a `TrainStep`: how options choose them, and what the report tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdp.capture.cuda_graphs.recorder import Recorder, chosen_graphs
from fastdp.capture.steps import Captures
from fastdp.engine.step_scope import alone
from fastdp.options import Options
from fastdp.program.torch.capture.replays import CHECKS
from fastdp.program.torch.program import TorchProgram
from fastdp.runtime.queue import QueueDevice


def capture(program: TorchProgram, options: Options, devices: Sequence[QueueDevice]) -> None:
    """Let a program capture its training steps, if the options say so. Called before the engine is made."""
    if options.compile is None:
        return
    graphs = chosen_graphs(options, devices)
    step = program.pure_step(len(devices))
    recorder = Recorder(step.name, alone, parts=graphs == "step") if graphs else None
    program.capture_by(
        Captures(step, options.compile, len(devices), recorder, alone, options.deterministic, checks=CHECKS)
    )


def report_of(program: TorchProgram | None) -> list[dict[str, Any]]:
    """The entries about training steps in a report."""
    if program is None or program.optimizers is None:
        return [{"how": "eager", "why": "no train_step yet, and other calls of a torch.nn.Module are not captured"}]
    if program.captures is None:
        return [{"how": "eager", "why": "compile=None"}]
    return program.captures.report


def is_observed() -> bool:
    """Whether modes or hooks on saved tensors of this thread see the operations of a step: then it runs eagerly."""
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )
