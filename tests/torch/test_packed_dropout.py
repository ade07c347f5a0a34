"""Dropout between recurrent layers on packed sequences: each entry has the mask of one device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

import fastdp

LENGTHS = torch.tensor([3, 6, 2, 5, 5, 1, 4, 6, 3])


class Net(nn.Module):
    def __init__(self, cell=nn.LSTM, sorts=True, checkpoints=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.cell = cell(4, 3, 3, batch_first=True, dropout=0.4, **options).double()
        self.out = nn.Linear(3 * (2 if self.cell.bidirectional else 1), 2).double()
        self.sorts, self.checkpoints = sorts, checkpoints

    def forward(self, x, lengths):
        x = F.dropout(x, 0.1)
        run = lambda x: self.last(x, lengths)  # noqa: E731
        return self.out(checkpoint(run, x, use_reentrant=False) if self.checkpoints else run(x))

    def last(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=not self.sorts)
        y, _ = self.cell(packed)
        return F.dropout(rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0].sum(1), 0.2)


CASES = {
    "lstm": {},
    "gru, both ways": {"cell": nn.GRU, "bidirectional": True},
    "rnn": {"cell": nn.RNN},
    "rows in order": {"sorts": False},
    "run again in backward": {"checkpoints": True},
}


def trained(case, devices, how):
    module = Net(**CASES[case])
    lengths = LENGTHS if module.sorts else LENGTHS.sort(descending=True).values
    x, y = torch.randn(2, 9, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.ones(9, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    model = fastdp.wrap(module, gpus=devices) if devices else module
    step = model.train_step(F.mse_loss, optimizer) if how == "step" and devices else None
    torch.manual_seed(2)
    for one in x:
        if step:
            step((one, lengths), y.double())
            continue
        optimizer.zero_grad()
        F.mse_loss(model(one, lengths), y.double()).backward()
        optimizer.step()
    return [*copy.deepcopy(list(module.parameters())), torch.get_rng_state().double()]


@pytest.mark.parametrize("how", ["loop", "step"])
@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_one_device(case, how):
    expected = trained(case, 0, how)
    for devices in (2, 3, 8) if case == "lstm" else (3,):
        torch.testing.assert_close(trained(case, devices, how), expected, rtol=1e-10, atol=1e-12)
