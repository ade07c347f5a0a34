"""N devices equal plain torch on one: losses, optimizers, clipping, accumulation, schedulers."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fastdp

DEVICES = (1, 2, 3, 5, 8)


def mlp(outputs: int = 4) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def batches(steps: int, largest: int = 23, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random batches of 1 to `largest` rows: often fewer rows than devices."""
    generator = torch.Generator().manual_seed(11)
    sizes = torch.randint(1, largest + 1, (steps,), generator=generator).tolist()
    return [
        (
            torch.randn(rows, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (rows,), generator=generator),
        )
        for rows in sizes
    ]


def contrastive(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every row against every other: not a sum over samples."""
    z = F.normalize(outputs + 1e-3, dim=1)
    same = (labels[:, None] == labels[None, :]).to(z.dtype)
    return ((z @ z.T - same) ** 2).mean()


def one_hot_mse(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(outputs, F.one_hot(labels, 4).to(outputs.dtype))


def summed(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum") / 10


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64), ignore_index=2)


def weighted(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class weights and ignored rows; a batch of nothing but ignored rows would be 0/0 in torch too."""
    return WEIGHTED(outputs, torch.where(torch.arange(len(labels)) == 0, 1, labels))


LOSSES = {
    "weighted": (weighted, None),
    "mse": (one_hot_mse, None),
    "mse by mean": (one_hot_mse, "mean"),
    "sum": (summed, None),
    "sum by sum": (summed, "sum"),
    "contrastive": (contrastive, None),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def train_plainly(module, data, loss_fn, factory, *, clip=None, accumulate=1):
    """What a torch user writes for one device; the losses, and the optimizer."""
    optimizer, losses = factory(list(module.parameters())), []
    for i, (x, y) in enumerate(data):
        loss = loss_fn(module(x), y)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (i + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses, optimizer


def assert_equal_modules(module: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, value), expected in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(
            value, expected, rtol=tolerance, atol=tolerance * 1e-2, msg=lambda m, n=name: f"{n}: {m}"
        )


@functools.cache
def plainly_trained(loss: str, optimizer: str) -> tuple[list[float], nn.Module]:
    """The reference for all device counts: fifty uneven batches on one device, by torch alone."""
    module = mlp()
    losses, _ = train_plainly(module, batches(50), LOSSES[loss][0], OPTIMIZERS[optimizer])
    return losses, module


@pytest.mark.parametrize(("devices", "optimizer"), [*((n, "sgd") for n in DEVICES), (2, "adam"), (8, "adam")])
@pytest.mark.parametrize("loss", LOSSES)
def test_fifty_uneven_batches_train_as_plain_torch(loss, optimizer, devices):
    loss_fn, reduction = LOSSES[loss]
    module = mlp()
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(
        loss_fn, OPTIMIZERS[optimizer], reduction=reduction
    )
    losses = [float(step(x, y)) for x, y in batches(50)]
    expected, reference = plainly_trained(loss, optimizer)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-12)
    assert_equal_modules(module, reference)
    assert not torch.equal(module[0].weight, mlp()[0].weight)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_fp32_stays_within_1e_5_after_fifty_steps_of_sgd(devices):
    module, reference = mlp().float(), mlp().float()
    data = [(x.float(), y) for x, y in batches(50, largest=64)]
    factory = OPTIMIZERS["sgd"]
    step = fastdp.wrap(module, gpus=devices).train_step(F.cross_entropy, factory)
    losses = [step(x, y) for x, y in data]
    train_plainly(reference, data, F.cross_entropy, factory)
    assert losses[0].dtype == torch.float32
    for value, expected in zip(module.parameters(), reference.parameters(), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_a_mean_over_the_wrong_count_is_refused():
    step = fastdp.wrap(mlp(), gpus=3).train_step(weighted, OPTIMIZERS["sgd"], reduction="mean")
    with pytest.raises(ValueError, match="is the mean over samples, and it is not"):
        step(*next(batch for batch in batches(10) if len(batch[0]) > 1))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_gradient_is_clipped_by_the_norm_of_the_whole_batch(devices):
    module, reference, data = mlp(), mlp(), batches(20)
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(
        F.cross_entropy, OPTIMIZERS["sgd"], clip_grad_norm=0.1
    )
    for x, y in data:
        step(x, y)
    train_plainly(reference, data, F.cross_entropy, OPTIMIZERS["sgd"], clip=0.1)
    assert_equal_modules(module, reference)


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_accumulated_uneven_batches_give_the_mean_of_their_gradients(devices, update):
    module, reference, data = mlp(), mlp(), batches(21, largest=12)
    step = fastdp.wrap(module, gpus=devices, check_replicas=True, update=update).train_step(
        F.cross_entropy, OPTIMIZERS["adam"], accumulate=3, clip_grad_norm=0.5
    )
    before = copy.deepcopy(module.state_dict())
    for i, (x, y) in enumerate(data):
        step(x, y)
        if i == 1:
            assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())
    train_plainly(reference, data, F.cross_entropy, OPTIMIZERS["adam"], accumulate=3, clip=0.5)
    assert_equal_modules(module, reference)


def test_replicas_without_rows_in_the_last_call_of_a_window_still_give_what_they_hold():
    module, reference = mlp(), mlp()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    data = [(x, y), (x[:2], y[:2])]
    step = fastdp.wrap(module, gpus=8).train_step(F.cross_entropy, OPTIMIZERS["sgd"], accumulate=2)
    for pair in data:
        step(*pair)
    train_plainly(reference, data, F.cross_entropy, OPTIMIZERS["sgd"], accumulate=2)
    assert_equal_modules(module, reference)


class Choosing(nn.Module):
    """Uses one of its two layers, as the sign of the first number says."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 4), nn.Linear(6, 4)
        self.double()

    def forward(self, x):
        return self.below(x) if x[0, 0] < 0 else self.above(x)


@pytest.mark.parametrize("update", ["first", "each"])
def test_a_layer_used_in_any_call_of_a_window_is_updated_and_others_are_not(update):
    torch.manual_seed(4)
    module = Choosing()
    reference = copy.deepcopy(module)
    x, y = torch.rand(9, 6, dtype=torch.float64) + 0.1, torch.randint(0, 4, (9,))
    # Weight decay moves a layer with a gradient of zeros, and leaves one without a gradient.
    factory = lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5)  # noqa: E731
    step = fastdp.wrap(module, gpus=3, update=update).train_step(F.cross_entropy, factory, accumulate=2)
    data = [(x, y), (x, y), (-x, y), (x, y)]
    for i, pair in enumerate(data):
        step(*pair)
        if i == 1:
            assert torch.equal(module.below.weight, reference.below.weight)
    train_plainly(reference, data, F.cross_entropy, factory, accumulate=2)
    assert_equal_modules(module, reference)


def test_gradients_are_reduced_in_the_last_call_of_a_window_only(monkeypatch):
    from fastdp.comm.host.communicator import HostCommunicator

    reduced = []
    original = HostCommunicator.begin

    def spy(self, sources, targets, buckets, **options):
        reduced.append(len(buckets))
        return original(self, sources, targets, buckets, **options)

    monkeypatch.setattr(HostCommunicator, "begin", spy)
    step = fastdp.wrap(mlp(), gpus=2).train_step(F.cross_entropy, OPTIMIZERS["sgd"], accumulate=3)
    calls = []
    for x, y in batches(6):
        step(x, y)
        calls.append(len(reduced))
    assert calls == [0, 0, 1, 1, 1, 2]


def test_a_learning_rate_scheduler_on_the_optimizer_moves_all_replicas():
    module, reference, data = mlp(), mlp(), batches(20)
    dp = fastdp.wrap(module, gpus=4, check_replicas=True)
    step = dp.train_step(F.cross_entropy, OPTIMIZERS["sgd"])
    assert dp.optimizer is step.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(dp.optimizer, step_size=3, gamma=0.5)
    for x, y in data:
        step(x, y)
        scheduler.step()
    optimizer = OPTIMIZERS["sgd"](reference.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        optimizer.step()
        scheduler.step()
    assert_equal_modules(module, reference)
    assert dp.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.01


def test_an_optimizer_state_that_is_loaded_reaches_all_replicas():
    data = batches(20)
    reference = mlp()
    train_plainly(reference, data, F.cross_entropy, OPTIMIZERS["adam"])
    half = mlp()
    _, optimizer = train_plainly(half, data[:10], F.cross_entropy, OPTIMIZERS["adam"])
    module = mlp()
    dp = fastdp.wrap(module, gpus=3, check_replicas=True)
    step = dp.train_step(F.cross_entropy, OPTIMIZERS["adam"])
    step(*data[0])  # of no consequence
    dp.load_state_dict(half.state_dict())
    dp.optimizer.load_state_dict(optimizer.state_dict())
    for x, y in data[10:]:
        step(x, y)
    assert_equal_modules(module, reference)


def test_a_loss_that_uses_the_modules_own_parameters_trains_as_plain_torch():
    module, reference, data = mlp(), mlp(), batches(20)

    def penalized(of):
        return lambda outputs, y: F.cross_entropy(outputs, y) + 0.1 * sum((p**2).sum() for p in of.parameters())

    for reduction in (None, "mean"):
        step = fastdp.wrap(module, gpus=3).train_step(penalized(module), OPTIMIZERS["sgd"], reduction=reduction)
        for x, y in data:
            step(x, y)
        train_plainly(reference, data, penalized(reference), OPTIMIZERS["sgd"])
        assert_equal_modules(module, reference)
    step = fastdp.wrap(module, gpus=2).train_step(penalized(module), OPTIMIZERS["sgd"], reduction="sum")
    with pytest.raises(ValueError, match="is the sum over samples, and it is not"):
        step(*next(batch for batch in data if len(batch[0]) > 1))


def test_a_data_loader_feeds_steps_and_the_loss_goes_down():
    x = torch.randn(100, 6, dtype=torch.float64)
    y = x[:, :4].argmax(dim=1)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    step = fastdp.wrap(mlp(), gpus=4).train_step(F.cross_entropy, OPTIMIZERS["adam"])
    epochs = [[float(step(*batch)) for batch in loader] for _ in range(15)]
    assert len(epochs[0]) == 4
    assert np.mean(epochs[-1]) < 0.9 * np.mean(epochs[0])


def test_arrays_nests_and_constants_go_in_and_the_modules_structure_comes_out():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, pair, *, scale, flag=None):
            a, b = pair["a"], pair["b"]
            out = self.linear(a + b) * scale
            return {"out": out, "mean": out.mean(), "n": (flag, a > 0)}

    module = Two()
    dp = fastdp.wrap(module, gpus=3)
    a, b = np.random.default_rng(0).normal(size=(2, 7, 3))
    b.flags.writeable = False
    given = {"pair": {"a": a, "b": b}, "scale": torch.tensor(2.0), "flag": "yes"}
    outputs = dp(**given)
    expected = module(pair={"a": torch.tensor(a), "b": torch.tensor(b)}, scale=2.0, flag="yes")
    torch.testing.assert_close(outputs["out"], expected["out"])
    torch.testing.assert_close(outputs["mean"], expected["mean"], rtol=1e-6, atol=1e-6)
    assert outputs["mean"].dtype == torch.float64
    assert outputs["n"][0] == "yes"
    assert torch.equal(outputs["n"][1], expected["n"][1])
    assert outputs["out"].requires_grad
    with torch.no_grad():
        assert not dp(**given)["out"].requires_grad
    step = dp.train_step(lambda o, t: F.mse_loss(o["out"], t) + o["mean"], OPTIMIZERS["sgd"])
    target = np.zeros((7, 2))
    loss = step(given, target)
    torch.testing.assert_close(
        loss, (F.mse_loss(expected["out"], torch.zeros(7, 2).double()) + expected["mean"]).detach()
    )
    reference = nn.Linear(3, 2)
    assert dp.state_dict().keys() == {f"linear.{name}" for name in reference.state_dict()}


def ddp_worker(rank: int, folder: str) -> None:
    """One of two processes of DDP: its half of each batch."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        module = mlp()
        parallel = DistributedDataParallel(module)
        optimizer = OPTIMIZERS["sgd"](module.parameters())
        for x, y in even_batches():
            rows = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
            optimizer.zero_grad()
            F.cross_entropy(parallel(x[rows]), y[rows]).backward()
            optimizer.step()
        if rank == 0:
            torch.save(module.state_dict(), f"{folder}/weights.pt")
        distributed.barrier()
        sys.stdout.write("trained\n")
        sys.stdout.flush()
    finally:
        distributed.destroy_process_group()
    # Not by the interpreter's end: once a process was aborted there ("terminate called without an active exception", a
    # thread of torch's or gloo's that nobody joined), after all that is compared here was done.
    os._exit(0)


def even_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x[: len(x) // 2 * 2], y[: len(y) // 2 * 2]) for x, y in batches(20) if len(x) > 1]


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
def test_even_batches_train_as_distributed_data_parallel_over_gloo(tmp_path):
    script = f"import runpy; runpy.run_path({__file__!r})['ddp_worker']({{rank}}, {str(tmp_path)!r})"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script.format(rank=rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert [out for out, _ in said] == ["trained\n"] * 2, said
    module = mlp()
    step = fastdp.wrap(module, gpus=2).train_step(F.cross_entropy, OPTIMIZERS["sgd"], reduction="mean")
    for x, y in even_batches():
        step(x, y)
    expected = torch.load(tmp_path / "weights.pt")
    assert expected.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
