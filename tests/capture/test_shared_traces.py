"""tests/shared/shared_traces.py: a trace is shared by steps that compute the same, and by no others."""

from __future__ import annotations

import pytest
import torch
from shared_traces import operations_of, share_traces

from fastdp.capture import trace

ARGUMENTS = [torch.ones(2, 3), torch.ones(3, 2)]


def step(rate=0.5, table=(1.0, 2.0), *, swapped=False, extra=False):
    """A function with a constant of its own, whose gradient is computed inside."""
    constant = torch.tensor(table)

    def compute(x, w):
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            y = torch.tanh(x @ w) * constant
            loss = (y * rate).sum() + (y.sum() if extra else 0.0)
            (gradient,) = torch.autograd.grad(loss, w)
        return [loss.detach(), gradient] if swapped else [gradient, loss.detach()]

    return compute


@pytest.mark.parametrize("other", [step(0.25), step(table=(1.0, 3.0)), step(swapped=True), step(extra=True)])
def test_another_step_has_another_key(other):
    assert operations_of(step(), ARGUMENTS) == operations_of(step(), [2.0 * one for one in ARGUMENTS])
    assert operations_of(other, ARGUMENTS) != operations_of(step(), ARGUMENTS)


def test_other_shapes_types_and_layouts_have_another_key():
    x, w = ARGUMENTS
    others = [[torch.ones(4, 3), w], [x.double(), w.double()], [torch.ones(3, 2).T, w]]
    assert len({operations_of(lambda x, w: [x @ w], given) for given in [ARGUMENTS, *others]}) == 4


def test_operands_are_told_apart_by_what_they_hold():
    square = [torch.ones(2, 2), torch.ones(2, 2)]
    functions = [lambda a, b: [a @ b], lambda a, b: [b @ a], lambda a, b: [a @ a], lambda a, b: [a.T @ b]]
    assert len({operations_of(function, square) for function in functions}) == 4


def test_a_shared_trace_computes_the_same_and_a_change_of_it_stays_with_its_owner(monkeypatch):
    traced = []
    original = trace._traced
    monkeypatch.setattr(trace, "_traced", lambda *given: traced.append(1) or original(*given))
    share_traces(monkeypatch)
    first, second = (trace.graph_of(step(0.125), ARGUMENTS) for _ in range(2))
    assert len(traced) == 1
    first.graph.output_node().args = ([],)
    first.recompile()
    for found, expected in zip(second(*ARGUMENTS), step(0.125)(*ARGUMENTS), strict=True):
        assert torch.equal(found, expected)
