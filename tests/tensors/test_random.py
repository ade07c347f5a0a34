"""Draws by the row of the global batch: parts of it put together are the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdp.shard import split_rows
from fastdp.tensors.random import own_rows, uniform_rows, uniform_tensor, whole_shape


@pytest.mark.parametrize("shape", [(6,), (6, 5), (12, 3), (6, 2, 9)])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_draw_the_rows_of_the_whole(shape, replicas):
    per_row = shape[0] // 6
    whole = uniform_tensor((3, 4), 0, 6, shape, "cpu")
    parts = [
        uniform_tensor((3, 4), rows.start, rows.count, (rows.count * per_row, *shape[1:]), "cpu")
        for rows in split_rows(6, replicas)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(uniform_tensor((3, 5), 0, 6, shape, "cpu"), whole)


def test_numbers_are_fp32_in_the_unit_interval():
    drawn = uniform_rows((1, 2**70), 10, 1000, 7)
    assert drawn.dtype == np.float32
    assert drawn.shape == (1000, 7)
    assert 0.0 <= drawn.min() < 0.01 < 0.99 < drawn.max() < 1.0
    assert uniform_tensor((1, 2), 0, 0, (0, 4), "cpu").shape == (0, 4)


def test_what_is_drawn_for_the_whole_batch_is_cut_by_rows():
    rows = split_rows(5, 2)
    assert whole_shape((6, 4), 2, rows[0]) == (10, 4)
    drawn = np.arange(10)
    assert own_rows(drawn, 2, rows[0]).tolist() == [0, 1, 2, 3, 4, 5]
    assert own_rows(drawn, 2, rows[1]).tolist() == [6, 7, 8, 9]
    assert own_rows(drawn, 0, rows[1]) is drawn
