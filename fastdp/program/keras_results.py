"""What a replica's step gives to be added up, and how assigned variables are put together from it."""

from __future__ import annotations

from collections.abc import Mapping as MappingOf
from collections.abc import Sequence

import numpy as np
import torch

from fastdp.program.base import Context, Result
from fastdp.program.keras_effects import Effect, NotByRowsError, UndecidedError, values_agree
from fastdp.program.keras_memory import ReplicaState
from fastdp.program.keras_moments import combine
from fastdp.program.keras_outcome import Notes, Outcome
from fastdp.program.keras_trial import Effects
from fastdp.program.torch_tensors import output_array

_EXTREMES = {Effect.LARGEST: torch.amax, Effect.SMALLEST: torch.amin}


def result_of(outcome: Outcome, state: ReplicaState, context: Context, notes: Notes, effects: Effects) -> Result:
    """Outputs as arrays, and the numbers by which terms and assigned variables are put together."""
    notes.normalized = [layer for layer, _ in outcome.moments if not layer.renorm]
    by_moments = {id(v) for layer in notes.normalized for v in (layer.moving_mean, layer.moving_variance)}
    sums = [np.array([float(term) for term in outcome.terms])]
    for i, value in outcome.assigned:
        variable, before = state.mapping[i]
        if id(variable) in by_moments:
            continue
        effect = effects.of_variable(i, variable)
        if effect in (Effect.MEAN, Effect.SUM):
            notes.assigned.append((i, effect))
            moved = value.detach().double() - before.detach().double()
            moved = moved if effect is Effect.SUM else moved * context.rows.share
            sums.append(moved.cpu().numpy().ravel())
        elif effect is not Effect.UNDECIDED or not torch.equal(value, before):
            notes.kept.append((i, effect, value.detach()))
    sums += [moments.sums() for layer, moments in outcome.moments if not layer.renorm]
    return Result([output_array(tensor, context.device) for tensor in outcome.outputs], np.concatenate(sums), notes)


def assign(
    variables: Sequence[torch.Tensor],
    sums: np.ndarray,
    every_note: Sequence[Notes],
    index: MappingOf[int, int],
    effects: Effects,
) -> None:
    """Give assigned variables their values for the global batch.

    Args:
        variables: the tensors that get them.
        sums: over replicas, from the assigned variables on.
        every_note: of all replicas.
        index: the place of a variable in `variables`, by its identity.
        effects: how values depend on the rows.

    Raises:
        UndecidedError: a variable that was tried moved otherwise than in the trial. Nothing has been assigned.
    """
    notes = every_note[0]
    for i, value in _together(every_note, effects):
        variables[i].copy_(value)
    at = 0
    for i, _ in notes.assigned:
        tensor = variables[i]
        moved = torch.from_numpy(sums[at : at + tensor.numel()]).to(tensor.device).reshape(tensor.shape)
        new = tensor.double() + moved
        tensor.copy_(new if tensor.is_floating_point() else new.round())
        at += tensor.numel()
    for layer in notes.normalized:
        targets = [variables[index[id(v)]] for v in (layer.moving_mean, layer.moving_variance)]
        length = 1 + 2 * targets[0].numel()
        for tensor, value in zip(targets, combine(sums[at : at + length]), strict=True):
            # In the variable's own precision, as Keras does it.
            new = torch.from_numpy(value).to(tensor.device, tensor.dtype).reshape(tensor.shape)
            tensor.copy_(tensor * layer.momentum + new * (1.0 - layer.momentum))
        at += length


def _together(every_note: Sequence[Notes], effects: Effects) -> list[tuple[int, torch.Tensor]]:
    """Values that are the same on all replicas, and extremes."""
    if len(every_note) == 1:
        return [(i, value) for i, _, value in every_note[0].kept]
    if len({tuple(i for i, _, _ in note.kept) for note in every_note}) > 1:
        undecided = {i for note in every_note for i, _, _ in note.kept}
        raise _otherwise(effects, min(undecided))
    found = []
    for place, (i, effect, first) in enumerate(every_note[0].kept):
        if effects.is_seed(i):
            found.append((i, first))
            continue
        every = [first, *(note.kept[place][2].to(first.device) for note in every_note[1:])]
        if effect in _EXTREMES:
            found.append((i, _EXTREMES[effect](torch.stack(every), 0)))
            continue
        are_same = all(torch.equal(first, other) or values_agree(other, first) for other in every[1:])
        if not are_same or (effect is Effect.UNDECIDED and not effects.asked_of_every_row):
            raise _otherwise(effects, i)
        found.append((i, first))
    return found


def _otherwise(effects: Effects, i: int) -> NotByRowsError:
    """A variable has moved in another way than the trial has shown."""
    return UndecidedError(
        f"The variable {effects.path(i)} is assigned in the forward pass, and depends on the rows in another way than "
        "on the rows that fastdp has tried. Let its layer compute it from a mean or a sum over rows, pass "
        'rows="replica" to fastdp.wrap to let the devices\' values be averaged, or use gpus=[0].'
    )
