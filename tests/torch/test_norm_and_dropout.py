"""Batch normalization and random ops over several devices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.program.torch import batch_norm


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def normalized(**options) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )


def images(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 6, 6, generator=generator) * 2 + 1, torch.randint(0, 5, (rows,), generator=generator)


def assert_close_states(module: nn.Module, reference: nn.Module, tolerance: float) -> None:
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(
            module.state_dict()[name].double(),
            expected.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize("devices", [1, 2, 5, 8])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronized_batch_norm_trains_as_one_device(devices, momentum):
    module, reference = normalized(momentum=momentum), normalized(momentum=momentum)
    step = fastdp.wrap(module, gpus=devices, sync_batch_norm=True, check_replicas=True).train_step(F.cross_entropy, sgd)
    optimizer = sgd(reference.parameters())
    for i, rows in enumerate([16, 7, 24, 5, 9, 16, 3, 11, 30, 2] * 3):
        x, y = images(rows, i)
        loss = step(x, y)
        optimizer.zero_grad()
        expected = F.cross_entropy(reference(x), y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    assert_close_states(module, reference, 1e-4)
    assert module[1].num_batches_tracked == 30


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_running_statistics_follow_the_global_batch_also_when_replicas_normalize_on_their_own(devices, momentum):
    torch.manual_seed(3)
    module = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 2))
    reference = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(F.cross_entropy, sgd)
    for rows in [8, 5, 3, 17, 2]:
        x, y = torch.randn(rows, 3) * 3 + 7, torch.randint(0, 2, (rows,))
        step(x, y)
        reference(x)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(module[0], name), getattr(reference[0], name), rtol=1e-5, atol=1e-5)


def test_a_step_whose_rows_are_whole_does_not_ask_for_the_name_of_the_layer(monkeypatch):
    def asked():
        raise AssertionError("only messages, and replicas that meet in the layer, need the name")

    monkeypatch.setattr(batch_norm, "running_part", asked)
    model = fastdp.wrap(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), gpus=2)
    model(torch.randn(6, 3)).sum().backward()
    model.train_step(F.mse_loss, torch.optim.Adam)(torch.randn(6, 3), torch.randn(6, 1))


def test_a_replica_with_one_row_gives_the_shift_and_one_row_in_all_is_refused_as_by_torch():
    module = nn.BatchNorm1d(3)
    nn.init.constant_(module.bias, 0.25)
    dp = fastdp.wrap(module, gpus=8)
    torch.testing.assert_close(dp(torch.randn(8, 3)), torch.full((8, 3), 0.25), rtol=0.0, atol=1e-3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        dp(torch.randn(1, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(torch.randn(1, 3))


def test_a_forward_pass_outside_a_train_step_moves_statistics_in_training_mode_only():
    module, reference = normalized(), normalized()
    dp = fastdp.wrap(module, gpus=2, sync_batch_norm=True)
    dp.eval()(images(6)[0])
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=0.0, atol=0.0)
    dp.train()(images(6)[0])
    reference(images(6)[0])
    torch.testing.assert_close(module.state_dict(), reference.state_dict())


def test_evaluation_uses_the_running_statistics():
    module = normalized()
    dp = fastdp.wrap(module, gpus=3)
    dp.train_step(F.cross_entropy, sgd)(*images(12))
    x, _ = images(7)
    torch.testing.assert_close(dp.eval()(x), module(x).detach())
    assert not module.training


def noisy() -> nn.Module:
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x) + torch.rand(x.shape[0], 1)

    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.Dropout(0.4),
        nn.AlphaDropout(0.1),
        Noise(),
        nn.Unflatten(1, (4, 3)),
        nn.Dropout1d(0.3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def trained(devices: int, seed: int) -> tuple[nn.Module, torch.Tensor]:
    module = noisy()
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(F.cross_entropy, sgd)
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (9, 4, 16)
    ]
    torch.manual_seed(seed)
    return module, torch.stack([step(x, y) for x, y in data])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_dropout_and_noise_are_the_same_on_any_number_of_devices(devices):
    module, losses = trained(devices, 13)
    reference, expected = trained(3, 13)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert_close_states(module, reference, 1e-5)


def test_the_same_seed_repeats_a_run_bit_for_bit_and_another_does_not():
    (module, losses), (again, same), (_, other) = trained(4, 13), trained(4, 13), trained(4, 14)
    assert torch.equal(losses, same)
    assert_close_states(module, again, 0.0)
    assert not torch.isclose(losses, other).any()


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
def test_dropout_keeps_mean_and_variance_as_torch_does(kind):
    dropout = kind(0.3)
    x = torch.randn(400, 500)
    ours, theirs = fastdp.wrap(dropout, gpus=4)(x), dropout(x)
    dropped = ours == 0 if kind is nn.Dropout else ours == ours.mode().values[0]
    assert abs(float(dropped.double().mean()) - 0.3) < 0.01
    assert abs(float(ours.mean() - theirs.mean())) < 0.01
    assert abs(float(ours.std() - theirs.std())) < 0.01


def test_channel_dropout_drops_whole_channels_and_rows_differ():
    x = torch.ones(64, 16, 5, 5)
    y = fastdp.wrap(nn.Dropout2d(0.5), gpus=8)(x)
    per_channel = y.flatten(2)
    assert torch.equal(per_channel.amin(2), per_channel.amax(2))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in per_channel[:, :, 0].tolist()}) == 64


def test_dropout_in_evaluation_is_the_identity_and_takes_nothing_from_the_generator():
    dp = fastdp.wrap(nn.Dropout(0.5), gpus=2).eval()
    before = torch.get_rng_state()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dp(x), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_dropout_rate_reaches_all_replicas():
    module = nn.Sequential(nn.Dropout(0.5))
    dp = fastdp.wrap(module, gpus=4)
    x = torch.ones(8, 100)
    assert (dp(x) == 0).any()
    module[0].p = 0.0
    assert torch.equal(dp(x), x)


def test_attention_and_recurrent_dropout_repeat_with_the_seed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
            self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.lstm(self.attention(x))[0]

    dp = fastdp.wrap(Net(), gpus=4)
    x = torch.randn(8, 5, 8)
    torch.manual_seed(1)
    first, second = dp(x), dp(x)
    torch.manual_seed(1)
    assert torch.equal(dp(x), first)
    assert not torch.equal(first, second)
    torch.testing.assert_close(dp.eval()(x), dp.module(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_draws_leaves_torchs_generator_alone():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=False)

    module, reference = Net(), Net()
    reference.load_state_dict(module.state_dict())
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    drawn = torch.get_rng_state()
    fastdp.wrap(module, gpus=2).train_step(F.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1))(x, y)
    assert torch.equal(torch.get_rng_state(), drawn)
    F.mse_loss(reference(x), y).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert_close_states(module, reference, 1e-5)
