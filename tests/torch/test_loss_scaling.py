"""`train_step(scaler=...)` does what a loop does with torch's GradScaler: the same scales, skips and weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F

import fastdp

DEVICES = [1, 2, 3, 8]


class Net(nn.Module):
    """The gradient of one of its parts becomes infinite where a row says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head, self.other = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        grows = torch.where(x[:, :1] > 9, torch.inf, 1.0)
        return self.head(self.body(x).tanh()) + self.other(x * 1.0) * 0 + self.other(x) + _times(self.head.bias, grows)


class _Times(torch.autograd.Function):
    """Zero, with a gradient by the first that is the incoming one times a factor."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.save_for_backward(factor)
        return torch.zeros(len(factor), len(value), dtype=value.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * ctx.saved_tensors[0]).sum(0), None


_times = _Times.apply


def data(seed: int, rows: int = 9, *, overflows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch; if it overflows, by a row of the last device."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    x, y = torch.randn(rows, 4, **kind), torch.randn(rows, 3, **kind)
    if overflows:
        x[-1, 0] = 10.0
    return x, y


def scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def head_and_rest(module):
    """Two optimizers; only the first has parameters whose gradient may overflow."""
    rest = [p for name, p in module.named_parameters() if not name.startswith("head")]
    return [torch.optim.SGD(module.head.parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(rest, lr=0.05)]


def loop(module, optimizers, scaler, batches, *, clip=None, loss_fn=F.mse_loss, **autocast):
    """One update of a plain loop, on the batches of a window."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    for x, y in batches:
        with torch.autocast("cpu", torch.float16, **{"enabled": False, **autocast}):
            loss = loss_fn(module(x), y)
        scaler.scale(loss / len(batches) if len(batches) > 1 else loss).backward()
    if clip is not None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def assert_same(found, expected, tolerance=1e-10) -> None:
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize(
    ("accumulate", "clip", "reduction"), [(1, None, None), (1, 0.5, "mean"), (2, None, "mean"), (2, 0.5, None)]
)
@pytest.mark.parametrize("devices", DEVICES)
def test_scales_skipped_steps_and_weights_are_those_of_one_device(devices, accumulate, clip, reduction):
    module, reference = Net(), Net()
    ours, theirs = scaler(), scaler()
    step = fastdp.wrap(module, gpus=devices, update="each").train_step(
        F.mse_loss, adam, scaler=ours, clip_grad_norm=clip, accumulate=accumulate, reduction=reduction
    )
    optimizer, skipped = adam(reference.parameters()), []
    for i in range(8):
        overflows = i in (2, 3, 7)
        batches = [data(10 * i + j, (9, 1)[i % 5 == 4], overflows=overflows and j == 0) for j in range(accumulate)]
        found = [step(*batch) for batch in batches][-1]
        torch.testing.assert_close(found, loop(reference, [optimizer], theirs, batches, clip=clip))
        assert ours.state_dict() == theirs.state_dict()
        skipped.append(step.result.skipped)
        assert step.result.updated is not step.result.skipped
        assert_same(module, reference)
    assert [i for i, one in enumerate(skipped) if one] == [2, 3, 7]
    torch.testing.assert_close(step.optimizer.state_dict(), optimizer.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("devices", DEVICES)
def test_each_of_two_optimizers_is_skipped_for_itself(devices):
    module, reference = Net(), Net()
    ours, theirs = scaler(), scaler()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, head_and_rest(module), scaler=ours)
    optimizers = head_and_rest(reference)
    for i in range(5):
        batch = data(i, overflows=i == 2)
        step(*batch)
        loop(reference, optimizers, theirs, [batch])
        assert ours.state_dict() == theirs.state_dict()
        assert (step.result.updated, step.result.skipped) == (True, i == 2)
    assert_same(module, reference)


@pytest.mark.parametrize("devices", [1, 3])
def test_norms_and_checks_are_of_unscaled_gradients(devices):
    module, reference = Net(), Net()
    step = fastdp.wrap(module, gpus=devices).train_step(
        F.mse_loss, adam, scaler=scaler(), grad_norm=True, skip_nonfinite=True
    )
    plain = fastdp.wrap(reference, gpus=1).train_step(F.mse_loss, adam, grad_norm=True)
    for i in range(3):
        step(*data(i))
        plain(*data(i))
        torch.testing.assert_close(step.result.grad_norm, plain.result.grad_norm)
    before = step.optimizer.state_dict()["state"][0]["step"].clone()
    step(*data(5, overflows=True))
    assert (step.result.updated, step.result.skipped) == (False, True)
    assert torch.equal(step.optimizer.state_dict()["state"][0]["step"], before)
    assert_same(module, reference)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_window_that_is_cut_short_is_unscaled_and_updates_the_scale(devices):
    module, reference = Net(), Net()
    ours, theirs = scaler(), scaler()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, adam, scaler=ours, accumulate=2)
    optimizer = adam(reference.parameters())
    for i in range(3):
        step(*data(i, overflows=i == 1))
        assert step.flush() is (i != 1)
        optimizer.zero_grad()
        x, y = data(i, overflows=i == 1)
        theirs.scale(F.mse_loss(reference(x), y) / 2).backward()
        theirs.step(optimizer)
        theirs.update()
        assert ours.state_dict() == theirs.state_dict()
    assert_same(module, reference)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_scaler_that_is_off_and_one_that_is_changed_between_steps(devices):
    module, reference = Net(), Net()
    ours, theirs = scaler(), scaler()
    dp = fastdp.wrap(module, gpus=devices)
    steps = [dp.train_step(F.mse_loss, adam, scaler=one) for one in (ours, GradScaler("cpu", enabled=False))]
    optimizers = [adam(reference.parameters()) for _ in steps]
    off = GradScaler("cpu", enabled=False)
    for i in range(6):
        if i == 3:
            ours.update(8.0)
            theirs.update(8.0)
        steps[i % 2](*data(i))
        loop(reference, [optimizers[i % 2]], off if i % 2 else theirs, [data(i)])
    assert ours.state_dict() == theirs.state_dict()
    assert_same(module, reference)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_failed_update_leaves_the_scaler_as_it_was(devices):
    module, ours = Net(), scaler()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, adam, scaler=ours, clip_grad_norm=1.0)
    step(*data(0))
    before, weights = ours.state_dict(), copy.deepcopy(module.state_dict())
    handle = step.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            step(*data(1))
    assert ours.state_dict() == before
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    handle.remove()
    step(*data(1))
    assert step.result.updated


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("loss_fn", [F.mse_loss, lambda o, y: F.mse_loss(o.float(), y)])
@pytest.mark.parametrize("devices", DEVICES)
def test_float16_under_autocast_finds_the_scale_of_one_device(devices, loss_fn):
    module, reference = Half(), Half()
    ours, theirs = (GradScaler("cpu", init_scale=2.0**24, growth_interval=5) for _ in "ab")
    step = fastdp.wrap(module, gpus=devices).train_step(loss_fn, adam, scaler=ours)
    optimizer, scales = adam(reference.parameters()), []
    for i in range(20):
        # All rows pull in one direction: no device's part overflows where the sum does not.
        x, y = (tensor.float() for tensor in (data(i, 16)[0].abs(), data(i, 16)[1] + 4.0))
        with torch.autocast("cpu", torch.float16):
            step(x, y)
        loop(reference, [optimizer], theirs, [(x, y)], loss_fn=loss_fn, enabled=True)
        scales.append(theirs.get_scale())
        assert ours.get_scale() == scales[-1]
    assert scales[0] == 2.0**23
    assert scales[-1] < scales[0]
    assert_same(module, reference, 2e-2)


class Mixed(nn.Module):
    """Gradients that autocast computes in float16, also through a view, and others in float32: of a norm, of words."""

    def __init__(self, inside: bool):
        super().__init__()
        self.inside = inside
        torch.manual_seed(3)
        self.words, self.linear, self.norm = nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.turned, self.twice = (nn.Parameter(torch.ones(4, 4)) for _ in "ab")

    def forward(self, x):
        if not self.inside:
            return self.computed(x)
        with torch.autocast("cpu", torch.float16):
            return self.computed(x).half()

    def computed(self, x):
        y = self.linear(x + self.words(torch.zeros(len(x), dtype=torch.int64))).float()
        y = self.norm(y.abs() + 1e-2 * x) @ self.turned.t()
        return (y @ self.twice).float() + 2.0 * self.twice.sum(0)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("devices", DEVICES)
def test_a_sum_is_infinite_where_float16_is_too_small_for_it_and_only_there(devices, inside):
    module, reference = Mixed(inside), Mixed(inside)
    x = torch.rand(16, 4, generator=torch.Generator().manual_seed(1)) + 1.0
    for one in (fastdp.wrap(module, gpus=devices), reference):
        with torch.autocast("cpu", torch.float16, enabled=not inside):
            (one(x).float().sum() * 2000.0).backward()
    infinite = {name: p.grad.isinf() for name, p in reference.named_parameters()}
    assert infinite["turned"].any()
    assert not infinite["norm.bias"].any()
    assert reference.norm.bias.grad.abs().max() > 70000
    for name, parameter in module.named_parameters():
        if name != "twice":  # the sum of a float16 number and a float32 one
            assert torch.equal(parameter.grad.isinf(), infinite[name]), name


@pytest.mark.parametrize("devices", DEVICES)
def test_a_loop_scales_as_on_one_device(devices):
    module, reference = Net(), Net()
    ours, theirs = scaler(), scaler()
    parallel, mine, optimizer = (
        fastdp.wrap(module, gpus=devices),
        adam(module.parameters()),
        adam(reference.parameters()),
    )
    for i in range(5):
        batch = data(i, overflows=i == 2)
        loop(parallel, [mine], ours, [batch], clip=0.5)
        loop(reference, [optimizer], theirs, [batch], clip=0.5)
        assert ours.state_dict() == theirs.state_dict()
    assert_same(module, reference)


@pytest.mark.parametrize(("before", "then"), [(1, 1), (3, 3), (2, 8)])
def test_a_run_that_goes_on_anew_has_the_scale_and_its_counter(before, then):
    module, reference = Net(), Net()
    theirs, optimizer = scaler(), adam(reference.parameters())
    step = fastdp.wrap(module, gpus=before).train_step(F.mse_loss, adam, scaler=scaler())
    file = io.BytesIO()
    for i in range(8):
        batch = data(i, overflows=i == 1)
        if i == 4:
            torch.save({"module": module.state_dict(), "step": step.state_dict()}, file)
            module, ours = Net(), scaler()
            step = fastdp.wrap(module, gpus=then).train_step(F.mse_loss, adam, scaler=ours)
            file.seek(0)
            saved = torch.load(file)
            module.load_state_dict(saved["module"])
            step.load_state_dict(saved["step"])
        step(*batch)
        loop(reference, [optimizer], theirs, [batch])
    assert ours.state_dict() == theirs.state_dict()
    assert_same(module, reference)
    for other in (None, GradScaler("cpu", enabled=False)):
        without = fastdp.wrap(Net(), gpus=then).train_step(F.mse_loss, adam, scaler=other)
        with pytest.raises(
            ValueError, match="of a step that has a scaler, and this step has no scaler, or one that is"
        ):
            without.load_state_dict(step.state_dict())
        with pytest.raises(ValueError, match="of a step that has no scaler, or one that is off, and this step has a"):
            step.load_state_dict(without.state_dict())


def test_what_is_no_scaler_is_named():
    with pytest.raises(TypeError, match=r"`scaler` must be a torch.amp.GradScaler.* Received: 1024.0"):
        fastdp.wrap(Net(), gpus=2).train_step(F.mse_loss, adam, scaler=1024.0)
