"""What counts as rounding between a captured form and eager steps, and what does not."""

from __future__ import annotations

import pytest
import torch

from fastdp.capture.agreement import disagreement, moved


def test_what_moves_with_the_last_bits_may_differ_by_so_much() -> None:
    variables = [torch.full((1000,), 1.0)]

    def run(variables: list[torch.Tensor]) -> list[torch.Tensor]:
        return [10.0 + (variables[0] > 1.0).float()]

    expected = [10.0 + torch.cat([torch.ones(300), torch.zeros(700)])]
    found = run(variables)
    assert disagreement(found, expected, ["it"]).startswith("it, by")
    assert disagreement(found, expected, ["it"], at=lambda number: run(moved(variables, number))) == ""


@pytest.mark.parametrize("shift", [3e-3, 0.5])
def test_what_does_not_move_may_not_differ(shift: float) -> None:
    variables = [torch.linspace(1.0, 2.0, 1000)]

    def run(variables: list[torch.Tensor]) -> list[torch.Tensor]:
        return [variables[0].square()]

    expected = [one * (1.0 + shift) for one in run(variables)]
    runs: list[int] = []

    def at(number: int) -> list[torch.Tensor]:
        runs.append(number)
        return run(moved(variables, number))

    assert disagreement(run(variables), expected, ["it"], at=at).startswith("it, by")
    assert runs == ([0, 1, 2] if shift < 0.1 else [])


def test_moved_variables_keep_layout_and_leave_the_generator_alone() -> None:
    variables = [torch.randn(4, 3).T, torch.arange(3), torch.ones(2, dtype=torch.bfloat16), torch.randn(2).double()]
    before = torch.get_rng_state()
    first, again, other = moved(variables, 0), moved(variables, 0), moved(variables, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].stride() == variables[0].stride()
    assert first[1] is variables[1]
    assert first[2] is variables[2]
    for one, two, bound in ((first[0], variables[0], 4e-5), (first[3], variables[3], 1e-13)):
        assert not torch.equal(one, two)
        torch.testing.assert_close(one, two, rtol=bound, atol=0.0)
