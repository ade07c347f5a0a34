"""Tells kinds of calls of a module apart: by its modes, what lies around the call, and its arguments."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdp.program.torch.batch import Structure
from fastdp.program.torch.nest import HOLE


@dataclass(frozen=True, slots=True)
class CallKind:
    """A kind of call.

    Attributes:
        training: the modes of the module's parts.
        records: gradients are enabled.
        inference: torch's inference mode is on.
        around: autocast.
        arguments: their nest and dtypes; values of booleans and strings, and classes of other values.
    """

    training: tuple[bool, ...]
    records: bool
    inference: bool
    around: Hashable
    arguments: Hashable

    @property
    def label(self) -> str:
        """The kind in words, for the report."""
        modes = "training" if all(self.training) else "evaluation" if not any(self.training) else "mixed"
        return f"{modes}, inference mode" if self.inference else modes


class CallKinds:
    """Finds the kinds of a module's calls."""

    def __init__(self, module: nn.Module) -> None:
        # Parts that are added later are missing: for these each change of the mode makes a new trace.
        # What `torch.compile` has made has the mode of the module in it, which is a part too.
        self._parts = [vars(part) for part in module.modules() if "training" in vars(part)]

    def of(self, structure: Structure) -> CallKind:
        """The kind of a call of these arguments."""
        nest, autocast = structure.nest, structure.autocast
        return CallKind(
            tuple([part["training"] for part in self._parts]),
            torch.is_grad_enabled(),
            structure.inference,
            (autocast.dtypes, autocast.cache),
            (nest.spec, nest.dtypes, tuple(map(_kind_of, nest.leaves))),
        )


def _kind_of(leaf: Any) -> Any:
    if leaf is HOLE or leaf is None or isinstance(leaf, (bool, str)):
        return leaf
    return (leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else type(leaf)
