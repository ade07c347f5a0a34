"""Outputs that were the same for all rows in all trials, and are not in a step: what they are is asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fastdp.program.torch.following.merged import equal
from fastdp.program.torch.rows.judged import Candidates, Judged, decided, is_exact
from fastdp.program.torch.rows.refusals import refused_output
from fastdp.tensors.row_effects import ROWS_FIRST, Effect, Layout

_SEEN = "the same values for all rows, which in this step differ"


Left = Mapping[int, Candidates]


def no_longer_same(left: Left, every: Sequence[Mapping[int, torch.Tensor]]) -> list[int]:
    """The numbers of the open outputs that differ between replicas, or are no longer zero.

    Args:
        left: what they may be.
        every: the outputs of each replica, by number; those that are open at least.
    """
    found = []
    for at, possible in left.items():
        parts = [one[at] for one in every]
        may_add = Effect.SUM in possible  # a zero is a sum as well
        if not all(equal(parts[0], part) for part in parts[1:]) or (may_add and bool(parts[0].any())):
            found.append(at)
    return found


def check_same(left: Left, every: Sequence[Mapping[int, torch.Tensor]]) -> None:
    """Check in a train step that open outputs are the same for all rows. Arguments as of `no_longer_same`.

    Raises:
        NotByRowsError: one is not.
    """
    for at in no_longer_same(left, every):
        raise refused_output(f"output {at}", _SEEN)


def layouts_in_step(
    judged: Judged | None,
    layouts: Sequence[Layout],
    others: Sequence[Sequence[torch.Tensor]],
    wants: Sequence[bool],
    look: Callable[[Sequence[int]], Mapping[int, Candidates]],
) -> list[Layout]:
    """The layouts of the outputs of a pass, with those of open outputs that are no longer the same for all rows.

    Args:
        judged: what trials have found; it is changed.
        layouts: of the outputs, as far as trials have told.
        others: of each replica, the outputs that have their rows not first.
        wants: which outputs require gradients.
        look: says what outputs of these numbers may be, by all rows of the batch and those of each device.

    Raises:
        NotByRowsError: the runs do not tell what an output is, or it is an extreme and requires gradients.
    """
    found = list(layouts)
    if judged is None or not judged.open or judged.outputs is None:
        return found
    places = [at for at, one in enumerate(layouts) if one != ROWS_FIRST]
    every = [dict(zip(places, tensors, strict=True)) for tensors in others]
    numbers = no_longer_same(judged.open, every)
    left = look(numbers) if numbers else {}
    for at in numbers:
        possible = judged.open[at] & left[at]
        effect = decided(possible, exact=is_exact(every[0][at]))
        if effect in (None, Effect.UNKNOWN) or (effect in (Effect.LARGEST, Effect.SMALLEST) and wants[at]):
            raise refused_output(f"output {at}", _SEEN)
        assert effect is not None
        found[at] = judged.outputs[at] = Layout(effect)
        judged.open.pop(at)
    return found
