"""What lies around a step or a call in the user's thread counts on every device, or is refused by name."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import queue
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastdp

DEVICES = (1, 2, 3, 8)
SCALE = contextvars.ContextVar("scale", default=1.0)
each_number = pytest.mark.parametrize("devices", DEVICES)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        tiny = (x * 1e-310).sum(1, keepdim=True) * 1e308  # gone where subnormal numbers are flushed
        made = torch.ones(3, dtype=torch.float64)
        return self.last(torch.tanh(self.first(x))) * made + tiny


class Net(Bare):
    """A module that reads whatever may lie around its call."""

    def forward(self, x):
        return super().forward(x) * SCALE.get()


def data(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    kind = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, 4, **kind), torch.randn(rows, 3, **kind)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def run_loop(model, around, *, backward_inside=False):
    optimizer, losses, (x, y) = sgd(model.parameters()), [], data()
    for _ in range(2):
        optimizer.zero_grad()
        with around():
            loss = F.mse_loss(model(x), y)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_steps(model, around, reduction=None):
    step, (x, y), losses = model.train_step(F.mse_loss, sgd, reduction=reduction), data(), []
    for _ in range(2):
        with around():
            losses.append(step(x, y).item())
    return losses


@contextlib.contextmanager
def scaled():
    token = SCALE.set(3.0)
    try:
        yield
    finally:
        SCALE.reset(token)


@contextlib.contextmanager
def flushed():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def doubled_when_unpacked():
    """Not what torch asks of hooks, but a difference that shows."""
    return graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2 if t.ndim == 2 else t)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


COUNTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "autocast switched off inside": lambda: nested(torch.autocast("cpu"), torch.autocast("cpu", enabled=False)),
    "hooks on saved tensors": doubled_when_unpacked,
    "save_on_cpu": graph.save_on_cpu,
    "context variables": scaled,
    "subnormal numbers": flushed,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "backward in one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "default device": lambda: default_device("cpu"),
    "a generator that is set back": lambda: torch.random.fork_rng(devices=[]),
}


@contextlib.contextmanager
def nested(*scopes):
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(scope)
        yield


def assert_equal_runs(ours, theirs, module, reference, *, rough=False):
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if rough else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(ours, theirs, **tolerance)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize(("devices", "backward_inside"), [(1, False), (2, True), (3, False), (8, False)])
@pytest.mark.parametrize("around", COUNTS)
def test_what_lies_around_calls_counts(around, devices, backward_inside):
    module = Net()
    reference = copy.deepcopy(module)
    theirs = run_loop(reference, COUNTS[around], backward_inside=backward_inside)
    ours = run_loop(fastdp.wrap(module, gpus=devices), COUNTS[around], backward_inside=backward_inside)
    assert_equal_runs(ours, theirs, module, reference, rough="autocast" in around)


@pytest.mark.parametrize(("devices", "reduction"), [(1, None), (2, None), (3, "mean"), (8, None)])
@pytest.mark.parametrize("around", COUNTS)
def test_what_lies_around_train_steps_counts(around, devices, reduction):
    module = Net()
    reference = copy.deepcopy(module)
    theirs = run_loop(reference, COUNTS[around], backward_inside=True)
    ours = run_steps(fastdp.wrap(module, gpus=devices), COUNTS[around], reduction)
    assert_equal_runs(ours, theirs, module, reference, rough="autocast" in around)


@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (4, 5, 6, 7)])
@pytest.mark.parametrize("around", ["context variables", "subnormal numbers", "hooks on saved tensors", "save_on_cpu"])
@pytest.mark.parametrize("devices", [1, 3])
def test_captured_steps_notice_what_lies_around_some_of_them(devices, around, steps):
    module, (x, y) = (Net() if around == "context variables" else Bare()), data()
    reference = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=devices, compile="trace").train_step(F.mse_loss, sgd, reduction="mean")
    optimizer, ours, theirs = sgd(reference.parameters()), [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastdp runs 'Net' eagerly: .* a context variable")  # it runs eagerly
        for number in range(8):
            scope = COUNTS[around]() if number in steps else contextlib.nullcontext()
            with scope:
                ours.append(step(x, y).item())
        for number in range(8):
            scope = COUNTS[around]() if number in steps else contextlib.nullcontext()
            optimizer.zero_grad()
            with scope:
                loss = F.mse_loss(reference(x), y)
                loss.backward()
            optimizer.step()
            theirs.append(loss.item())
    assert_equal_runs(ours, theirs, module, reference)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@each_number
def test_calls_without_gradients_have_none_and_train_steps_train(devices, around):
    module, (x, _) = Net(), data()
    model = fastdp.wrap(module, gpus=devices)
    with around():
        outputs = model(x)
        expected = module(x)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=0)
    with torch.set_grad_enabled(False), torch.enable_grad():
        assert model(x).requires_grad
    reference = copy.deepcopy(module)
    assert_equal_runs(run_steps(model, around), run_loop(reference, contextlib.nullcontext), module, reference)


class Told(nn.Module):
    """Notes the thread state that a replica finds."""

    found: queue.SimpleQueue

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        kinds = ("cpu", "cuda")
        enabled = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        Told.found.put((enabled, torch.is_autocast_cache_enabled()))
        return self.layer(x)


@contextlib.contextmanager
def autocast_of_both_kinds():
    """As torch.autocast("cuda") does it where there is a GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.set_autocast_cache_enabled(True)


def test_autocast_of_gpus_reaches_every_replica_and_ends_with_its_pass():
    model, (x, _) = fastdp.wrap(Told(), gpus=3), data()
    plain = ((False, torch.bfloat16), (False, torch.get_autocast_dtype("cuda"))), True
    for around, expected in (
        (autocast_of_both_kinds, (((False, torch.bfloat16), (True, torch.bfloat16)), False)),
        (contextlib.nullcontext, plain),
    ):
        model.eval() if expected == plain else model.train()
        Told.found = queue.SimpleQueue()  # no list: forward must not change what all devices share
        with torch.no_grad(), around():
            model(x)
        assert Told.found.qsize() >= 3
        assert {Told.found.get() for _ in range(Told.found.qsize())} == {expected}


def test_hooks_on_saved_tensors_are_called_by_one_replica_at_a_time_and_not_in_trials():
    busy, threads, most = [0], set(), [0]

    def pack(tensor):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        threads.add(threading.get_ident())
        assert not any(tensor is p for p in others)
        busy[0] -= 1
        return tensor

    module, (x, y), others = Net(), data(), []
    model = fastdp.wrap(module, gpus=3)
    with graph.saved_tensors_hooks(pack, lambda t: t):
        F.mse_loss(model(x), y).backward()
    assert most == [1]
    assert len(threads) == 4  # three replicas, and the loss


@each_number
def test_a_module_may_not_use_hooks_on_saved_tensors_where_they_are_disabled(devices):
    class Offloads(Net):
        def forward(self, x):
            with graph.save_on_cpu():
                return super().forward(x)

    model, (x, y) = fastdp.wrap(Offloads(), gpus=devices), data()
    with graph.disable_saved_tensors_hooks("not here"), pytest.raises(RuntimeError, match="not here"):
        model(x)
    F.mse_loss(model(x), y).backward()


@pytest.mark.parametrize("reentrant", [False, True])
@each_number
def test_a_checkpoint_around_a_call(devices, reentrant):
    def loop(model):
        x, y = data()
        loss = F.mse_loss(checkpoint(lambda x: torch.tanh(model(x)), x.requires_grad_(), use_reentrant=reentrant), y)
        loss.backward()
        return [loss.item(), x.grad]

    module = Net()
    reference = copy.deepcopy(module)
    torch.testing.assert_close(loop(fastdp.wrap(module, gpus=devices)), loop(reference), rtol=1e-9, atol=1e-12)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.tanh else found


class DoublingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.ops.aten.tanh.default else found


REFUSED = {
    "function mode": (Doubling, "inside the mode Doubling.*model.module"),
    "dispatch mode": (DoublingBelow, "inside the mode DoublingBelow.*model.module"),
    "FLOPs": (lambda: FlopCounterMode(display=False), "inside the mode FlopCounterMode.*model.module"),
    "changes of saved tensors": (graph.allow_mutation_on_saved_tensors, "inside the mode CloneArgBeforeMutateMode"),
    "default device": (lambda: default_device("meta"), "default device 'meta'.*device=x.device"),
    "forward mode": (torch.autograd.forward_ad.dual_level, "tangents.*model.module"),
    "cached parametrizations": (parametrize.cached, r"parametrize.cached\(\).*Leave it out"),
}


def parametrized():
    net = Net()
    parametrizations.weight_norm(net.first)
    return net


@pytest.mark.parametrize("how", ["call", "step"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_count_is_refused_by_name_and_the_next_step_is_right(kind, how):
    around, message = REFUSED[kind]
    module = parametrized()
    reference, before, (x, y) = copy.deepcopy(module), copy.deepcopy(module.state_dict()), data()
    model = fastdp.wrap(module, gpus=3)
    step = model.train_step(F.mse_loss, sgd)
    with around(), pytest.raises(NotImplementedError, match=message):
        model(x) if how == "call" else step(x, y)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert_equal_runs(
        run_steps(model, contextlib.nullcontext), run_loop(reference, contextlib.nullcontext), module, reference
    )


@pytest.mark.parametrize("kind", ["dispatch mode", "FLOPs"])
def test_a_backward_pass_alone_in_a_mode_is_refused(kind):
    around, message = REFUSED[kind]
    module, (x, y) = Net(), data()
    loss = F.mse_loss(fastdp.wrap(module, gpus=2)(x), y)
    with around(), pytest.raises(NotImplementedError, match=message):
        loss.backward()


def test_on_one_device_modes_count():
    module, (x, y) = Net(), data()
    reference = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=1).train_step(F.mse_loss, sgd)
    counter, expected = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counter:
        step(x, y)
    with expected:
        F.mse_loss(reference(x), y).backward()
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    assert_equal_runs(
        run_steps(fastdp.wrap(module, gpus=1), Doubling), run_loop(module_after(reference), Doubling), module, reference
    )


def module_after(reference):
    """The reference after the update that its backward pass was for."""
    sgd(reference.parameters()).step()
    return reference


def test_transforms_and_traces_are_refused():
    model, (x, _) = fastdp.wrap(Net(), gpus=2), data()
    with pytest.raises(NotImplementedError, match=r"torch.func.*model.module"):
        torch.func.grad(lambda x: model(x).sum())(x)
    with pytest.raises(NotImplementedError, match=r"torch.func.*model.module"):
        torch.func.vmap(model)(x[:, None])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_parallel_module_inside_another_is_refused(wrapped):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 3).double()
            self.inner = fastdp.wrap(Net(), gpus=2)

        def forward(self, x):
            return self.last(self.inner(x))

    x, y = data()
    model = fastdp.wrap(Outer(), gpus=2)
    with pytest.raises(NotImplementedError, match=r"inside the forward of another parallel module.*model.module"):
        model.train_step(F.mse_loss, sgd)(x, y) if wrapped else model(x)


@each_number
def test_the_loop_trains_what_is_in_front_of_it(devices):
    torch.manual_seed(0)
    encoder, module, (x, y) = nn.Linear(4, 4).double(), Net(), data()
    others = copy.deepcopy((encoder, module))
    for front, model in ((encoder, fastdp.wrap(module, gpus=devices)), others):
        F.mse_loss(model(front(x)), y).backward()
    for ours, theirs in zip((encoder, module), others, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_on_one_device_a_train_step_trains_what_is_in_front_of_it():
    torch.manual_seed(0)
    encoder, module, (x, y) = nn.Linear(4, 4).double(), Net(), data()
    reference, front = copy.deepcopy(module), copy.deepcopy(encoder)
    fastdp.wrap(module, gpus=1).train_step(F.mse_loss, sgd)(encoder(x), y)
    F.mse_loss(reference(front(x)), y).backward()
    for p, q in zip(encoder.parameters(), front.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_on_several_devices_train_steps_refuse_tensors_with_graphs(devices):
    torch.manual_seed(0)
    encoder, module, (x, y) = nn.Linear(4, 4).double(), Net(), data()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, sgd)
    before = copy.deepcopy(module.state_dict())
    for inputs, target in ((encoder(x), y), (x, y.clone().requires_grad_()), (nn.Parameter(x), y)):
        with pytest.raises(ValueError, match=r"must not require gradients.*model\(x\), y.*detach"):
            step(inputs, target)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    step(encoder(x).detach(), y)


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(4, 3).double())

    def forward(self, x):
        with parametrize.cached():
            return self.layer(x) + F.linear(x, self.layer.weight)


@each_number
def test_a_cache_inside_forward_is_right_on_one_device_and_refused_on_several(devices):
    module, (x, y) = Cached(), data()
    reference = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices)
    if devices > 1:
        with pytest.raises(NotImplementedError, match=r"parametrize.cached\(\).*weight = self.layer.weight"):
            model.train_step(F.mse_loss, sgd)(x, y)
        with pytest.raises(NotImplementedError, match=r"parametrize.cached\(\)"):
            model(x)
        assert parametrize._cache_enabled == 0
        return
    none = contextlib.nullcontext
    assert_equal_runs(run_steps(model, none), run_loop(reference, none), module, reference)


class Sets(Net):
    reset = False

    def forward(self, x):
        token = SCALE.set(2.0)
        found = super().forward(x)
        if self.reset:
            SCALE.reset(token)
        return found


@pytest.mark.parametrize("how", ["call", "step"])
def test_context_variables_that_forward_sets_are_refused_unless_it_resets_them(how):
    module, (x, y) = Sets(), data()
    reference = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=3)
    step = model.train_step(F.mse_loss, sgd)
    with pytest.raises(RuntimeError, match=r"context variable 'scale'.*Return the value"):
        model(x) if how == "call" else step(x, y)
    assert SCALE.get() == 1.0
    module.reset = reference.reset = True
    none = contextlib.nullcontext
    assert_equal_runs(run_steps(model, none), run_loop(reference, none), module, reference)


def test_hooks_on_several_gradients_run_in_loops_and_are_refused_by_train_steps():
    module, (x, y), seen = Bare(), data(), []
    reference, model = copy.deepcopy(module), fastdp.wrap(module, gpus=3)
    graph.register_multi_grad_hook(list(module.parameters()), lambda found: seen.append([g.clone() for g in found]))
    F.mse_loss(model(x), y).backward()
    F.mse_loss(reference(x), y).backward()
    torch.testing.assert_close(seen, [[p.grad for p in reference.parameters()]], rtol=1e-9, atol=1e-12)
    with pytest.raises(NotImplementedError, match=r"register_multi_grad_hook.*loss.backward\(\)"):
        model.train_step(F.mse_loss, sgd)(x, y)


class Slopes(nn.Module):
    """Along one direction, in forward."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(2)
        self.how, self.first, self.last = how, nn.Linear(4, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        def inner(value):
            return torch.tanh(self.first(value))

        ones = torch.ones_like(x)
        if self.how == "jvp":
            slope = torch.func.jvp(inner, (x,), (ones,))[1]
        elif self.how == "jacfwd":
            slope = torch.func.vmap(torch.func.jacfwd(inner))(x).sum(2)
        elif self.how == "dual":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, ones)
                slope = torch.autograd.forward_ad.unpack_dual(inner(dual)).tangent
        elif self.how == "jacrev":
            slope = torch.func.vmap(torch.func.jacrev(inner))(x).sum(2)
        elif self.how == "vjp":
            slope = torch.func.vjp(inner, x)[1](ones)[0]
        else:
            slope = torch.autograd.functional.jvp(inner, x, ones, create_graph=True)[1]
        return self.last(slope)


def slopes(how, devices):
    module = Slopes(how)
    model = fastdp.wrap(module, gpus=devices) if devices else module
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    return [p.grad for p in module.parameters()]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own decompositions
@pytest.mark.parametrize("how", ["jvp", "jacfwd", "dual"])
def test_forward_mode_derivatives_in_forward_are_refused_on_several_devices(how):
    """Torch keeps one state of them per process."""
    for one, other in zip(slopes(how, 0), slopes(how, 1), strict=True):
        torch.testing.assert_close(other, one)
    with pytest.raises(Exception, match=r"Forward-mode derivatives .*torch\.func\.vjp"):
        slopes(how, 3)


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("how", ["jacrev", "vjp", "functional"])
def test_reverse_mode_derivatives_in_forward_are_those_of_one_device(how, devices):
    for one, other in zip(slopes(how, 0), slopes(how, devices), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
