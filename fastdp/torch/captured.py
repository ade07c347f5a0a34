"""The captured steps of a `TrainStep`, and captured calls: how options choose them, and what the report tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdp.capture.cuda_graphs.recorder import Recorder, chosen_graphs
from fastdp.capture.joint import CapturedJoint
from fastdp.capture.kinds import CapturesByKind
from fastdp.capture.resumed import ResumedCaptures
from fastdp.capture.steps import Captures
from fastdp.capture.trace import Captured
from fastdp.comm.processes import SEVERAL, several
from fastdp.engine.step_scope import alone_for
from fastdp.options import Options
from fastdp.program.torch.capture.call_kinds import CallKind
from fastdp.program.torch.capture.joint_captures import JointCaptures
from fastdp.program.torch.capture.pure_forward import ForwardOutcome
from fastdp.program.torch.capture.replays import CHECKS
from fastdp.program.torch.loop import LoopProgram
from fastdp.program.torch.program import TorchProgram
from fastdp.runtime.queue import QueueDevice


def capture(program: TorchProgram, options: Options, devices: Sequence[QueueDevice]) -> None:
    """Let a program capture its training steps, if the options say so. Called before the engine is made."""
    if options.compile is None or several():
        program.why_eager = "compile=None" if options.compile is None else SEVERAL
        return
    graphs = chosen_graphs(options, devices)
    step = program.pure_step(len(devices))
    recorder = Recorder(step.name, alone_for(options, records=True), parts=graphs == "step") if graphs else None
    program.capture_by(
        ResumedCaptures(
            step,
            options.compile,
            len(devices),
            recorder,
            alone_for(options),
            options.deterministic,
            checks=CHECKS,
            shape_name=step.shape_name,
        )
    )


def capture_forwards(
    program: LoopProgram, options: Options, devices: Sequence[QueueDevice]
) -> CapturesByKind[Captured[ForwardOutcome]] | None:
    """The captured forward passes without gradients of a program's calls; None if the options say so."""
    if options.compile is None or several():
        return None
    mode, parts = options.compile, len(devices)
    name, within = type(program.module).__name__, alone_for(options, records=True)
    recorder = Recorder(name, within) if chosen_graphs(options, devices) else None

    def make(kind: CallKind) -> Captures[Captured[ForwardOutcome]]:
        step = program.pure_forward(parts, records=kind.records)
        return Captures(step, mode, parts, recorder, alone_for(options), options.deterministic, checks=CHECKS)

    return CapturesByKind(make)


def capture_loops(
    program: LoopProgram, options: Options, devices: Sequence[QueueDevice]
) -> CapturesByKind[CapturedJoint] | None:
    """The captured passes with gradients of a program's calls; None if there are none."""
    if options.compile is None or devices[0].on_gpu or several():
        return None
    mode, parts = options.compile, len(devices)

    def make(kind: CallKind) -> Captures[CapturedJoint]:
        joint, within = program.pure_joint(parts), alone_for(options)
        return JointCaptures(joint, mode, parts, within, deterministic=options.deterministic)

    return CapturesByKind(make)


def is_observed() -> bool:
    """Whether modes or hooks on saved tensors of this thread see the operations of a step: then it runs eagerly."""
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )
