"""Whatever the user does to an optimizer between two steps counts in the next, as on one device."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastdp

DEVICES = [1, 2, 3, 8]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(seed: int, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, 4, **kind), torch.randn(rows, 3, **kind)


class Signed(torch.optim.Adam):
    """Torch's Adam and something of the user's own."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(0.01 * p.grad.sign())
        return super().step(closure)


def plain(module, optimizer, seed: int) -> None:
    x, y = data(seed)
    optimizer.zero_grad()
    F.mse_loss(module(x), y).backward()
    optimizer.step()


def two_groups(kind=torch.optim.Adam, **options):
    """An optimizer of the first layer's parameters with a rate of their own, and of the others."""
    return lambda ps: kind([{"params": list(ps)[:2], "lr": 0.02}, {"params": list(ps)[2:]}], lr=0.05, **options)


def first_momentum(optimizer) -> torch.Tensor:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]


def moved(optimizer) -> None:
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop(0))


def another(optimizer) -> None:
    """A state dict from elsewhere: after three steps of other data."""
    module = net()
    other = two_groups()(list(module.parameters()))
    for i in range(3):
        plain(module, other, 50 + i)
    optimizer.load_state_dict(other.state_dict())


def fresh(optimizer) -> None:
    optimizer.state = defaultdict(dict)


def grown(optimizer) -> None:
    """A group that was taken out comes back with other settings."""
    group = optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": group["params"], "lr": 0.3, "weight_decay": 0.1})


def slowed(optimizer, *_) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.7


CHANGES = {
    "group deleted": lambda o: o.param_groups.pop(1),
    "groups replaced": lambda o: setattr(o, "param_groups", o.param_groups[1:]),
    "groups reordered": lambda o: o.param_groups.reverse(),
    "group taken out and added": grown,
    "parameter taken out": lambda o: o.param_groups[0]["params"].pop(0),
    "parameters replaced": lambda o: o.param_groups[0].update(params=o.param_groups[0]["params"][1:]),
    "parameter moved": moved,
    "state cleared": lambda o: o.state.clear(),
    "state replaced": fresh,
    "state of one deleted": lambda o: o.state.pop(o.param_groups[0]["params"][0]),
    "momentum deleted": lambda o: o.state[o.param_groups[0]["params"][0]].clear(),
    "momentum replaced": lambda o: o.state[o.param_groups[0]["params"][1]].update(exp_avg=torch.ones(6).double()),
    "momentum zeroed": lambda o: first_momentum(o).zero_(),
    "momentum zeroed by data": lambda o: first_momentum(o).data.zero_(),
    "momentum by numpy": lambda o: first_momentum(o).numpy().__setitem__(0, 0.5),
    "steps counted anew": lambda o: [state["step"].zero_() for state in o.state.values()],
    "state loaded": another,
    "rate": lambda o: o.param_groups[0].update(lr=0.3),
    "other settings": lambda o: o.param_groups[1].update(betas=(0.5, 0.6), weight_decay=0.3, maximize=True),
    "pre-hook": lambda o: o.register_step_pre_hook(slowed),
    "post-hook": lambda o: o.register_step_post_hook(lambda *_: first_momentum(o).mul_(0.5)),
}


def trained(change, factory, devices: int | None, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module and its optimizer after six steps, with a change before the third and the fifth."""
    module = net()
    if devices:
        step = fastdp.wrap(module, gpus=devices, **options).train_step(F.mse_loss, factory)
        optimizer, run = step.optimizer, lambda i: step(*data(i))
    else:
        optimizer = factory(list(module.parameters()))
        run = lambda i: plain(module, optimizer, i)  # noqa: E731
    for i in range(5):
        if i == 2 or (i == 4 and len(optimizer.param_groups) > 1):
            change(optimizer)
        run(i)
    return module, optimizer


def assert_same(found, expected) -> None:
    for value, other in zip(found[0].parameters(), expected[0].parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)
    # Not by `state_dict()`, which torch refuses where a parameter was taken out of its group.
    states = [[*one.state.values()] + [group["lr"] for group in one.param_groups] for _, one in (found, expected)]
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_optimizer_counts_in_the_next_step(change, devices):
    found = trained(CHANGES[change], two_groups(), devices, update="each", check_replicas=True)
    assert_same(found, trained(CHANGES[change], two_groups(), None))


@pytest.mark.parametrize("update", ["first", "each", None])
def test_the_optimizer_is_one_wherever_updates_are_made(update):
    found = trained(CHANGES["momentum zeroed by data"], two_groups(), 3, update=update, check_replicas=True)
    assert_same(found, trained(CHANGES["momentum zeroed by data"], two_groups(), None))


def with_tensor_rate(parameters):
    return torch.optim.AdamW(parameters, lr=torch.tensor(0.05, dtype=torch.float64), foreach=False)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("factory", [with_tensor_rate, two_groups(Signed), torch.optim.Adagrad])
def test_rates_in_tensors_and_classes_of_the_users_own_are_exact(factory, devices):
    def change(optimizer):
        rate = optimizer.param_groups[0]["lr"]
        if isinstance(rate, torch.Tensor):
            rate.mul_(0.5)

    assert_same(trained(change, factory, devices), trained(change, factory, None))


def test_updates_that_run_the_users_code_keep_a_snapshot_and_those_of_torchs_own_none():
    def kept(change):
        step = fastdp.wrap(net(), gpus=2).train_step(F.mse_loss, torch.optim.Adam)
        change(step.optimizer)
        for i in range(2):
            step(*data(i))
        return step._engine.rollback.nbytes > 0

    def patched(optimizer):
        own = optimizer.step
        optimizer.step = lambda closure=None: own(closure)

    loop = fastdp.wrap(nn.Linear(2, 1), gpus=2)
    loop(torch.randn(4, 2)).sum().backward()  # fastdp's own hook for all optimizers is nobody's code
    assert not kept(lambda o: None)
    assert not kept(lambda o: lr_scheduler.StepLR(o, 2))
    assert kept(lambda o: o.register_step_pre_hook(slowed))
    assert kept(lambda o: o.register_step_post_hook(slowed))
    assert kept(patched)


@pytest.mark.parametrize("devices", DEVICES)
def test_hooks_for_all_optimizers_run_once_per_step(devices):
    seen = []
    handles = [
        register_optimizer_step_pre_hook(slowed),
        register_optimizer_step_post_hook(lambda *_: seen.append(0)),
    ]
    try:
        found = trained(lambda _: None, two_groups(), devices)
        assert len(seen) == 5
        expected = trained(lambda _: None, two_groups(), None)
    finally:
        for handle in handles:
            handle.remove()
    assert_same(found, expected)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_new_layer_in_place_of_a_parameter_trains_if_the_optimizer_is_given_it(devices):
    def run(module, optimizer, step):
        step(0)
        module[0].weight = nn.Parameter(torch.ones(6, 4).double())
        optimizer.param_groups[0]["params"][0] = module[0].weight
        step(1)
        step(2)
        return module, optimizer

    module, reference = net(), net()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, two_groups())
    optimizer = two_groups()(list(reference.parameters()))
    found = run(module, step.optimizer, lambda i: step(*data(i)))
    assert_same(found, run(reference, optimizer, lambda i: plain(reference, optimizer, i)))


@pytest.mark.parametrize("devices", [1, 3])
def test_a_parameter_that_the_module_does_not_have_is_refused_and_nothing_is_lost(devices):
    module = net()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, two_groups())
    step(*data(0))
    before = copy.deepcopy(module.state_dict())
    step.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="`optimizer` holds a parameter that the module does not have"):
        step(*data(1))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    del step.optimizer.param_groups[2]
    step(*data(1))


def test_a_parallel_module_called_by_an_optimizer_is_refused_at_once():
    module = net()
    dp = fastdp.wrap(module, gpus=3)
    step = dp.train_step(F.mse_loss, two_groups())
    handle = step.optimizer.register_step_post_hook(lambda *_: dp(data(0)[0]))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"called inside a step of a parallel model.*Call the plain module there"):
        step(*data(0))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    handle.remove()
    step(*data(0))


# Several optimizers.


def sgd_and_adam(parameters):
    first, *rest = parameters
    return [torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.Adam(rest, lr=0.05)]


def muon_and_adamw(module):
    """Muon for matrices, AdamW for the rest, chosen by name."""
    named = dict(module.named_parameters())
    muon = torch.optim.Muon([p for name, p in named.items() if name.endswith("weight")], lr=0.02)
    return muon, torch.optim.AdamW([p for name, p in named.items() if name.endswith("bias")], lr=0.01)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("given", ["function", "optimizers"])
def test_several_optimizers_step_in_order_with_their_schedules(given, devices):
    module, reference = net(), net()
    make = (lambda of: sgd_and_adam(list(of.parameters()))) if given == "function" else muon_and_adamw
    dp = fastdp.wrap(module, gpus=devices)
    step = dp.train_step(F.mse_loss, sgd_and_adam if given == "function" else muon_and_adamw(module))
    expected = make(reference)
    for optimizers in (step.optimizers, expected):
        optimizers[1].register_step_post_hook(lambda *_, first=optimizers[0]: slowed(first))
    schedules = [lr_scheduler.StepLR(optimizers[1], 2, gamma=0.5) for optimizers in (step.optimizers, expected)]
    for i in range(5):
        x, y = data(i)
        step(x, y)
        for optimizer in expected:
            optimizer.zero_grad()
        F.mse_loss(reference(x), y).backward()
        for optimizer in expected:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    for found, optimizer in zip(step.optimizers, expected, strict=True):
        assert_same((module, found), (reference, optimizer))
    with pytest.raises(RuntimeError, match="has 2 optimizers"):
        _ = step.optimizer


@pytest.mark.parametrize("devices", [1, 3])
def test_an_optimizer_of_the_users_own_making_serves_two_train_steps_with_one_state(devices):
    module, reference = net(), net()
    dp = fastdp.wrap(module, gpus=devices)
    optimizer, expected = (torch.optim.Adam(one.parameters(), lr=0.05) for one in (module, reference))
    steps = [dp.train_step(loss, optimizer) for loss in (F.mse_loss, F.l1_loss)]
    assert all(step.optimizer is optimizer for step in steps)
    for i in range(4):
        x, y = data(i)
        steps[i % 2](x, y)
        expected.zero_grad()
        (F.mse_loss, F.l1_loss)[i % 2](reference(x), y).backward()
        expected.step()
    assert_same((module, optimizer), (reference, expected))
