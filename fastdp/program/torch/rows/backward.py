"""Runs backward on some rows, on others and on all of them, and checks that the gradients add up.

They do where each row's gradient depends on that row alone. A hook on a tensor or on a part of the module, or a
backward of an autograd.Function, may combine rows: `g / g.norm()`. On several devices it would see one device's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.program.torch.rows.declared import output_roles
from fastdp.program.torch.rows.draws import CannotSplitError
from fastdp.program.torch.rows.inputs import choices_of
from fastdp.program.torch.rows.judge import FAILURES, NOISE
from fastdp.program.torch.rows.judged import Judged
from fastdp.program.torch.rows.merging import own_gradient
from fastdp.program.torch.rows.trial import Differentiated, Trial
from fastdp.program.torch.rows.weights import agreed
from fastdp.shard import Rows
from fastdp.tensors import pytree
from fastdp.tensors.marks import MeanOver
from fastdp.tensors.row_effects import Effect, Layout

_SIZES = (1e-2, 1e3)  # of the gradients that backward begins with: a hook may clip large ones only
_MOST = 3  # choices of rows, of which the first may be without labels


def check_backward(
    module: nn.Module, batch: Batch, judged: Judged, rows: tuple[int, int], wanted: Sequence[int]
) -> None:
    """Check that gradients of a few rows of a batch add up.

    Args:
        module, batch, wanted: as in `Trial`.
        judged: what trials have found.
        rows: the numbers of rows of a trial's parts.

    The module runs in double precision if it can, where differences cannot be rounding. One that does not run, or that
    calls collectives, is left to the step.

    Raises:
        CannotSplitError: gradients do not add up.
    """
    if judged.outputs is None:
        return
    for is_wide in (True, False):
        try:
            for chosen in choices_of(batch.rows, sum(rows))[:_MOST]:
                if _Gradients(module, batch, judged, rows, wanted, chosen, is_wide=is_wide).check():
                    break
        except CannotSplitError:
            raise
        except (*FAILURES, NotImplementedError):
            continue
        return


class _Gradients:
    """Backward passes of one trial on chosen rows. Other arguments as of `check_backward`."""

    def __init__(
        self,
        module: nn.Module,
        batch: Batch,
        judged: Judged,
        rows: tuple[int, int],
        wanted: Sequence[int],
        chosen: Sequence[int],
        *,
        is_wide: bool,
    ) -> None:
        self._trial = Trial(module, batch, chosen, wanted, noise=NOISE, is_wide=is_wide, weighs=judged.weighs)
        self._structure, self._judged, self._rows = batch.structure, judged, rows
        self._is_wide = is_wide
        self._seeds: list[torch.Tensor] = []
        self._layouts: list[Layout | None] = []
        self._is_number = True

    def check(self) -> bool:
        """Run forward and backward on all rows and on the parts, and compare. False if all rows give no numbers.

        Raises:
            CannotSplitError: the gradients of the parts do not add up.
        """
        first, total = self._rows[0], sum(self._rows)
        every = [
            self._trial.differentiate(start, stop, self._roots, _SIZES)
            for start, stop in ((0, total), (0, first), (first, total))
        ]
        if not self._trial.meets:
            if not self._is_number:
                return False  # a mean over labels of which all are ignored
            for whole, *parts in zip(*every, strict=True):
                self._compare(whole, parts)
        return True

    def _compare(self, whole: Differentiated, parts: Sequence[Differentiated]) -> None:
        """Compare the gradients of backward passes that began with gradients of one size."""
        largest = max((float(one.abs().max()) for one in whole.parameters.values() if one.numel()), default=0.0)
        for name, expected in whole.parameters.items():
            found = [part.parameters[name] for part in parts if name in part.parameters]
            if not found or not self._is_near(sum(found[1:], found[0]), expected, found, largest):
                raise _refused(f"the parameter `{name}`")
        given = zip(whole.inputs, *(part.inputs for part in parts), strict=True)
        for at, (expected, *found) in zip(self._trial.wanted, given, strict=True):
            layouts = self._structure.layouts
            axis = layouts[at].axis if layouts else 0
            if expected is None or any(one is None for one in found):
                continue
            if not self._is_near(torch.cat(found, axis or 0), expected, found, largest):
                raise _refused("an argument")

    def _roots(self, outputs: Any, rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Outputs of a run, with the gradients that backward begins with."""
        tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        if rows.count == rows.total:
            self._is_number = not any(bool(one.isnan().any()) for one in tensors)
            self._begin(outputs, tensors)
        roots = []
        for tensor, layout, seed in zip(tensors, self._layouts, self._seeds, strict=True):
            if layout is not None and tensor.requires_grad:
                own = own_gradient(seed, tensor.detach(), layout, rows) if rows.count != rows.total else seed
                if own is not None:
                    roots.append((tensor, own))
        return roots

    def _begin(self, outputs: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Choose the gradients by the outputs for all rows."""
        assert self._judged.outputs is not None
        generator = torch.Generator().manual_seed(4)
        roles = output_roles(outputs, self._structure.declared)
        pairs = zip(self._judged.outputs, roles, strict=True)
        self._layouts = [self._layout(found if said is None else said) for found, (_, said) in pairs]
        self._seeds = [torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one) for one in tensors]

    def _layout(self, layout: Layout) -> Layout | None:
        """A layout with what the rows of the trial count; None where a trial cannot tell."""
        if layout.effect in (Effect.LARGEST, Effect.SMALLEST, Effect.UNKNOWN) or isinstance(layout.weights, MeanOver):
            return None
        if isinstance(layout.weights, tuple):
            return replace(layout, weights=agreed(self._trial.inputs.arrays, layout.weights))
        return layout

    def _is_near(
        self, found: torch.Tensor, expected: torch.Tensor, parts: Sequence[torch.Tensor], largest: float
    ) -> bool:
        """Whether gradients agree. Those that are zero but for rounding are compared with the `largest` one."""
        if found.shape != expected.shape or not bool(torch.isfinite(expected).all()):
            return found.shape == expected.shape
        found, expected = found.to(expected.device), expected.detach()
        difference = (found - expected).abs()
        own = max(float(one.abs().max()) if one.numel() else 0.0 for one in (*parts, expected))
        if self._is_wide and not self._trial.is_coarse:
            return bool((difference <= 1e-8 * own + 1e-12 * largest).all())
        # Rounding may switch a unit on or off, so that single numbers differ.
        coarse = expected.dtype.itemsize < 4
        most, least = (0.3, 1e-2) if coarse else (0.03, 1e-5)
        size = max(float(one.norm()) for one in (*parts, expected))
        return float(difference.norm()) <= most * size + least * largest * expected.numel() ** 0.5


def _refused(name: str) -> CannotSplitError:
    return CannotSplitError(
        f"The gradients of {name} for some rows and for others do not add up to those for all rows: in backward "
        "something combines rows, as g / g.norm() or g - g.mean(0) do. It may be a hook on a tensor (register_hook) or "
        "on a part of the module, or the backward of an autograd.Function. Let it treat each row by itself, combine "
        "what it takes over rows by fastdp.replica.all_reduce, or change the gradients of parameters after backward; "
        "or use gpus=[0]."
    )
