"""Merging the replicas' tensors by their layouts, and the parts of a gradient: against the whole tensor."""

from __future__ import annotations

import pytest
import torch

from fastdp.program.torch.rows.merging import merge, misfit, own_gradient
from fastdp.shard import split_rows
from fastdp.tensors.row_effects import Effect, Layout

X = torch.randn(11, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

CASES = {
    "rows first": (Layout(Effect.ROWS, 0, 1, True), lambda x: x * 2.0),
    "two entries per row": (Layout(Effect.ROWS, 0, 2, True), lambda x: x.permute(0, 2, 1).reshape(-1, 3)),
    "rows along the second axis": (Layout(Effect.ROWS, 1, 1, True), lambda x: x.transpose(0, 1)),
    "a mean": (Layout(Effect.MEAN), lambda x: (x * x).mean()),
    "a mean with axes": (Layout(Effect.MEAN), lambda x: x.mean((0, 2))),
    "a sum": (Layout(Effect.SUM), lambda x: (x * x).sum()),
    "a sum with axes": (Layout(Effect.SUM), lambda x: x.sum((0, 2))),
    "the same": (Layout(Effect.SAME), lambda x: x.new_ones(3) * 4.0),
    "the largest": (Layout(Effect.LARGEST), lambda x: x.amax(0)),
    "the smallest": (Layout(Effect.SMALLEST), lambda x: x.amin(0)),
}


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_merged_parts_are_the_whole(case, devices):
    layout, function = CASES[case]
    rows = split_rows(len(X), devices)
    parts = [function(X[one.start : one.stop]) for one in rows]
    torch.testing.assert_close(merge(parts, layout, rows), function(X), rtol=0, atol=1e-12)
    assert all(misfit(part, layout, one) is None for part, one in zip(parts, rows, strict=True))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("the same", "the largest", "the smallest")])
def test_the_parts_of_a_gradient_give_the_gradient_of_the_whole(case, devices):
    layout, function = CASES[case]
    x = X.clone().requires_grad_()
    whole = function(x)
    seed = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole.backward(seed)
    own = X.clone().requires_grad_()
    for rows in split_rows(len(X), devices):
        part = function(own[rows.start : rows.stop])
        part.backward(own_gradient(seed, part, layout, rows))
    torch.testing.assert_close(own.grad, x.grad, rtol=0, atol=1e-12)


def test_counts_stay_whole_numbers():
    rows = split_rows(5, 2)
    merged = merge([torch.tensor(4), torch.tensor(9)], Layout(Effect.MEAN), rows)
    assert merged.dtype == torch.int64
    assert merged == 6


def test_a_shape_that_does_not_fit_the_rows_is_told():
    rows = split_rows(5, 2)[0]
    assert "axis 0" in (misfit(torch.zeros(4, 2), Layout(Effect.ROWS, 0, 1, True), rows) or "")
