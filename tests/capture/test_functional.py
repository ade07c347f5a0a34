"""Graphs with operations in place become graphs without, with the same bits and without a second trace."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastdp.capture import trace
from fastdp.capture.graph.functional import without_writes
from fastdp.capture.graph.passes import writes

X, Y = torch.arange(1.0, 7.0).reshape(2, 3), torch.full((2, 3), 0.5)


def chain(x, y):
    value = x * y
    kept = value.detach()
    value.rsqrt_().mul_(y)
    first = value + 1  # reads what is there by now
    kept.add_(first)  # the same memory
    return [value.t() * 2, first, kept]


def alias(x, y):
    value = x * y
    kept = torch.ops.aten.alias(value)
    value.rsqrt_()
    return [kept.mul_(y), value + 1]


def view_after(x, y):
    value = x + y
    value.relu_().sub_(y, alpha=2)
    return [value.view(6)[1:], value.sum(0)]


def parts(x, y):
    value, place = torch.max(x, 1)
    value.add_(y[:, 0])
    return [value, place]


def copied(x, y):
    value = torch.zeros_like(x)
    value.copy_(y[0])
    value.fill_(2.0).mul_(x)
    return [value]


def view_between(x, y):
    value = x * y
    row = value[0]
    value.add_(1)
    return [row * 2, value]


def write_to_view(x, y):
    value = x * y
    value[0].add_(1)
    return [value]


def rounds(x, y):
    value = (x * y).to(torch.int64)
    value.div_(2, rounding_mode="floor")
    return [value]


def grows(x, y):
    value = torch.ones(2, 3, dtype=torch.int32)
    value.mul_(2).add_(x.to(torch.int64))  # the sum would be int64
    return [value * y]


def traced(function):
    return make_fx(function, tracing_mode="fake")(X, Y)


@pytest.mark.parametrize("function", [chain, alias, view_after, parts, copied, rounds])
def test_writes_become_new_values_with_the_same_bits(function):
    module = traced(function)
    assert writes(module.graph)
    assert without_writes(module)
    assert not writes(module.graph)
    for mine, expected in zip(module(X.clone(), Y.clone()), function(X.clone(), Y.clone()), strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("function", [view_between, write_to_view, grows])
def test_what_cannot_be_rewritten_stays_as_it_was_and_is_traced_again(function):
    module = traced(function)
    before = str(module.graph)
    assert not without_writes(module)
    assert str(module.graph) == before
    again = trace.graph_of(function, [X, Y])
    assert not writes(again.graph)
    for mine, expected in zip(again(X, Y), function(X, Y), strict=True):
        assert torch.equal(mine, expected)


def test_a_step_with_writes_is_traced_once(monkeypatch):
    calls = []
    once = trace._traced
    monkeypatch.setattr(trace, "_traced", lambda *given: calls.append(1) or once(*given))
    trace.graph_of(chain, [X, Y])
    assert len(calls) == 1
