"""Compares what a captured step has computed with what the eager step has, on the same rows, draws and variables.

A trace may leave out what no guard sees: a value from a file or an extension that changes, a fault of a compiler. So
the first steps of each captured form run eagerly too (`Captured.checks`), and a form that gives other numbers is not
used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Relative to the norm of a tensor; a fraction `_OF_ALL` of the norm of all tensors is allowed on top of it.
_TOLERANCES = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-3, torch.complex64: 1e-3}
_LOW_PRECISION, _OF_ALL = 5e-2, 1e-2


def disagreement(
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    names: Sequence[str],
    *,
    rough: bool = False,
) -> str:
    """The name of a tensor that differs by more than rounding, with the difference; empty if none does.

    Args:
        found, expected: the tensors in the same order; None for what is not there.
        names: theirs.
        rough: they were computed in a lower precision than their own.
    """
    pairs = list(zip(found, expected, names, strict=True))
    norms = [0.0 if one is None else _norm(one) for one in expected]
    total = float(torch.tensor([norm for norm in norms if norm < float("inf")], dtype=torch.float64).norm())
    for (one, other, name), norm in zip(pairs, norms, strict=True):
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
            difference = _norm(torch.where(other.isfinite(), one - other, 0.0))
            if difference <= tolerance * (norm + _OF_ALL * total) + 10 * torch.finfo(other.dtype).eps:
                continue
            return f"{name}, by {difference:.1e} of {norm:.1e}"
        return name
    return ""


def _norm(tensor: torch.Tensor) -> float:
    """The norm of a tensor's finite elements."""
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return float(torch.where(wide.isfinite(), wide, 0.0).norm())
