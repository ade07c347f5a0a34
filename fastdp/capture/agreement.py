"""Compares what a captured step has computed with what the eager step has, on the same rows, draws and variables.

A trace may leave out what no guard sees: a value from a file or an extension that changes, a fault of a compiler. So
the first steps of each captured form run eagerly too (`Captured.checks`), and a form that gives other numbers is not
used.

How much rounding may change depends on the model: where one of 100,000 values passes zero at a ReLU, gradients of a
convolution move by a thousandth. So what exceeds the usual tolerance is compared with how far the captured form's own
results move when its variables do, by much less than that tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# Relative to the norm of a tensor; a fraction `_OF_ALL` of the norm of all tensors is allowed on top of it.
_TOLERANCES = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-3, torch.complex64: 1e-3}
_LOW_PRECISION, _OF_ALL = 5e-2, 1e-2
# Variables are moved by up to so many units of their precision, relatively, so many times. What then moves by more
# than a tenth tells nothing.
_UNITS, _MOVES, _MOST = 256, 3, 0.1

Tensors = Sequence[torch.Tensor | None]


def disagreement(
    found: Tensors,
    expected: Tensors,
    names: Sequence[str],
    *,
    rough: bool = False,
    at: Callable[[int], Tensors] | None = None,
) -> str:
    """The name of a tensor that differs by more than rounding, with the difference; empty if none does.

    Args:
        found, expected: the tensors in the same order; None for what is not there.
        names: theirs.
        rough: they were computed in a lower precision than their own.
        at: computes `found` again from `moved` variables, given its number. Without it the usual tolerance decides.
    """
    pairs = list(zip(found, expected, names, strict=True))
    again: list[Tensors] = []
    norms = [0.0 if one is None else _norm(one) for one in expected]
    total = float(torch.tensor([norm for norm in norms if norm < float("inf")], dtype=torch.float64).norm())
    for i, ((one, other, name), norm) in enumerate(zip(pairs, norms, strict=True)):
        if one is None or other is None:
            if (one is None) != (other is None):
                return f"{name}, which {'eager' if one is None else 'captured'} steps alone compute"
            continue
        if not (other.is_floating_point() or other.is_complex()):
            if not torch.equal(one, other):
                return name
            continue
        one, other = one.to(other.device), other.detach()
        tolerance = _LOW_PRECISION if rough else _TOLERANCES.get(other.dtype, _LOW_PRECISION)
        if torch.equal(one.isfinite(), other.isfinite()):
            difference, size = _norm(torch.where(other.isfinite(), one - other, 0.0)), norm + _OF_ALL * total
            if difference <= tolerance * size + 10 * torch.finfo(other.dtype).eps:
                continue
            if at is not None and difference <= _MOST * size:
                again = again or [at(number) for number in range(_MOVES)]
                if difference <= max(_distance(run[i], found[i]) for run in again):
                    continue
            return f"{name}, by {difference:.1e} of {norm:.1e}"
        return name
    return ""


def moved(variables: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """Copies of the variables, of which fp32 and fp64 ones differ in their last bits; others are the same tensors.

    Args:
        number: of the move. Equal numbers give equal values.
    """
    generator = torch.Generator().manual_seed(number)
    return [_moved(one, generator) if one.dtype in (torch.float32, torch.float64) else one for one in variables]


def _moved(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A copy in which each element is changed by up to `_UNITS` units of its precision."""
    change = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).mul_(2.0).sub_(1.0)
    wide = change.mul_(_UNITS * torch.finfo(tensor.dtype).eps).add_(1.0).to(tensor.device)
    return torch.empty_like(tensor).copy_(wide.mul_(tensor.detach()))


def _distance(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """How far two results of a captured form are apart; zero if one is missing."""
    if one is None or other is None:
        return 0.0
    return _norm(one - other)


def _norm(tensor: torch.Tensor) -> float:
    """The norm of a tensor's finite elements."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return float(torch.where(wide.isfinite(), wide, 0.0).norm())
