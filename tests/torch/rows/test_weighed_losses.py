"""Sums of losses in forward that are means over different entries, as in models of answers and of masked words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdp

SEVERAL = [2, 3, 8]
ROWS, STEPS, WORDS = 9, 6, 11


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Answers(nn.Module):
    """Where an answer begins and ends; beyond the last step there is none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, 2)
        self.double()

    def forward(self, ids, start, end):
        first, last = self.head(self.embed(ids).cumsum(1).tanh()).unbind(-1)
        loss = nn.CrossEntropyLoss(ignore_index=STEPS)
        return (loss(first, start.clamp(0, STEPS)) + loss(last, end.clamp(0, STEPS))) / 2

    @staticmethod
    def data(seed):
        return integers(WORDS, ROWS, STEPS, seed=seed), *(integers(9, ROWS, seed=seed + at) for at in (10, 20))


class Pretraining(nn.Module):
    """Masked words, the next sentence with weights of its classes, and a number for some rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.words, self.next, self.number = (
            nn.Embedding(WORDS, 5),
            nn.Linear(5, WORDS),
            nn.Linear(5, 2),
            nn.Linear(5, 1),
        )
        self.register_buffer("weight", torch.tensor([1.0, 3.0]))
        self.double()

    def forward(self, ids, labels, follows, number):
        hidden = self.embed(ids).cumsum(1).tanh()
        masked = F.cross_entropy(self.words(hidden).flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        has = number > 0
        found = F.mse_loss(self.number(hidden[has, -1]).squeeze(1), number[has])
        return {"loss": masked + F.cross_entropy(self.next(hidden[:, 0]), follows, weight=self.weight) + found}

    @staticmethod
    def data(seed):
        ids = integers(WORDS, ROWS, STEPS, seed=seed)
        number = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        labels = torch.where(integers(3, ROWS, STEPS, seed=seed + 1) > 0, -100, ids)
        return ids, labels, integers(2, ROWS, seed=seed + 2), number


class Recomputed(Answers):
    def forward(self, *args):
        return checkpoint(super().forward, *args, use_reentrant=False)


def run(cls, devices, how):
    module, losses = cls(), []
    model = module if devices == 0 else fastdp.wrap(module, gpus=devices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    loss_of = lambda out: out["loss"] if isinstance(out, dict) else out  # noqa: E731
    step = model.train_step(loss_of, optimizer) if devices and how == "step" else None
    for seed in range(4):
        if step is not None:
            losses.append(torch.tensor(float(step(cls.data(seed))), dtype=torch.float64))
            continue
        optimizer.zero_grad()
        loss = loss_of(model(*cls.data(seed)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        losses.append(loss_of(model(*cls.data(7))))
    return [*losses, *(parameter.detach() for parameter in module.parameters())]


@pytest.mark.parametrize("how", ["loop", "step"])
@pytest.mark.parametrize("devices", SEVERAL)
@pytest.mark.parametrize("cls", [Answers, Pretraining, Recomputed])
def test_sums_of_means_over_different_entries_are_those_of_plain_torch(cls, devices, how):
    torch.testing.assert_close(run(cls, devices, how), run(cls, 0, how))


class Perplexity(Answers):
    def forward(self, *args):
        return super().forward(*args).exp()


def test_what_is_no_sum_of_such_means_is_refused():
    with pytest.raises(ValueError, match="cannot be merged"):
        fastdp.wrap(Perplexity(), gpus=3)(*Answers.data(0))


class Tasks(nn.Module):
    """Two losses with learned weights, the first one over labels that the first rows do not have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.number = nn.Linear(4, 3).double(), nn.Linear(4, 1).double()
        self.uncertain = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x, labels):
        found = F.cross_entropy(self.classes(x), labels, ignore_index=-100)
        other = F.mse_loss(self.number(x).squeeze(1), x[:, 0])
        return found, other, (-self.uncertain).exp() @ torch.stack([found, other]) + self.uncertain.sum()


@pytest.mark.parametrize("devices", SEVERAL)
def test_rows_without_labels_do_not_hide_the_gradients_of_the_others(devices):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.cat([torch.full((5,), -100), integers(3, 7)])
    plain, module = Tasks(), Tasks()
    model = fastdp.wrap(module, gpus=devices)
    for _ in range(2):
        found, expected = model(x, labels), plain(x, labels)
        torch.testing.assert_close(found, expected)
        found[2].backward()
        expected[2].backward()
    torch.testing.assert_close([one.grad for one in module.parameters()], [one.grad for one in plain.parameters()])
