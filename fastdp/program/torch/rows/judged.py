"""Judges from runs of a module on some rows, on the others and on all of them how its values depend on the rows.

A value without rows may agree with several effects: a zero is a sum and a mean. So each trial leaves candidates, and
further trials leave fewer. Floating-point values that are the same in all trials count as means, which they also are:
a mean of masks that happen to be full is merged rightly once they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastdp.program.torch.activations import Inner
from fastdp.program.torch.following.merged import Roles
from fastdp.program.torch.rows.weights import Counted
from fastdp.program.torch.shared_draws import DrawPlaces
from fastdp.tensors.marks import MeanOver
from fastdp.tensors.row_effects import Effect, Layout

Candidates = frozenset[Effect | Counted | MeanOver]
Weights = Mapping[Counted | MeanOver, Sequence[float]]
_ALL = frozenset({Effect.SAME, Effect.MEAN, Effect.SUM, Effect.LARGEST, Effect.SMALLEST})


@dataclass(slots=True)
class Judged:
    """How a module's outputs and buffers depend on the rows.

    Attributes:
        outputs: the layouts of its outputs; None if they are not judged.
        states: how the buffers that forward changes depend on the rows, by their numbers among the module's tensors.
        draws: where the rows are in the random draws of forward, by number.
        written: the arrays that forward changes in place, by their numbers.
        roles: how what forward writes to attributes and containers depends on the rows.
        inner: which outputs are computed from others, once a step has shown it.
        watched: whether somebody wanted a gradient by such an output.
        replaced: the buffers in whose place forward puts other tensors, by their numbers.
        weighs: losses in forward are weighed by what counts in the whole batch (`weighed_losses`).
        open: what outputs may be that were the same for all rows in all trials, by their numbers.
    """

    outputs: list[Layout] | None = None
    states: dict[int, Effect] = field(default_factory=dict)
    draws: DrawPlaces = field(default_factory=DrawPlaces)
    written: frozenset[int] = frozenset()
    roles: Roles = field(default_factory=dict)
    inner: Inner | None = None
    watched: bool = False
    replaced: frozenset[int] = frozenset()
    weighs: bool = False
    open: dict[int, Candidates] = field(default_factory=dict)

    def is_like(self, other: Judged) -> bool:
        """Whether steps do the same with other lengths."""
        mine, others = ([(one.effect, one.axis) for one in judged.outputs or ()] for judged in (self, other))
        mine_of = (self.states, self.draws, self.written, self.replaced, self.weighs)
        same = mine_of == (other.states, other.draws, other.written, other.replaced, other.weighs)
        return same and mine == others and (self.outputs is None) == (other.outputs is None)

    @property
    def weighed(self) -> list[tuple[Counted, ...]]:
        """How rows count in the means in which trials have seen that they do not count alike."""
        return [one.weights for one in self.outputs or () if isinstance(one.weights, tuple)]

    @property
    def extremes(self) -> bool:
        """Whether an output is an extreme of all rows, which the replicas must find together."""
        return any(one.effect in (Effect.LARGEST, Effect.SMALLEST) for one in self.outputs or ())


def is_exact(tensor: torch.Tensor) -> bool:
    """Whether a tensor has integers or booleans, which have no rounding errors."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def row_axis_of(parts: Sequence[torch.Tensor], whole: torch.Tensor, rows: Sequence[int]) -> Layout | None:
    """Where the rows are in a value whose shape depends on them; None if its shapes do not tell.

    Args:
        parts, whole: the value for the parts of the rows, and for all of them.
        rows: the number of rows of each part.
    """
    if any(part.ndim != whole.ndim or part.dtype != whole.dtype for part in parts):
        return None
    axes = [at for at, size in enumerate(whole.shape) if any(part.shape[at] != size for part in parts)]
    if len(axes) != 1:
        return None
    axis, total = axes[0], sum(rows)
    per_row = whole.shape[axis] // total
    if [*(part.shape[axis] for part in parts), whole.shape[axis]] != [per_row * one for one in (*rows, total)]:
        return None
    return Layout(Effect.ROWS, axis, per_row, True)


def row_layout(parts: Sequence[torch.Tensor], whole: torch.Tensor, rows: Sequence[int], *, rough: bool) -> Layout:
    """The layout of a value whose shape depends on the rows: ROWS, or UNKNOWN.

    Args:
        parts, whole, rows: as in `row_axis_of`.
        rough: it was computed in a lower precision than its own.
    """
    layout = row_axis_of(parts, whole, rows)
    if layout is None or layout.axis is None:
        return Layout(Effect.UNKNOWN)
    found = torch.cat(list(parts), layout.axis)
    return layout if is_near(found, whole, rough=rough) else Layout(Effect.UNKNOWN)


def candidates(
    parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    rows: Sequence[int],
    *,
    rough: bool,
    weights: Weights | None = None,
    among: Candidates | None = None,
) -> Candidates:
    """The effects that a value without rows may have, judged by its values.

    Args:
        parts, whole, rows, rough: as in `row_layout`.
        weights: ways to weigh rows in a mean, each with the weights of the parts.
        among: the effects to look for, other than by weights; None for all.
    """
    weights, among = weights or {}, _ALL if among is None else among
    if not whole.numel():
        return frozenset({Effect.SAME})
    if not among and not weights:
        return frozenset()
    if not is_exact(whole) and not bool(torch.isfinite(whole).all()):
        return _ALL.union(weights)  # the whole batch gives no number either
    wide, target, exact = [_wide(one) for one in parts], _wide(whole), is_exact(whole)
    scale = 0.0 if exact else _tolerance(whole, rough=rough) * max(map(_largest, (*wide, target)))

    def close(found: torch.Tensor) -> bool:
        return torch.equal(found, target) if exact else bool(((found - target).abs() <= scale).all())

    def is_mean(weights: Sequence[float]) -> bool:
        weighted = [value * weight for value, weight in zip(wide, weights, strict=True) if weight]
        return close(sum(weighted[1:], weighted[0]) / sum(weights))

    found: set[Effect | Counted | MeanOver] = set()
    if Effect.SAME in among and all(close(one) for one in wide):
        found.add(Effect.SAME)
    if Effect.MEAN in among and not exact and is_mean(rows):
        found.add(Effect.MEAN)
    found.update(way for way, weight in weights.items() if not exact and is_mean(weight if sum(weight) else rows))
    if Effect.SUM in among and whole.dtype != torch.bool and close(sum(wide[1:], wide[0])):
        found.add(Effect.SUM)
    if Effect.LARGEST in among and not whole.is_complex() and close(torch.stack(wide).amax(0)):
        found.add(Effect.LARGEST)
    if Effect.SMALLEST in among and not whole.is_complex() and close(torch.stack(wide).amin(0)):
        found.add(Effect.SMALLEST)
    return frozenset(found)


def _largest(tensor: torch.Tensor) -> float:
    """The magnitude of the largest finite element; zero if there is none."""
    return float(tensor.abs().nan_to_num_(0.0, 0.0, 0.0).amax())


def agrees(
    parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    layout: Layout,
    rows: Sequence[int],
    *,
    rough: bool,
    weights: Sequence[float] = (),
) -> bool:
    """Whether a value may have this layout. `weights` are the parts' in a mean; arguments as in `row_layout`."""
    if layout.effect is Effect.ROWS:
        found = row_layout(parts, whole, rows, rough=rough)
        return (found.effect, found.axis) == (layout.effect, layout.axis)
    if any(part.shape != whole.shape for part in parts):
        return False
    way = layout.effect if layout.weights is None else layout.weights
    return way in candidates(parts, whole, rows, rough=rough, weights={layout.weights: weights} if weights else {})


def state_candidates(
    parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    before: torch.Tensor,
    rows: Sequence[int],
    *,
    rough: bool,
    among: Candidates | None = None,
) -> Candidates | None:
    """The effects that the new value of a buffer may have; None if no run has changed it.

    SUM and MEAN are of its changes, LARGEST and SMALLEST of its values. Arguments as in `candidates`.
    """
    values, among = [*parts, whole], _ALL if among is None else among
    if all(torch.equal(value, before) for value in values):
        return None
    if before.dtype == torch.bool:
        return candidates(parts, whole, rows, rough=rough, among=among)
    changes = [_wide(value) - _wide(before) for value in values]
    if not all(bool(torch.isfinite(one).all()) for one in changes):
        return candidates(parts, whole, rows, rough=rough, among=among - {Effect.MEAN, Effect.SUM})
    # Changes of single-precision values have few digits of their own.
    few_digits = not is_exact(before) and _tolerance(before, rough=rough) > 1e-9
    kept = {Effect.SAME, Effect.SUM} if is_exact(before) else {Effect.SAME, Effect.MEAN, Effect.SUM}
    by_change = candidates(changes[:-1], changes[-1], rows, rough=few_digits, among=among & kept)
    extremes = among & {Effect.LARGEST, Effect.SMALLEST}
    return (by_change & kept) | (candidates(parts, whole, rows, rough=rough, among=extremes) & extremes)


def decided(found: Candidates, *, exact: bool) -> Effect | None:
    """The effect among candidates; None if more trials must tell. `exact` is of integers and booleans.

    A mean whose rows do not count alike is a mean too.
    """
    if not found:
        return Effect.UNKNOWN
    effects = [one for one in found if isinstance(one, Effect)]
    if Effect.SAME in effects and Effect.SUM not in effects:
        return Effect.SAME if exact or Effect.MEAN not in effects else Effect.MEAN
    if not effects:
        return Effect.MEAN
    return effects[0] if len(effects) == 1 else None


def layout_of(effect: Effect, found: Candidates) -> Layout:
    """The layout of a value with this effect, decided among candidates."""
    if effect is not Effect.MEAN or Effect.MEAN in found or Effect.SAME in found:
        return Layout(effect)
    return Layout(effect, weights=tuple(one for one in found if isinstance(one, Counted)))


def _tolerance(tensor: torch.Tensor, *, rough: bool) -> float:
    """The relative tolerance for a tensor."""
    if rough or (tensor.is_floating_point() and tensor.dtype.itemsize < 4):
        return 2e-2
    return 1e-9 if tensor.dtype in (torch.float64, torch.complex128) else 2e-4


def is_near(found: torch.Tensor, expected: torch.Tensor, *, rough: bool, most: float = 0.0) -> bool:
    """Whether tensors of equal shape agree up to rounding. Integers must be equal, unless they may come of rounding.

    `most` is the part of their entries that may differ.
    """
    if is_exact(expected):
        return rough or torch.equal(found, expected) or bool((found != expected).double().mean() <= most)
    tolerance = 5 * _tolerance(expected, rough=rough)
    found, expected = _wide(found), _wide(expected)
    finite = expected[torch.isfinite(expected)].abs()
    atol = tolerance * (float(finite.max()) if finite.numel() else 0.0)
    near = torch.isclose(found, expected, rtol=0.0, atol=atol, equal_nan=True)
    return bool(near.all()) or bool((~near).double().mean() <= most)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in double precision."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
