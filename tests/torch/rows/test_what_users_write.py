"""Arguments and outputs of many kinds, as users write them: on 1, 2, 3 and 8 devices against plain torch."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

import fastdp

DEVICES = [1, 2, 3, 8]
ROWS = 9


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


Output = collections.namedtuple("Output", "logits loss hidden")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.double()


class Named(Base):
    def forward(self, x):
        y = self.linear(x)
        return Output(y, y.square().mean(), None)


class Nested(Base):
    def forward(self, x):
        y = self.linear(x)
        return [y, [], {"sums": y.sum(1), "none": None, "text": "linear", "width": 4}]


class Cached(Base):
    """Keys and values of each layer, and earlier ones."""

    def forward(self, x, past=None):
        keys = self.linear(x)
        if past is not None:
            keys = torch.cat([past[0][0], keys], 1)
        return keys.softmax(1), ((keys, keys * 2),)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True).double()

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (h, _) = self.cell(packed)
        return rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], h


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def forward(self, x, attn_mask=None, key_padding_mask=None):
        return self.inner(x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask)


class Translation(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True).double()

    def forward(self, source, target, mask):
        return self.inner(source, target, tgt_mask=mask)


class Measured(Base):
    """A loss, how many are right, and their share."""

    def forward(self, x, y):
        found = self.linear(x)
        right = found.argmax(1) == y
        return F.cross_entropy(found, y), right.sum(), right.double().mean(), torch.tensor(len(x))


class Segments(Base):
    def forward(self, x, y):
        return F.cross_entropy(self.linear(x).transpose(1, 2), y, ignore_index=255)


class Speech(Base):
    def forward(self, x, y, steps, lengths):
        return F.ctc_loss(self.linear(x).log_softmax(2).transpose(0, 1), y, steps, lengths)


class Positions(Base):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 4).double()

    def forward(self, x, positions):
        return self.linear(x + self.embed(positions))


class Divided(Base):
    def forward(self, x, by):
        return self.linear(x) / by


class Several(Base):
    def forward(self, xs):
        return [self.linear(x) for x in xs]


class Batches(Base):
    def forward(self, batch):
        return {"y": self.linear(batch["x"]), "name": batch["name"], "id": batch["id"]}


LENGTHS = torch.tensor([5, 3, 2, 5, 4, 1, 2, 3, 5])
CAUSAL = torch.triu(torch.ones(ROWS, ROWS, dtype=torch.bool), 1)
PADDING = torch.arange(ROWS) >= torch.tensor([9, 8, 7, 6, 5, 9, 9, 3, 9])[:, None]
CASES = {
    "a named tuple with None": (Named, lambda: (numbers(ROWS, 4),)),
    "lists, dicts and texts": (Nested, lambda: (numbers(ROWS, 4),)),
    "no keys and values yet": (Cached, lambda: (numbers(ROWS, 3, 4),)),
    "earlier keys and values": (Cached, lambda: (numbers(ROWS, 3, 4), ((numbers(ROWS, 2, 4, seed=1),) * 2,))),
    "packed sequences": (Packed, lambda: (numbers(ROWS, 5, 4), LENGTHS)),
    "a causal mask and a padding mask of one shape": (Attention, lambda: (numbers(ROWS, ROWS, 4), CAUSAL, PADDING)),
    "a mask for each row and head": (Attention, lambda: (numbers(ROWS, 5, 4), numbers(ROWS * 2, 5, 5))),
    "source and target with a mask": (
        Translation,
        lambda: (numbers(ROWS, 5, 4), numbers(ROWS, ROWS, 4), nn.Transformer.generate_square_subsequent_mask(ROWS)),
    ),
    "losses and counts": (Measured, lambda: (numbers(ROWS, 4), integers(4, ROWS))),
    "a border that is ignored": (Segments, lambda: (numbers(ROWS, 6, 4), integers(4, ROWS, 6))),
    "connectionist temporal classification": (
        Speech,
        lambda: (
            numbers(ROWS, 12, 4),
            1 + integers(3, ROWS, 4),
            torch.full((ROWS,), 12),
            1 + torch.arange(ROWS) % 4,
        ),
    ),
    "positions with one row": (Positions, lambda: (numbers(ROWS, 5, 4), torch.arange(5)[None])),
    "positions without rows": (Positions, lambda: (numbers(ROWS, ROWS, 4), torch.arange(ROWS))),
    "positions for each row": (Positions, lambda: (numbers(ROWS, 5, 4), torch.arange(5).expand(ROWS, 5))),
    "a number": (Divided, lambda: (numbers(ROWS, 4), torch.tensor(2.0))),
    "a number with an axis": (Divided, lambda: (numbers(ROWS, 4), torch.tensor([2.0]))),
    "a number for each feature": (Divided, lambda: (numbers(4, 4), numbers(4, seed=1))),
    "a list of equal lengths": (Several, lambda: ([numbers(ROWS, 4), numbers(ROWS, 4, seed=1)],)),
    "a dict with texts": (Batches, lambda: ({"x": numbers(ROWS, 4), "id": integers(99, ROWS), "name": "train"},)),
}


def loss_of(outputs):
    tensors = [one for one in pytree.tree_leaves(outputs) if isinstance(one, torch.Tensor) and one.requires_grad]
    return sum((one * (1 + torch.arange(one.numel()).reshape(one.shape) % 5)).square().sum() for one in tensors)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_plain_torch(name, devices):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    plain = make()
    module = copy.deepcopy(plain)
    expected = plain(*inputs())
    found = fastdp.wrap(module, gpus=devices)(*inputs())
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
        else:
            assert one == other
    loss_of(found).backward()
    loss_of(expected).backward()
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)
