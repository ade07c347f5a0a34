"""Tries a module that has run before: what it keeps may begin as a zero, and a state by rows may be read."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from fastdp.program.torch.following.merged import equal
from fastdp.program.torch.following.writes import Place, put
from fastdp.program.torch.rows.findings import Findings
from fastdp.program.torch.rows.judged import is_near
from fastdp.program.torch.rows.refusals import refused_in_place, refused_reading
from fastdp.program.torch.rows.trial import Run, Trial
from fastdp.tensors import pytree
from fastdp.tensors.row_effects import Layout


def look_later(first: Trial, findings: Findings, rows: Sequence[int], failures: tuple[type[Exception], ...]) -> None:
    """Judge a second pass, which begins with what a first one has left.

    Args:
        first: a trial on rows as they are.
        findings: what trials have shown, of which less may be left afterwards.
        rows: the numbers of rows of the parts.
        failures: what a module may raise that does not run a second time, which its next call will say.

    Raises:
        ValueError: something that it keeps cannot be merged.
    """
    total, cut = sum(rows), rows[0]
    parts = ((0, cut), (cut, total))
    try:
        ran = first.run(0, total)
        second = first.after(ran)
        whole = second.run(0, total)
        shared = [second.run(*part) for part in parts]
    except failures:
        return
    _check_in_place(second.names_of(ran), [*shared, whole])
    findings.see_later(second, shared, whole)
    kept = findings.kept_by_rows(ran)
    if not kept:
        return
    try:
        own = [_with_own_rows(first, second, kept, *part) for part in parts]
    except failures:
        return
    if not all(alike(one, other) for one, other in zip(own, shared, strict=True)):
        raise refused_reading(dict.fromkeys(place.name for place, _ in kept))


def _check_in_place(names: Container[str], runs: Sequence[Run]) -> None:
    """Refuse a tensor that a first pass has put somewhere and a second one changes in place, by its rows.

    Args:
        names: of the tensors that the first pass has put somewhere.
        runs: of the second pass, on parts of the rows and on all of them.
    """
    for place in runs[-1].written:
        if place.kind == "tensor" and place.holder in names:
            values = [run.written[place].leaves[0] for run in runs if place in run.written]
            if len(values) < len(runs) or not all(equal(value, values[-1]) for value in values):
                raise refused_in_place(place.name)


def _with_own_rows(first: Trial, second: Trial, kept: dict[tuple[Place, int], Layout], start: int, stop: int) -> Run:
    """The second pass on some rows, by a replica that keeps its own rows of what the first one has left."""
    ran = first.run(0, second.rows)
    for place in dict.fromkeys(place for place, _ in kept):
        written = ran.written[place]
        leaves = list(written.leaves)
        for number, leaf in enumerate(leaves):
            layout = kept.get((place, number))
            if layout is not None and layout.axis is not None:
                leaves[number] = leaf.detach().narrow(
                    layout.axis, start * layout.per_row, (stop - start) * layout.per_row
                )
        put(ran.guard, place, pytree.tree_unflatten(leaves, written.spec), written)
    return first.after(ran, drawn=second).run(start, stop)


def alike(run: Run, other: Run) -> bool:
    """Whether two runs have given the same."""
    leaves, others = pytree.tree_leaves(run.outputs), pytree.tree_leaves(other.outputs)
    if len(leaves) != len(others):
        return False
    pairs = zip(leaves, others, strict=True)
    tensors = [(a.detach(), b.detach()) for a, b in pairs if isinstance(a, torch.Tensor)]
    return all(a.shape == b.shape and is_near(a, b, rough=False) for a, b in tensors)
