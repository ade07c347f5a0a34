"""What replicas move a tensor by is added up in float64, and moves it."""

from __future__ import annotations

import pytest
import torch

from fastdp.tensors.sums import like, move, movement, weighted_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_mean_over_replicas_moves_the_tensor(dtype):
    before = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    moved = sum(movement(before + step, before, weight) for step, weight in ((1.0, 0.25), (3.0, 0.75)))
    assert moved.dtype == "float64"
    move(before, moved)
    assert before.tolist() == [[3.5, 4.5], [5.5, 6.5]]


def test_whole_numbers_are_rounded():
    count = torch.tensor([5])
    move(count, movement(torch.tensor([8]), count, 1 / 3) + movement(torch.tensor([8]), count, 2 / 3) - 1e-9)
    assert count.tolist() == [8]


def test_numbers_look_like_another_tensor_and_scalars_are_weighted():
    numbers = like(movement(torch.ones(2, 3), torch.zeros(2, 3), 2.0), torch.empty(3, 2, dtype=torch.float16))
    assert numbers.dtype == torch.float16
    assert numbers.tolist() == [[2.0, 2.0]] * 3
    assert weighted_sum([torch.tensor(2.0), torch.tensor(4.0)], [0.25, 0.75]) == 3.5
