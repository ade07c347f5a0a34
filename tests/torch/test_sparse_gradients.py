"""Sparse gradients of embeddings: the rows and values of one device, in loops and in train steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.buffers import FlatBuffers

DEVICES = [1, 2, 3, 8]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
WORDS = 40


class Table(nn.Module):
    """Few of the words occur in a batch, so an optimizer that moves the others is seen."""

    def __init__(self, kind=nn.Embedding, **options) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = kind(WORDS, 4, padding_idx=1, sparse=True, **options).double()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        found = self.embedding(words)
        return self.linear(found.mean(1) if found.ndim == 3 else found)


class Twice(Table):
    """The table is used in two places."""

    def forward(self, words):
        return super().forward(words) + self.embedding(words[:, 0])


class Tied(Table):
    """The table is the last layer too: its gradient is dense."""

    def forward(self, words):
        return F.linear(super().forward(words), self.embedding.weight)[:, :4]


class Choosing(Table):
    """Rows of words below 20 use the table as a dense matrix: some devices find a sparse gradient, others a dense."""

    def forward(self, words):
        if bool((words < 20).all()):
            found = F.one_hot(words, WORDS).double() @ self.embedding.weight
            return self.linear(found.mean(1))
        return super().forward(words)


MODELS = {
    "embedding": Table,
    "bag": lambda: Table(nn.EmbeddingBag, mode="sum"),
    "mean bag": lambda: Table(nn.EmbeddingBag, mode="mean"),
    "two uses": Twice,
    "tied": Tied,
}


def data(seed: int, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (rows, 2), generator=generator)
    return words, torch.randn(rows, 4, generator=generator, dtype=torch.float64)


def split(sparse):
    """An optimizer for the table, and SGD for the other parameters."""

    def made(parameters):
        table, *others = parameters
        return [sparse([table], lr=0.3), torch.optim.SGD(others, lr=0.1, momentum=0.9)]

    return made


def step_plainly(module, optimizers, seeds, *, rows=9, clip=None) -> torch.Tensor:
    for optimizer in optimizers:
        optimizer.zero_grad()
    for seed in seeds:
        words, y = data(seed, rows)
        loss = F.mse_loss(module(words), y)
        (loss / len(seeds)).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(list(module.parameters())[1:], clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.layout == expected.layout
    if found.is_sparse:
        found, expected = found.coalesce(), expected.coalesce()
        assert torch.equal(found.indices(), expected.indices())
        found, expected = found.values(), expected.values()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def assert_same_modules(module: nn.Module, reference: nn.Module) -> None:
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("devices", "small"), [*((n, False) for n in DEVICES), (3, True)])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_a_loop_are_sparse_with_the_rows_of_one_device(model, devices, small, monkeypatch):
    if small:  # so that buckets are reduced during backward
        monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 64))
    module, reference = MODELS[model](), MODELS[model]()
    parallel = fastdp.wrap(module, gpus=devices)
    for seed in range(4):
        for one in (parallel, reference):
            if seed % 2 == 0:  # else the gradient is added to the one before
                one.zero_grad()
            words, y = data(seed)
            F.mse_loss(one(words), y).backward()
        for found, expected in zip(module.parameters(), reference.parameters(), strict=True):
            assert_same(found.grad, expected.grad)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD, torch.optim.Adagrad])
def test_a_loop_trains_as_on_one_device(optimizer, devices):
    module, reference = Table(), Table()
    parallel = fastdp.wrap(module, gpus=devices)
    ours, theirs = (split(optimizer)(one.parameters()) for one in (parallel, reference))
    for seed in range(5):
        torch.testing.assert_close(
            step_plainly(parallel, ours, [seed], clip=0.2), step_plainly(reference, theirs, [seed], clip=0.2)
        )
    assert_same_modules(module, reference)


@pytest.mark.parametrize(
    ("optimizer", "accumulate"),
    [(torch.optim.SparseAdam, 1), (torch.optim.SparseAdam, 2), (torch.optim.SGD, 2), (torch.optim.Adagrad, 1)],
)
@pytest.mark.parametrize("devices", DEVICES)
def test_train_steps_are_those_of_one_device(optimizer, devices, accumulate):
    module, reference = Table(), Table()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, split(optimizer), accumulate=accumulate)
    theirs = split(optimizer)(reference.parameters())
    for seed in range(0, 6, accumulate):
        rows = (9, 1, 2)[seed % 3]
        losses = [step(*data(seed + i, rows)) for i in range(accumulate)]
        expected = step_plainly(reference, theirs, [seed + i for i in range(accumulate)], rows=rows)
        torch.testing.assert_close(losses[-1], expected)
    assert_same_modules(module, reference)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_each_kind_of_table_trains_in_train_steps(model, devices):
    module, reference = MODELS[model](), MODELS[model]()
    kind = torch.optim.SGD if model == "tied" else torch.optim.SparseAdam
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, split(kind))
    theirs = split(kind)(reference.parameters())
    for seed in range(4):
        torch.testing.assert_close(step(*data(seed)), step_plainly(reference, theirs, [seed]))
    assert_same_modules(module, reference)


@pytest.mark.parametrize("devices", DEVICES)
def test_sparse_gradients_are_clipped_and_unscaled(devices):
    """Torch's own `clip_grad_norm_` takes no sparse gradients."""
    module, reference = Table(), Table()
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in "ab"]
    step = fastdp.wrap(module, gpus=devices).train_step(
        F.mse_loss, split(torch.optim.SparseAdam), clip_grad_norm=0.1, scaler=scalers[0]
    )
    theirs = split(torch.optim.SparseAdam)(reference.parameters())
    for seed in range(3):
        step(*data(seed))
        for optimizer in theirs:
            optimizer.zero_grad()
        words, y = data(seed)
        scalers[1].scale(F.mse_loss(reference(words), y)).backward()
        for optimizer in theirs:
            scalers[1].unscale_(optimizer)
        gradients = [p.grad for p in reference.parameters()]
        norm = torch.stack([g.to_dense().norm() if g.is_sparse else g.norm() for g in gradients]).norm()
        torch.testing.assert_close(step.result.grad_norm, norm)
        for gradient in gradients:
            gradient.mul_((0.1 / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in theirs:
            scalers[1].step(optimizer)
        scalers[1].update()
    assert_same_modules(module, reference)


def test_a_gradient_that_is_sparse_on_some_devices_and_dense_on_others_is_dense():
    module, reference = Choosing(), Choosing()
    words = torch.tensor([[3, 5], [4, 2], [30, 7], [8, 31]])
    y = data(0, 4)[1]
    F.mse_loss(fastdp.wrap(module, gpus=2)(words), y).backward()
    (F.mse_loss(reference(words[:2]), y[:2]) / 2 + F.mse_loss(reference(words[2:]), y[2:]) / 2).backward()
    assert_same(module.embedding.weight.grad, reference.embedding.weight.grad)
    step = fastdp.wrap(module, gpus=2).train_step(F.mse_loss, split(torch.optim.SGD))
    theirs = split(torch.optim.SGD)(reference.parameters())
    step(words, y)
    for optimizer in theirs:
        optimizer.step()
    assert_same_modules(module, reference)


@pytest.mark.parametrize("devices", DEVICES)
def test_hooks_see_sparse_gradients(devices):
    seen = {}

    def hooked(module, name):
        seen[name] = []

        def hook(gradient):
            seen[name].append(gradient)
            return gradient * 2

        module.embedding.weight.register_hook(hook)
        return module

    module, reference = hooked(Table(), "ours"), hooked(Table(), "theirs")
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, split(torch.optim.SparseAdam))
    theirs = split(torch.optim.SparseAdam)(reference.parameters())
    for seed in range(3):
        step(*data(seed))
        step_plainly(reference, theirs, [seed])
    for found, expected in zip(seen["ours"], seen["theirs"], strict=True):
        assert_same(found, expected)
    assert_same_modules(module, reference)


@pytest.mark.parametrize("devices", DEVICES)
def test_an_optimizer_that_takes_no_sparse_gradients_says_so_as_in_plain_torch(devices):
    module = Table()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, torch.optim.Adam)
    before = copy.deepcopy(module.state_dict())
    for seed in range(2):
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            step(*data(seed))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
