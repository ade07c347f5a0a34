"""`shard_optimizer=True` for torch modules: each device steps its own parameters, with the bits of one optimizer."""

from __future__ import annotations

import copy
import io
import itertools
from functools import partial

import pytest
import torch
from faults import Fault, injected
from torch import nn, optim
from torch.amp import GradScaler
from torch.optim import lr_scheduler

import fastdp
from fastdp.program.torch.sharded import OptimizerShards

LARGE = 1 << 19  # elements that several threads would share


def net(width: int = 8, *, words: bool = False) -> nn.Module:
    torch.manual_seed(3)
    first = nn.EmbeddingBag(30, width, mode="sum", sparse=True) if words else nn.Linear(5, width)
    return nn.Sequential(first, nn.Tanh(), *(nn.Linear(width, width) for _ in range(6)), nn.Linear(width, 2))


def run(count, make, steps=range(3), *, shards=True, module=None, state=None, before=lambda step, number: None, **kw):
    """Train; the module and its step."""
    module = net() if module is None else module
    words = isinstance(module[0], nn.EmbeddingBag)
    parallel = fastdp.wrap(module, gpus=count, compile=None, shard_optimizer=shards, shards=8, **kw.pop("wrapped", {}))
    step = parallel.train_step(nn.MSELoss(), make, **kw)
    if state is not None:
        step.load_state_dict(state)
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x = torch.randint(30, (9, 4), generator=generator) if words else torch.randn(9, 5, generator=generator)
        before(step, number)
        step(x, torch.randn(9, 2, generator=generator))
    return parallel, step


def bits(trained):
    """Of weights and of the optimizers' state dicts."""
    parallel, step = trained
    out = [tensor.numpy().tobytes() for tensor in parallel.module.state_dict().values()]
    for one in step.optimizers:
        state = one.state_dict()
        out.append(repr([{k: v for k, v in group.items() if k != "foreach"} for group in state["param_groups"]]))
        for number, kept in state["state"].items():
            out += [(number, k, v.numpy().tobytes() if isinstance(v, torch.Tensor) else v) for k, v in kept.items()]
    return out


def matrices(parameters):
    return [p for p in parameters if p.ndim == 2]


def vectors(parameters):
    return [p for p in parameters if p.ndim != 2]


def scheduled(parameters, rates):
    made = optim.SGD(parameters, 0.1, momentum=0.9)
    rates.append(lr_scheduler.ExponentialLR(made, 0.5))
    return made


def two_groups(parameters):
    groups = [{"params": parameters[:3], "lr": 0.1, "weight_decay": 0.2}, {"params": parameters[3:]}]
    return optim.AdamW(groups, 0.01, amsgrad=True)


MADE = {
    **{
        one.__name__: partial(one, lr=0.01) for one in (optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam, optim.Rprop)
    },
    **{one.__name__: partial(one, lr=0.01) for one in (optim.Adagrad, optim.Adadelta, optim.ASGD, optim.Adafactor)},
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
    "Nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "foreach": lambda p: optim.Adam(p, 0.01, foreach=True),
    "fused": lambda p: optim.AdamW(p, 0.01, fused=True),
    "a rate in a tensor": lambda p: optim.Adam(p, torch.tensor(0.01)),
    "groups": two_groups,
    "several": lambda p: [optim.Muon(matrices(p), 0.01), optim.SGD(vectors(p), 0.1)],
}


@pytest.mark.parametrize("name", MADE)
def test_the_bits_are_those_of_one_optimizer(name):
    assert bits(run(3, MADE[name])) == bits(run(3, MADE[name], shards=False))


def frozen(parameters):
    for parameter in parameters[2:4]:
        parameter.requires_grad_(False)
    return optim.Adam(parameters, 0.01)


RULES = {
    "clipping": (MADE["Adam"], lambda: {"clip_grad_norm": 0.05, "grad_norm": True}),
    "accumulation": (MADE["Adam"], lambda: {"accumulate": 2}),
    "frozen parameters": (frozen, dict),
    "scaler": (MADE["Adam"], lambda: {"scaler": GradScaler("cpu", init_scale=2.0**127, growth_interval=2)}),
    "scaler and fused": (MADE["fused"], lambda: {"scaler": GradScaler("cpu", init_scale=2.0**127, growth_interval=2)}),
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_done_to_the_whole_gradient_is_done_once(name):
    make, options = RULES[name]
    assert bits(run(3, make, **options())) == bits(run(3, make, shards=False, **options()))


def test_sparse_gradients_stay_sparse():
    def make(parameters):
        return [optim.SparseAdam(parameters[:1], 0.1), optim.Adam(parameters[1:], 0.01)]

    def trained(**options):
        return bits(run(3, make, module=net(words=True), **options))

    assert trained() == trained(shards=False)


def test_a_scheduler_counts_the_steps():
    def trained(**options):
        rates = []
        return bits(run(3, partial(scheduled, rates=rates), before=lambda *_: rates and rates[0].step(), **options))

    with pytest.warns(UserWarning, match=r"lr_scheduler.step"):  # which comes before the first step, and only then
        assert trained() == trained(shards=False)


@pytest.mark.parametrize("count", [2, 8])
def test_a_checkpoint_goes_on_on_another_number_of_devices_with_the_same_bits(count):
    begun = run(3, MADE["Adam"], range(2))
    file = io.BytesIO()
    torch.save([begun[0].state_dict(), begun[1].state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file)
    module = net()
    module.load_state_dict(weights)
    resumed = run(count, MADE["Adam"], range(2, 4), module=module, state=state)
    assert bits(resumed) == bits(run(1, MADE["Adam"], range(4), shards=False))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_bytes_of_slots_are_divided(count):
    module = nn.Sequential(nn.Linear(5, 16), *(nn.Linear(16, 16) for _ in range(22)), nn.Linear(16, 2))
    parallel, step = run(count, MADE["Adam"], range(1), module=module)
    nbytes = [device.nbytes["slots"] for device in parallel.report().devices if device.nbytes["slots"]]
    whole = sum(value.nbytes for kept in step.optimizer.state.values() for value in kept.values())
    assert sum(nbytes) == whole
    assert len(nbytes) == count
    assert max(nbytes) - min(nbytes) <= 2 * 4 * 16 * 17 + 64
    assert "on each device, for its part of the weights: whole parameters" in str(parallel.report())


def test_frozen_parameters_weigh_nothing():
    shards = OptimizerShards()
    for rank, device in enumerate(fastdp.wrap(net(), gpus=2).devices):
        shards.add(device, rank)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (90, 30, 20, 10)]
    assert shards.owners(parameters) == [0, 1, 1, 1]
    parameters[0].requires_grad_(False)
    assert shards.owners(parameters)[1:] == [0, 1, 1]


def test_only_what_does_not_depend_on_threads_steps_at_the_same_time():
    parameters = [nn.Parameter(torch.zeros(3))]
    assert OptimizerShards.in_threads([optim.Adam(parameters)], parameters)
    assert not OptimizerShards.in_threads([optim.Adam(parameters), optim.Adafactor(parameters)], parameters)
    assert not OptimizerShards.in_threads([optim.Adam(parameters)], [parameters[0].bfloat16()])
    module = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, LARGE // 2), nn.Linear(LARGE // 2, 2))
    twin = copy.deepcopy(module)
    sharded = run(2, MADE["Adam"], range(2), module=module)
    assert bits(sharded) == bits(run(2, MADE["Adam"], range(2), module=twin, shards=False))


def test_numbers_that_are_not_finite_change_nothing():
    parallel, step = run(3, MADE["Adam"], skip_nonfinite=True)
    before = bits((parallel, step))
    step(torch.full((9, 5), torch.nan), torch.zeros(9, 2))
    assert step.result.skipped
    assert bits((parallel, step)) == before


def fail_in(monkeypatch, call):
    """Let Adam's step fail behind its work in this call of all devices, which may come at the same time."""
    numbers, plain = itertools.count(), optim.Adam.step  # `next` of it is atomic

    def fails(self, closure=None):
        number = next(numbers)
        result = plain(self, closure)
        if number == call:
            raise ArithmeticError("of a device")
        return result

    monkeypatch.setattr(optim.Adam, "step", fails)


@pytest.mark.parametrize("call", range(3))
def test_a_failed_update_changes_neither_weights_nor_state(call, monkeypatch):
    parallel, step = run(3, MADE["Adam"], range(0))
    own = step.optimizer.param_groups[0]
    fail_in(monkeypatch, call)
    before = bits((parallel, step))
    with pytest.raises(ArithmeticError, match="no replica's weights were changed"):
        step(torch.ones(9, 5), torch.zeros(9, 2))
    assert bits((parallel, step)) == before
    assert step.optimizer.param_groups == [own]
    monkeypatch.undo()
    assert "step" not in vars(step.optimizer)


def test_an_update_that_is_trusted_and_fails_says_what_may_have_changed(monkeypatch):
    parallel, step = run(3, MADE["Adam"])
    before = bits((parallel, step))
    fail_in(monkeypatch, 1)
    with pytest.raises(ArithmeticError, match=r"Weights and optimizer state may have been updated in part\. Load a"):
        step(torch.ones(9, 5), torch.zeros(9, 2))
    assert bits((parallel, step)) != before


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
@pytest.mark.parametrize("kind", ["memory", "lose"])
def test_it_survives_with_the_state_of_a_device_that_is_lost(kind):
    def trained(**options):
        return run(3, MADE["Adam"], range(2), wrapped={"on_oom": "split", "on_device_loss": "continue"}, **options)

    parallel, step = trained()
    with injected(Fault("run", parallel.report().devices[-(kind == "lose")].name, kind)) as fault:
        step(torch.ones(9, 5), torch.zeros(9, 2))
    assert fault.struck
    other = trained(shards=False)
    other[1](torch.ones(9, 5), torch.zeros(9, 2))
    if kind == "lose":  # `shards`: not even the bits change
        assert [device.nbytes["slots"] > 0 for device in parallel.report().devices].count(True) == 2
        assert bits((parallel, step)) == bits(other)
    for ours, theirs in zip(parallel.module.parameters(), other[0].module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Own(optim.Adam):
    pass


def test_what_cannot_be_divided_is_refused_by_name():
    with pytest.raises(ValueError, match=r"updates each parameter by itself, and .*Own is not known to"):
        run(2, Own)
    parallel, step = run(2, MADE["Adam"])
    before = bits((parallel, step))
    hook = step.optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks on optimizer steps.*would see those of one device"):
        step(torch.ones(9, 5), torch.zeros(9, 2))
    hook.remove()
    assert bits((parallel, step)) == before
    with pytest.raises(NotImplementedError, match=r"shard_optimizer=True divides the optimizer of a train step"):
        parallel(torch.ones(9, 5)).sum().backward()
