"""How a tensor depends on rows, told from its values for parts of some rows and for all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastdp.tensors.row_effects import Effect, Layout, classify, layout_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
ROWS = (1, 2)


def of(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = X) -> Layout:
    return layout_of((function(x[:1]), function(x[1:])), function(x), ROWS)


BY_ROWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, int]] = {
    "rows": (torch.tanh, 0, 1),
    "columns": (lambda x: x.T, 1, 1),
    "time first": (lambda x: x.reshape(-1, 2, 2).transpose(0, 1), 1, 1),
    "two for each row": (lambda x: torch.stack([x, -x], 1).flatten(0, 1), 0, 2),
    "a number for each row": (lambda x: x.sum(1), 0, 1),
    "whole numbers": (lambda x: x.argsort(1), 0, 1),
    "truths": (lambda x: x > 0, 0, 1),
    "an axis of one": (lambda x: x[:, None], 0, 1),
    "an axis of two before": (lambda x: torch.stack([x, x]), 1, 1),
    "numbers that are none": (lambda x: torch.log(x - 10), 0, 1),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_are_found_along_any_axis(name: str) -> None:
    function, axis, per_row = BY_ROWS[name]
    assert of(function) == Layout(Effect.ROWS, axis, per_row, True)


MIXED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "less the mean": (lambda x: x - x.mean(0), True),
    "a small part of the mean": (lambda x: x + 0.01 * x.mean(0), True),
    "tiny numbers": (lambda x: 1e-4 * x.softmax(0), True),
    "whole numbers": (lambda x: x.argsort(0), True),
    "truths": (lambda x: x > x.mean(0), True),
    "rows behind each other": (lambda x: torch.cat([x, x]), True),
    "one for each pair": (lambda x: x @ x.T, False),
    "as many as pairs": (lambda x: (x @ x.T).flatten(), False),
    "no row of one": (torch.squeeze, False),
}


@pytest.mark.parametrize("name", MIXED)
def test_values_and_shapes_that_mix_rows_are_found(name: str) -> None:
    function, stacks = MIXED[name]
    found = of(function, X[:, :1] if name == "no row of one" else X)
    assert (found.effect, found.stacks) == (Effect.UNKNOWN, stacks)


def test_the_first_axis_of_the_rows_is_told_where_pairs_have_two() -> None:
    assert of(lambda x: x @ x.T).axis == 0
    assert of(lambda x: x.T @ x) == Layout(Effect.SUM)


WITHOUT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Effect]] = {
    "mean": (lambda x: x.mean(0), Effect.MEAN),
    "sum": (lambda x: x.sum(0), Effect.SUM),
    "the same": (lambda x: torch.ones(3), Effect.SAME),
    "zero": (lambda x: torch.zeros(3), Effect.SAME),
    "largest": (lambda x: x.amax(0), Effect.LARGEST),
    "smallest": (lambda x: x.amin(0), Effect.SMALLEST),
    "root": (lambda x: x.square().mean().sqrt(), Effect.UNKNOWN),
    "median": (lambda x: x.quantile(0.5, 0), Effect.UNKNOWN),
    "deviation": (lambda x: x.std(0, correction=0), Effect.UNKNOWN),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_values_without_rows_are_told_apart(name: str) -> None:
    function, effect = WITHOUT[name]
    assert of(function).effect is effect


def test_zero_is_undecided_for_what_may_move_later() -> None:
    zero = torch.zeros(2)
    assert classify((zero, zero), zero) is Effect.UNDECIDED


def test_other_numbers_of_axes_or_other_kinds_are_unknown() -> None:
    assert layout_of((X[0], X[1:]), X, ROWS) == Layout(Effect.UNKNOWN)
    assert layout_of((X[:1].double(), X[1:]), X, ROWS) == Layout(Effect.UNKNOWN)


def test_outputs_of_two_rows_are_compared_by_all_their_axes() -> None:
    a, b = X[:1], X[1:2]
    assert layout_of((a, b), X[:2], (1, 1)).effect is not Effect.UNKNOWN
    assert layout_of((a @ a.T, b @ b.T), X[:2] @ X[:2].T, (1, 1)).effect is Effect.UNKNOWN
