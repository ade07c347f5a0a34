"""Replays captured calls of a module that is alone on the host, and compares the first ones with plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdp.capture.agreement import disagreement
from fastdp.capture.graph.ownership import memory_of
from fastdp.comm.context import Context
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.comparing import KeptDraws
from fastdp.program.torch.capture.plain_forward import OwnedCaptured, OwnTensors
from fastdp.program.torch.capture.pure_forward import ForwardForm, ForwardOutcome
from fastdp.program.torch.nest import Nest


class PlainReplays:
    """Runs captured calls of a module on its own tensors."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def replayed(self, captured: OwnedCaptured, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context) -> Any:
        """A captured call; plain torch if what it writes to shares memory with an argument."""
        own, form, leaves = captured.own, captured.form, _tensors(context)
        if (form.buffers.constant or form.written) and _share_memory(leaves, own.variables, form):
            return self._module(*args, **kwargs)
        outcome = captured.replay(own, [], context)
        with torch.no_grad():
            for number, value in zip(form.buffers.constant, outcome.constants, strict=True):
                own.slots[number].tensor.copy_(value)
            for number, value in zip(form.written, outcome.written, strict=True):
                leaves[number].copy_(value)
        return form.nest.pack(outcome.outputs)

    def compared(self, captured: OwnedCaptured, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context) -> Any:
        """An eager call, and what the captured one makes of it. Differences are noted in `captured`."""
        own, structure = captured.own, context.structure
        before = [slot.tensor if slot.is_parameter else slot.tensor.clone() for slot in own.slots]
        given = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in structure.nest.leaves]
        kept = KeptDraws(context)
        outputs = self._module(*args, **kwargs)

        def difference() -> str:
            draws, why = kept.of(captured, before, context)
            if why:
                return why
            nest = replace(structure.nest, leaves=tuple(given))
            apart = replace(context, structure=replace(structure, nest=nest))
            outcome = captured.repeat(before, [], apart, draws)
            return _difference(outcome, outputs, own, _tensors(context), before, _tensors(apart), structure)

        captured.compare(difference)
        return outputs


def _tensors(context: Context) -> list[torch.Tensor]:
    return [leaf for leaf in context.structure.nest.leaves if isinstance(leaf, torch.Tensor)]


def _share_memory(leaves: Sequence[torch.Tensor], variables: Sequence[torch.Tensor], form: ForwardForm) -> bool:
    """Whether what forward writes to shares memory with an argument: a graph takes all tensors for different ones."""
    places = [leaf.untyped_storage()._cdata for leaf in leaves]
    if form.written and len({*places}) < len(places):
        return True
    return any(one.untyped_storage()._cdata in places for one in variables)


def _difference(
    outcome: ForwardOutcome,
    outputs: Any,
    own: OwnTensors,
    arguments: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    given: Sequence[torch.Tensor],
    structure: Structure,
) -> str:
    """What differs between a captured call and an eager one; empty if nothing does.

    Args:
        outcome: of the captured call, on `before` and `given`.
        outputs: of the eager one, which has left `own` and `arguments`.
        structure: of the call.
    """
    rough = structure.autocast.enabled or any(one.dtype.itemsize < 4 for one in before if one.is_floating_point())
    nest, tensors = Nest.flatten(outputs, "The module's outputs")
    form = outcome.form
    if form.nest != nest:
        return "the structure of the outputs"
    if [(one.shape, one.stride()) for one in outcome.outputs] != [(one.shape, one.stride()) for one in tensors]:
        return "the memory layout of the outputs"
    shared = [
        _touched(results, state, rows)
        for results, state, rows in ((outcome.outputs, before, given), (tensors, own.variables, arguments))
    ]
    if shared[0] != shared[1]:
        return "what memory the outputs have"
    found = [*outcome.outputs, *outcome.written, *outcome.constants]
    expected = [*tensors, *(arguments[i] for i in form.written), *(own.slots[i].tensor for i in form.buffers.constant)]
    names = [f"output {i}" for i in range(len(tensors))] + ["an argument"] * len(form.written)
    names += [f"the buffer `{own.slots[i].name}`" for i in form.buffers.constant]
    why = disagreement(found, expected, names, rough=rough)
    others = [i for i, slot in enumerate(own.slots) if not slot.is_parameter and i not in form.buffers.constant]
    return why or disagreement(
        [before[i] for i in others],
        [own.slots[i].tensor for i in others],
        [f"the buffer `{own.slots[i].name}`" for i in others],
    )


def _touched(
    results: Sequence[torch.Tensor], variables: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor]
) -> list[Any]:
    """What has the memory of results: an argument, any variable (they may lie in one flat memory), or a label."""
    found, first = memory_of(results, [*variables, *arguments]), len(variables)
    return [-1 if isinstance(one, int) and one < first else one for one in found]
