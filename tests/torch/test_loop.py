"""The loop that every torch user writes, `loss = criterion(model(x), y); loss.backward()`, as on one device."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdp

DEVICES = (1, 2, 3, 8)
each_number = pytest.mark.parametrize("devices", DEVICES)


def mlp() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def data(rows: int = 13, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (rows,), generator=generator)


def check(loop, devices, make=mlp, **options):
    """Compare what a loop returns, the weights, the gradients and the buffers with those of plain torch.

    `loop(model)` gets a parallel module, and then the same module without fastdp.
    """
    module = make()
    reference = copy.deepcopy(module)
    torch.manual_seed(3)
    ours = loop(fastdp.wrap(module, gpus=devices, **options))
    torch.manual_seed(3)
    theirs = loop(reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for (name, value), expected in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def contrastive(y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    z = F.normalize(y, dim=1)
    return ((z @ z.T - (labels[:, None] == labels).to(z.dtype)) ** 2).mean()


WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64)
LOSSES = {
    "mean": F.cross_entropy,
    "class weights": lambda y, t: F.cross_entropy(y, t, weight=WEIGHTS, ignore_index=2),
    "contrastive": contrastive,
    "of some rows": lambda y, t: (y[::3] ** 2).sum(),
}


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES.keys())
@each_number
def test_the_loop_trains_as_plain_torch(loss_fn, devices):
    def loop(model):
        optimizer, losses = sgd(model), []
        for i, rows in enumerate((13, 8, 3, 1, 16)):
            x, y = data(rows, i)
            optimizer.zero_grad()
            loss = loss_fn(model(x), y.clamp_min(1) if rows == 1 else y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.7)
            optimizer.step()
            losses.append(loss.detach())
        return losses

    check(loop, devices)


@each_number
def test_several_forward_passes_before_one_backward_and_gradients_that_add_up(devices):
    def loop(model):
        first, second = model(data(9)[0]), model(data(5, 1)[0])
        (first.mean() * second.sum()).backward()
        model(data(7, 2)[0]).square().sum().backward()
        return first.detach(), second.detach()

    check(loop, devices)


@each_number
def test_one_batch_in_two_models_and_one_model_behind_another(devices):
    def loop(model):
        torch.manual_seed(1)
        other = nn.Linear(4, 4).double()
        behind = other if isinstance(model, nn.Module) else fastdp.wrap(other, gpus=devices)
        x, y = data()
        (F.cross_entropy(behind(model(x)), y) + behind(x[:, :4]).sum()).backward()
        return [p.grad for p in other.parameters()]

    check(loop, devices)


@each_number
def test_gradients_by_inputs_and_by_torch_autograd_grad(devices):
    def loop(model):
        x, y = data()
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        by_weights = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        (by_input,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        (x.square().sum() + F.cross_entropy(model(x), y)).backward()
        return by_weights, by_input, x.grad

    check(loop, devices)


@each_number
def test_backward_twice_with_a_retained_graph_and_torchs_own_error_without(devices):
    def loop(model):
        x, y = data()
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        model(x).sum().backward()

    check(loop, devices)


class Outputs(nn.Module):
    """Outputs of many kinds: two parts, a number, a detached one, whole numbers, None, and one that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.c, self.unused = (nn.Linear(6, 4).double() for _ in range(4))

    def forward(self, x, scale=1.0, *, flag=None):
        a, b = self.a(x), self.b(x) * scale
        return {"a": a, "pair": (b, b.detach()), "c": [self.c(x)], "class": a.argmax(1), "none": None, "flag": flag}


@each_number
def test_losses_of_several_outputs_and_outputs_that_nothing_depends_on(devices):
    def loop(model):
        x, y = data()
        out = model(x, scale=torch.tensor(2.0), flag="kept")
        assert out["flag"] == "kept"
        assert out["none"] is None
        assert not out["pair"][1].requires_grad
        assert not out["class"].requires_grad
        F.cross_entropy(out["a"], y).backward()
        out["pair"][0].square().mean().backward()  # another part of the graph, which is still there
        return out["a"].detach(), out["class"], out["pair"][1]

    check(loop, devices, Outputs)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a = nn.Linear(6, 4).double()

    def forward(self, x, temperature):
        y = self.a(x) / temperature
        return y, (y**2).mean()


@each_number
def test_arguments_and_outputs_without_rows_have_gradients(devices):
    def loop(model):
        temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        x, y = data()
        out, penalty = model(x, temperature)
        (F.cross_entropy(out, y) + 0.3 * penalty).backward()
        return temperature.grad, penalty.detach()

    check(loop, devices, Scaled)


@each_number
@pytest.mark.parametrize("kind", ["bfloat16 and back", "complex"])
def test_outputs_of_other_dtypes(devices, kind):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.a = nn.Linear(6, 4).double()

        def forward(self, x):
            y = self.a(x)
            return torch.complex(y, y * 2) if kind == "complex" else y.bfloat16()

    def loop(model):
        y = model(data()[0])
        y.abs().double().sum().backward()
        return y.detach()

    check(loop, devices, Other)


@each_number
def test_frozen_parts_thaw_and_freeze(devices):
    def loop(model):
        for trained in (True, False, True):
            next(model.children()).requires_grad_(trained)
            F.cross_entropy(model(data()[0]), data()[1]).backward()
        model.requires_grad_(False)
        assert not model(data()[0]).requires_grad
        x = data()[0].requires_grad_()
        model(x).sum().backward()
        return x.grad

    check(loop, devices)


@each_number
def test_a_loss_module_with_weights_of_its_own_and_a_gradient_scaler(devices):
    def loop(model):
        torch.manual_seed(2)
        centers = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        optimizer = torch.optim.Adam([*model.parameters(), centers], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for i in range(3):
            x, y = data(seed=i)
            optimizer.zero_grad()
            loss = (model(x) - centers[y]).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return centers.detach()

    check(loop, devices)


@each_number
def test_closures_of_lbfgs_and_sharpness_aware_minimization(devices):
    def loop(model):
        x, y = data()
        lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        lbfgs.step(closure)
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            climbs = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
            for p, climb in zip(model.parameters(), climbs, strict=True):
                p.add_(climb)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, climb in zip(model.parameters(), climbs, strict=True):
                p.sub_(climb).sub_(p.grad, alpha=0.1)

    check(loop, devices)


@each_number
def test_hooks_of_parameters_see_the_whole_gradient_once(devices):
    def loop(model):
        seen = []
        parameter = next(iter(model.parameters()))
        before = parameter.register_hook(lambda g: seen.append(g.clone()) or g * 2)
        after = parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        for i in range(2):
            F.cross_entropy(model(data(seed=i)[0]), data(seed=i)[1]).backward()
        before.remove()
        after.remove()
        return seen

    check(loop, devices)


@pytest.mark.filterwarnings("ignore:fastdp. gradients of gradients")
@each_number
def test_a_gradient_penalty_is_that_of_one_device(devices):
    def loop(model):
        optimizer = sgd(model)
        for i in range(3):
            x, _ = data(seed=i)
            x.requires_grad_()
            optimizer.zero_grad()
            y = model(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (y.mean() + (slope.norm(2, 1) - 1).square().mean()).backward()
            optimizer.step()
        return x.grad

    check(loop, devices)


@pytest.mark.filterwarnings("ignore:fastdp. gradients of gradients")
@each_number
def test_a_second_gradient_by_the_weights(devices):
    def loop(model):
        x, y = data()
        parameters = list(model.parameters())
        first = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        sum(g.square().sum() for g in first).backward()

    check(loop, devices)


def test_a_second_gradient_says_once_that_it_is_computed_on_one_device(recwarn):
    model, (x, _) = fastdp.wrap(mlp(), gpus=2), data()
    x.requires_grad_()
    for _ in range(2):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert [str(w.message) for w in recwarn] == [
        "fastdp: gradients of gradients (create_graph=True) of Sequential are computed on one device."
    ]
    assert recwarn[0].filename == __file__


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.double()

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


@each_number
def test_running_statistics_move_once_per_forward_pass(devices):
    def loop(model):
        x, y = data(24)
        F.cross_entropy(model(x), y).backward()
        (model(x).sum() + model(data(16, 1)[0]).square().sum()).backward()
        with torch.no_grad():
            model(x)
        model.eval()
        first, second = model(x), model(data(9, 2)[0])
        (first.sum() + second.square().sum()).backward()
        with torch.inference_mode():
            return model(x).clone()

    check(loop, devices, Normed, sync_batch_norm=True)


@each_number
def test_swa_takes_statistics_and_averages_of_the_parallel_module(devices):
    def loop(model):
        averaged = torch.optim.swa_utils.AveragedModel(model if isinstance(model, nn.Module) else model.module)
        optimizer = sgd(model)
        for i in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(data(16, i)[0]), data(16, i)[1]).backward()
            optimizer.step()
            averaged.update_parameters(model if isinstance(model, nn.Module) else model.module)
        torch.optim.swa_utils.update_bn([data(16, i)[0] for i in range(3)], model)
        return [p.detach() for p in averaged.parameters()]

    check(loop, devices, Normed, sync_batch_norm=True)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.c = (nn.Linear(6, 6).double() for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        part = lambda h: torch.tanh(self.b(h))  # noqa: E731
        return self.c(checkpoint(part, self.a(x), use_reentrant=self.reentrant))[:, :4]


@pytest.mark.parametrize("reentrant", [False, True])
@each_number
def test_checkpointed_parts(devices, reentrant):
    def loop(model):
        for i in range(3):
            F.cross_entropy(model(data(seed=i)[0]), data(seed=i)[1]).backward()

    check(loop, devices, lambda: Checkpointed(reentrant))


@each_number
def test_weights_changed_between_forward_and_backward(devices):
    def loop(model):
        x, y = data()
        loss = F.cross_entropy(model(x), y)
        parameters = list(model.parameters())
        parameters[0].data.mul_(2)  # not noticed by torch, and not needed for the gradient of this layer
        parameters[3].data.zero_()
        loss.backward()
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            parameters[2].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    check(loop, devices)


@each_number
def test_inputs_changed_between_forward_and_backward_are_torchs_error(devices):
    def loop(model):
        x, y = data()
        loss = F.cross_entropy(model(x), y)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    check(loop, devices)


@each_number
def test_outputs_may_be_changed_in_place(devices):
    def loop(model):
        y = model(data()[0])
        y *= 2
        y.relu_().sum().backward()

    check(loop, devices)


@each_number
def test_anomaly_mode_and_backward_in_another_thread(devices):
    def loop(model):
        x, y = data()
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            F.cross_entropy(model(x), y).backward()
        loss = F.cross_entropy(model(x), y)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    check(loop, devices)


class Failing(nn.Module):
    """Fails in forward on rows that are negative, in backward where asked to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.norm = nn.Linear(6, 4).double(), nn.BatchNorm1d(4).double()
        self.fails = False

    def forward(self, x):
        y = self.norm(self.a(x.abs()))
        if (x[:, 0] < -1e3).any():
            raise ValueError("a negative row")
        if self.fails:
            y.register_hook(self.fail)
        return y

    @staticmethod
    def fail(gradient):
        raise ArithmeticError("not today")


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_failures_leave_everything_as_before_and_the_next_call_works(devices):
    def loop(model):
        x, y = data(24)
        F.cross_entropy(model(x), y).backward()
        if not isinstance(model, nn.Module):
            before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
            bad = x.clone()
            bad[-1] = -1e4
            with pytest.raises(ValueError, match="a negative row"):
                model(bad)
            torch.testing.assert_close(dict(model.state_dict()), dict(before[0]), rtol=0, atol=0)
            model.fails = True
            loss = F.cross_entropy(model(x), y)
            with pytest.raises(ArithmeticError, match="not today"):
                loss.backward()
            torch.testing.assert_close([p.grad for p in model.parameters()], before[1], rtol=0, atol=0)
            model.fails = False
            model.load_state_dict(before[0])
        F.cross_entropy(model(x), y).backward()

    check(loop, devices, Failing, sync_batch_norm=True)


def test_graphs_end_with_the_outputs_and_memory_with_the_model():
    module = mlp()
    kept = weakref.WeakSet()
    module[1].register_forward_hook(lambda part, inputs, output: kept.add(output))
    model = fastdp.wrap(module, gpus=3)
    y = model(data()[0])
    gc.collect()
    assert len(kept) == 3
    del y
    assert not kept
    model(data()[0]).sum().backward()
    assert not kept
    threads = threading.active_count()
    engine = weakref.ref(model._calls.engine)
    y = model(data()[0])
    del model
    y.sum().backward()
    del y
    gc.collect()
    assert engine() is None
    assert threading.active_count() == threads


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor | None = None


torch.export.register_dataclass(Pair)


@each_number
def test_dataclasses_as_outputs(devices):
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.a = nn.Linear(6, 4).double()

        def forward(self, x):
            return Pair(self.a(x))

    def loop(model):
        out = model(data()[0])
        assert out.second is None
        out.first.sum().backward()
        return out.first.detach()

    check(loop, devices, Makes)
