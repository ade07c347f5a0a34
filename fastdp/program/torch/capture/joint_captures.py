"""The captured passes of a torch module's loop, and which outputs its backward passes begin from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from fastdp.capture.joint import CapturedJoint
from fastdp.capture.steps import Captures
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.pure_joint import TorchPureJoint
from fastdp.program.torch.capture.replays import CHECKS

# Backward passes that begin from other outputs than those before: in these forward runs twice.
MOST_SURPRISES = 3


class JointCaptures(Captures[CapturedJoint]):
    """As `Captures`, of forward passes and their backward passes.

    Args:
        joint: the passes.
        mode, parts, alone, deterministic: as of `Captures`.
    """

    def __init__(
        self,
        joint: TorchPureJoint,
        mode: str,
        parts: int,
        alone: Callable[[], AbstractContextManager[None]],
        *,
        deterministic: bool,
    ) -> None:
        super().__init__(joint, mode, parts, None, alone, deterministic, CHECKS, CapturedJoint)
        self._joint, self._surprises = joint, 0

    def note_used(self, structure: Structure, used: Sequence[bool]) -> None:
        """Note that a backward pass began from other outputs of a call than those before."""
        self._joint.note_used(structure, tuple(used))
        self._surprises += 1
        if self._surprises > MOST_SURPRISES:
            self.refuse("backward passes that begin from other outputs each time")

    def check_generation(self, generation: int) -> None:
        """Check that forward may run again as it ran in this generation.

        Raises:
            RuntimeError: what it reads has changed since.
        """
        changed = self._guard.changed_values() if generation == self.generation else "something that forward reads"
        if changed:
            raise RuntimeError(
                f"{changed} has changed between forward and backward, and this backward pass runs forward again, since "
                "it begins from other outputs than those before, or is differentiated. Run backward first, or pass "
                "compile=None."
            )
