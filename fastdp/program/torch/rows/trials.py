"""Tries a module on a few rows before its first step of a kind, and judges what several devices will merge."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.rows.judge import Judge
from fastdp.program.torch.rows.judged import Candidates, Judged
from fastdp.program.torch.rows.plain import keeps_rows_apart
from fastdp.tensors.threads import intra_op_threads


class Trials:
    """Tries a module before its first step of each kind.

    Args:
        module: the user's own.

    A kind is the training mode of all parts, the structure of the batch with the shapes of its rows, autocast, and
    whether gradients are recorded. A trial runs copies of the module on a few rows, on the others and on all of them.
    The user's hooks do not run in it. What a module gets by `fastdp.replica` is in each part what all rows gave, and a
    module that calls it is trusted: where the trial cannot tell, outputs have rows first, or are means.

    A module that consists of torch's own parts that keep rows apart is not tried.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parts = list(module.modules())
        self._known: dict[Any, Judged | None] = {}
        self._means: dict[Any, dict[int, Candidates]] = {}

    def judged(self, batch: Batch, devices: int, *, wants: bool = False) -> Judged | None:
        """What is known about the module's outputs and buffers; None if rows come first and nothing else is assigned.

        Args:
            batch: the global batch, of two or more rows.
            devices: the number of devices, two or more.
            wants: whether gradients by arrays that require them are wanted.

        Raises:
            ValueError: the module cannot be split by rows exactly, as far as the trial can tell.
        """
        fewest = 2 if batch.rows // min(devices, batch.rows) >= 2 and batch.rows >= 5 else 1
        rows = (fewest, fewest + 1) if batch.rows >= 2 * fewest + 1 else (1, batch.rows - 1)
        kind = self._kind(batch, rows)
        if kind not in self._known:
            if keeps_rows_apart(self._module):
                found = None
            else:
                family = self._family(kind, batch)
                wanted = batch.structure.wanted() if wants else ()
                judge = Judge(self._module, batch, rows, wanted, self._means.get(family))
                with intra_op_threads(max(1, torch.get_num_threads() // devices)):
                    runs = contextvars.copy_context().run(judge.look)
                if not runs:
                    return None  # the step itself says why the module does not run; a later one is tried
                found = judge.judged()
                self._means[family] = judge.means
            self._known[kind] = found
        return self._known[kind]

    def _kind(self, batch: Batch, rows: tuple[int, int]) -> Any:
        """What the trial's result depends on."""
        structure: Structure = batch.structure
        nest, autocast = structure.nest, structure.autocast
        leaves = tuple([(one.shape, one.dtype) if isinstance(one, torch.Tensor) else one for one in nest.leaves])
        modes = tuple([part.training for part in self._parts])
        how = (torch.is_grad_enabled(), autocast.dtypes, rows)
        return modes, how, str(nest.spec), leaves, nest.dtypes, batch.shapes, tuple(structure.layouts)

    @staticmethod
    def _family(kind: Any, batch: Batch) -> Any:
        """What kinds have in common that differ in lengths only."""
        modes, how, spec, leaves, dtypes, shapes, layouts = kind
        others = tuple([(len(one[0]), one[1]) if isinstance(one, tuple) else one for one in leaves])
        return modes, how[:-1], spec, others, dtypes, tuple([len(shape) for shape, _ in shapes]), layouts
