"""Replicas that take different paths through a module stop at once, with an error that names both places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdp


class Paths(nn.Module):
    """Each replica takes one of two paths, by the values of its rows. A trial refuses it unless rows are declared."""

    def __init__(self, ways):
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)) for _ in range(2))
        self.listed = [nn.BatchNorm1d(3, affine=False, track_running_stats=False) for _ in range(2)]
        self.last = nn.Linear(3, 1)
        self.ways = ways

    def forward(self, x):
        return self.last(self.ways[int(x.sum() > 0)](self, x))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows above zero for the first of two replicas, two below for the other."""
    x = torch.tensor([1.0, 2.0, -1.0, -2.0])[:, None] + 0.1 * torch.randn(4, 3)
    return x.double(), torch.zeros(4, 1, dtype=torch.float64)


def left(module, x):
    return module.left(x)


WAYS = {
    "two layers of the same shape": ((left, lambda m, x: m.right(x)), ("left.0", "right.0")),
    "layers in a plain list": ((lambda m, x: m.listed[0](x), lambda m, x: m.listed[1](x)), ("listed[0]", "listed[1]")),
    "none on one of them": ((left, lambda m, x: x), ("left.0", "the loss of the merged outputs")),
    "again on one of them": ((left, lambda m, x: m.left(m.left(x))), ("left.0",)),
}


@pytest.mark.parametrize("case", WAYS)
def test_paths_that_part_at_a_synchronized_normalization_stop_the_step_and_name_both_places(case):
    ways, places = WAYS[case]
    module = Paths(ways).double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    step = fastdp.wrap(module, gpus=2, sync_batch_norm=True, rows={"x": 0, "output": 0}).train_step(
        lambda y, target: (y - target).square().mean(), lambda p: torch.optim.SGD(p, lr=0.1)
    )
    with pytest.raises(fastdp.ReplicaError, match="different paths") as raised:
        step(*batch())
    for named in ("virtual:0 at", "virtual:1 at", *places):
        assert named in str(raised.value)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_replica_that_ends_its_forward_pass_leaves_none_waiting():
    module = Paths((left, lambda m, x: x)).double()
    parallel = fastdp.wrap(module, gpus=2, sync_batch_norm=True, rows={"x": 0, "output": 0})
    with pytest.raises(fastdp.ReplicaError, match=r"virtual:[01] at .*left\.0.*virtual:[01] past the end"):
        parallel(batch()[0])
    assert parallel(-batch()[0].abs()).shape == (4, 1)  # the next call works
