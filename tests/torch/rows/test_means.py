"""Means in which rows do not count alike, as in losses over tokens: on 1, 2, 3 and 8 devices against plain torch."""

from __future__ import annotations

import copy
import queue

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.program.torch.rows.weights import usual_numbers

DEVICES = [1, 2, 3, 8]
SEVERAL = [2, 3, 8]
ROWS, STEPS, WORDS = 9, 6, 11


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Words(nn.Module):
    """Embeds words and predicts words."""

    pad = 0

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, WORDS)
        self.double()

    def logits(self, ids):
        return self.head(self.embed(ids).cumsum(1).tanh())


class Causal(Words):
    """The next word's loss inside, as language models of Hugging Face compute it."""

    def forward(self, ids, labels=None):
        logits = self.logits(ids)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, WORDS), labels[:, 1:].reshape(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


class Padded(Words):
    """A loss over words that are no padding, told by the module's own number for it."""

    def forward(self, ids, labels):
        losses = F.cross_entropy(self.logits(ids).transpose(1, 2), labels, reduction="none")
        counts = labels != self.pad
        return {"loss": (losses * counts).sum() / counts.sum()}


class Masked(Words):
    """A loss over what a mask leaves, never divided by zero."""

    def forward(self, ids, labels, mask):
        losses = F.cross_entropy(self.logits(ids).transpose(1, 2), labels, reduction="none")
        return {"loss": (losses * mask).sum() / mask.sum().clamp(min=1)}


class Ranked(Words):
    """A loss over the first words of each row, as many as its length."""

    def forward(self, ids, labels, lengths):
        losses = F.cross_entropy(self.logits(ids).transpose(1, 2), labels, reduction="none")
        inside = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"loss": losses[inside].mean()}


class PerRow(nn.Module):
    """A mean over the rows that have a target: the others' is NaN."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1).double()

    def forward(self, x, y):
        there = ~torch.isnan(y)
        return {"loss": F.mse_loss(self.linear(x)[there, 0], y[there])}


def rows_that_count(*counts):
    """A mask of (ROWS, STEPS) with so many entries in each row."""
    return torch.arange(STEPS) < torch.tensor(counts)[:, None]


FULL = rows_that_count(*[STEPS] * ROWS)
UNEQUAL = rows_that_count(6, 1, 5, 2, 6, 3, 1, 4, 2)
EMPTY = rows_that_count(6, 4, 5, 1, 3, 0, 0, 0, 0)  # some devices have only padding
NOTHING = rows_that_count(*[0] * ROWS)
IDS, LABELS = integers(WORDS, ROWS, STEPS), 1 + integers(WORDS - 1, ROWS, STEPS, seed=1)


class Valid(PerRow):
    """A mean over the rows that a mask of numbers leaves, never divided by zero."""

    def forward(self, x, valid):
        return {"loss": (self.linear(x)[:, 0].square() * valid).sum() / valid.sum().clamp(min=1)}


CASES = {
    "a number for each row": (
        Valid,
        lambda mask: {"x": numbers(ROWS, 4), "valid": (mask.sum(1) > 3).double()},
    ),
    "ignored labels": (Causal, lambda mask: {"ids": IDS, "labels": LABELS.masked_fill(~mask, -100)}),
    "a number for padding": (Padded, lambda mask: {"ids": IDS, "labels": LABELS.masked_fill(~mask, 0)}),
    "a mask of booleans": (Masked, lambda mask: {"ids": IDS, "labels": LABELS, "mask": mask}),
    "a mask of integers": (Masked, lambda mask: {"ids": IDS, "labels": LABELS, "mask": mask.long()}),
    "a mask of numbers": (Masked, lambda mask: {"ids": IDS, "labels": LABELS, "mask": mask.double()}),
    "lengths": (Ranked, lambda mask: {"ids": IDS, "labels": LABELS, "lengths": mask.sum(1)}),
    "targets that are NaN": (
        PerRow,
        lambda mask: {"x": numbers(ROWS, 4), "y": numbers(ROWS, seed=1).masked_fill(mask.sum(1) < 3, float("nan"))},
    ),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loss_of(outputs):
    return outputs["loss"] + sum(value.square().mean() for name, value in outputs.items() if name != "loss")


@pytest.mark.parametrize("first", ["full", "unequal"])
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_train_steps_are_those_of_plain_torch(name, devices, first):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    module = make()
    plain = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(loss_of, sgd)
    optimizer = sgd(plain.parameters())
    for mask in (FULL if first == "full" else UNEQUAL, EMPTY, FULL, UNEQUAL):
        optimizer.zero_grad()
        expected = loss_of(plain(**inputs(mask)))
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(inputs(mask)), expected.detach(), rtol=1e-11, atol=1e-11)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_that_of_plain_torch(name, devices):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    module = make()
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices)
    for mask in (FULL, EMPTY, UNEQUAL, NOTHING):
        outputs, expected = model(**inputs(mask)), plain(**inputs(mask))
        torch.testing.assert_close(outputs, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
        if mask is not NOTHING:
            outputs["loss"].backward()
            expected["loss"].backward()
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-11)


class Counted(Causal):
    """Notes its calls."""

    calls = queue.SimpleQueue()  # no list: forward must not change what all devices share

    def forward(self, ids, labels=None):
        self.calls.put(len(ids))
        return super().forward(ids, labels)


def test_one_trial_is_enough_for_other_lengths():
    model, calls = fastdp.wrap(Counted(), gpus=2), []
    for steps in (6, 5, 4, 5):
        model(IDS[:, :steps], LABELS[:, :steps])
        calls.append(Counted.calls.qsize() - sum(calls))
    assert calls[0] > 20
    assert calls[1:] == [5, 5, 2]


@pytest.mark.parametrize("devices", DEVICES)
def test_other_lengths_are_known_from_the_first_ones(devices):
    module = Causal()
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices)
    for steps in (6, 5, 4):
        for mask in (FULL, EMPTY):
            inputs = {"ids": IDS[:, :steps], "labels": LABELS.masked_fill(~mask, -100)[:, :steps]}
            torch.testing.assert_close(model(**inputs), plain(**inputs), rtol=1e-11, atol=1e-11)


class Weighed(Words):
    """A mean whose weights are no number of entries of one array."""

    def forward(self, ids, labels, mask):
        losses = F.cross_entropy(self.logits(ids).transpose(1, 2), labels, reduction="none")
        weights = (labels != 3) * (1.0 + mask.double())
        return {"loss": (losses * weights).sum() / weights.sum()}


def weights_of(labels, mask):
    return (labels != 3) * (1.0 + mask.double())


@pytest.mark.parametrize("devices", DEVICES)
def test_a_mean_is_over_what_the_user_says(devices):
    module = Weighed()
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices, rows={"output['loss']": fastdp.mean_over(weights_of)})
    for mask in (FULL, EMPTY):
        inputs = {"ids": IDS, "labels": LABELS, "mask": mask}
        found, expected = model(**inputs), plain(**inputs)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        found["loss"].backward()
        expected["loss"].backward()
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("devices", SEVERAL)
def test_a_mean_that_is_no_count_is_an_error_with_the_remedy(devices):
    model = fastdp.wrap(Weighed(), gpus=devices)
    for mask in (FULL, UNEQUAL):
        with pytest.raises(ValueError, match=r"output\['loss'\].*mean_over"):
            model(IDS, LABELS.clamp(min=4), mask)


@pytest.mark.parametrize("devices", SEVERAL)
def test_a_moving_mean_over_what_counts_is_refused(devices):
    class Moving(Words):
        def __init__(self):
            super().__init__()
            self.register_buffer("moving", torch.zeros(5, dtype=torch.float64))

        def forward(self, ids, mask):
            values = self.embed(ids)
            self.moving.lerp_((values.detach() * mask[..., None]).sum((0, 1)) / mask.sum(), 0.1)
            return values

    with pytest.raises(ValueError, match=r"buffer `moving`.*all_reduce"):
        fastdp.wrap(Moving(), gpus=devices)(IDS, FULL.double())


def test_what_cannot_be_meant_is_an_error():
    with pytest.raises(TypeError, match="`weights` must be a function"):
        fastdp.mean_over("labels")
    with pytest.raises(ValueError, match=r"by \['musk'\]"):
        fastdp.wrap(Masked(), gpus=2, rows={"output": fastdp.mean_over(lambda musk: musk)})
    with pytest.raises(ValueError, match="must map 'mask'"):
        fastdp.wrap(Masked(), gpus=2, rows={"mask": fastdp.mean_over(lambda mask: mask)})
    model = fastdp.wrap(Masked(), gpus=2, rows={"output['loss']": fastdp.mean_over(lambda mask: mask.sum(0))})
    with pytest.raises(ValueError, match="rows first"):
        model(IDS, LABELS, FULL)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_each_devices_own_rows_is_refused(reduction):
    step = fastdp.wrap(Masked(), gpus=2).train_step(lambda out: out["loss"], sgd, reduction=reduction)
    with pytest.raises(ValueError, match=r"Use reduction=None|Leave `reduction` out"):
        step({"ids": IDS, "labels": LABELS, "mask": FULL})


class Begins(Words):
    """A language model as it begins: its loss is nearly the same for all words, and in single precision."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, WORDS, bias=False).double()
        with torch.no_grad():
            self.head.weight.mul_(0.02)

    def forward(self, ids, labels):
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(self.logits(ids).float().flatten(0, 1), shifted.flatten(), ignore_index=-100)


@pytest.mark.parametrize("devices", [2, 3])
def test_a_loss_that_is_nearly_the_same_for_all_words_shows_which_ones_count(devices):
    module = Begins()
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices)
    for rows in (6, 5):
        ids = 1 + integers(WORDS - 1, rows, STEPS)
        labels = ids.masked_fill(torch.arange(STEPS) >= 3 + torch.arange(rows)[:, None], -100)
        for one in (model, plain):
            one(ids, labels).backward()
    torch.testing.assert_close(module.head.weight.grad, plain.head.weight.grad, rtol=1e-5, atol=1e-7)


def test_numbers_that_stand_in_an_array_are_tried_before_others_that_are_compared():
    labels = torch.tensor([[3, -100, 2], [1, 4, -100]])
    found = usual_numbers(labels, [40.0, 16.0, 24.0, 48.0, 56.0, 64.0, -100.0, 0.5])
    assert found.index(-100) < found.index(16)
