"""Modules under `torch.compile` keep a compilation for each replica, and train as on one device."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

# Torch's compiler looks at all attributes of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
SIZES = (7, 5, 7)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", False)  # a record for each step of the compiler
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(4, 5), nn.Dropout(drop), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.first(x))))


class Drawless(Net):
    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class Centered(Net):
    def forward(self, x):
        found = super().forward(x)
        total = fastdp.replica.all_reduce(found.sum(0))
        return found - total / fastdp.replica.all_reduce(found.new_ones(()) * found.shape[0])


class WithParts(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


@torch.compile(backend="eager")
def doubled(x):
    return torch.tanh(x) * 2


class CallsCompiled(Net):
    def forward(self, x):
        return doubled(super().forward(x))


def in_place(module, **options):
    module.compile(**options)
    return module


EAGER, AOT = {"backend": "eager"}, {"backend": "aot_eager"}
MODULES = {
    "torch.compile": lambda: torch.compile(Net(), **EAGER),
    "compile()": lambda: in_place(Net(), **EAGER),
    "a part": lambda: WithParts(torch.compile(Net(), **EAGER)),
    "a function": CallsCompiled,
    "dropout": lambda: torch.compile(Net(0.5), **EAGER),
    "dropout with a graph of its backward pass": lambda: in_place(Net(0.5), **AOT),
    "batch normalization": lambda: torch.compile(Normalized(), **EAGER),
    "collectives": lambda: torch.compile(Centered(), **EAGER),
}


def data():
    generator = torch.Generator().manual_seed(1)
    kind = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(rows, 4, **kind), torch.randn(rows, 3, **kind)) for rows in SIZES]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def run_loop(call, parameters, loss_fn=F.mse_loss):
    torch.manual_seed(3)
    optimizer, losses = sgd(parameters), []
    for x, y in data():
        optimizer.zero_grad()
        loss = loss_fn(call(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def run_steps(model, loss_fn=F.mse_loss):
    torch.manual_seed(3)
    step = model.train_step(loss_fn, sgd)
    return [step(x, y) for x, y in data()]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "devices"), [*((kind, 2) for kind in MODULES), ("dropout", 1), ("a part", 8)])
def test_compiled_modules_train_as_on_one_device(kind, devices):
    reference, module = MODULES[kind](), MODULES[kind]()
    expected = run_loop(reference, reference.parameters())
    model = fastdp.wrap(module, gpus=devices, sync_batch_norm=True)
    in_steps = kind in ("a part", "dropout", "compile()")
    assert_equal(run_steps(model) if in_steps else run_loop(model, model.parameters()), expected)
    assert_equal(dict(module.state_dict()), dict(reference.state_dict()))


def counting():
    """A backend that counts compilations, and on which threads compiled code runs."""
    compiled, ran = [], Counter()

    def backend(graph, inputs):
        compiled.append(graph)

        def run(*args):
            ran[threading.current_thread().name] += 1
            return graph.forward(*args)

        return run

    return backend, compiled, ran


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", [lambda module, backend: torch.compile(module, backend=backend), None])
def test_each_replica_compiles_once_and_trials_do_not(how, late):
    backend, compiled, ran = counting()
    module = Drawless()
    x = torch.randn(9, 4, dtype=torch.float64)
    if how is not None:
        module = WithParts(how(module, backend))
    model = fastdp.wrap(module, gpus=3)
    if how is None:
        if late:
            model(x)
        module.compile(backend=backend)
    for _ in range(2):
        model(x).sum().backward()
    before = len(compiled)
    ran.clear()
    for _ in range(3):
        model(x).sum().backward()
    assert len(compiled) == before
    assert ran == {f"fastdp-virtual:{rank}": 3 for rank in range(3)}


def test_a_module_that_is_compiled_after_its_first_call_is_not_captured():
    backend, compiled, _ = counting()
    module, x = Drawless(), torch.randn(9, 4, dtype=torch.float64)
    model = fastdp.wrap(module, gpus=3, compile="trace")
    model(x)
    module.compile(backend=backend)

    def passes():
        for _ in range(3):
            model(x).sum().backward()

    with pytest.warns(UserWarning, match=r"torch\.compile: the module runs its own compilation"):
        passes()
    assert len(compiled) == 3


@pytest.mark.parametrize("devices", [1, 2])
def test_torch_compile_leaves_a_parallel_module_and_its_steps_as_they_are(devices):
    reference = Net()
    expected = run_loop(reference, reference.parameters())

    model = fastdp.wrap(Net(), gpus=devices)
    assert_equal(run_loop(torch.compile(model, **EAGER), model.parameters()), expected)

    model = fastdp.wrap(Net(), gpus=devices)
    loss_of = torch.compile(lambda outputs, y: F.mse_loss(model(outputs), y), **EAGER)
    assert_equal(run_loop(lambda x: x, model.parameters(), loss_of), expected)

    step = fastdp.wrap(Net(), gpus=devices).train_step(F.mse_loss, sgd)
    compiled = torch.compile(lambda x, y: step(x, y) * 1.0, **EAGER)
    torch.manual_seed(3)
    assert_equal([compiled(x, y) for x, y in data()], expected)


@pytest.mark.parametrize(("devices", "reduction"), [(1, None), (2, "mean"), (3, None)])
def test_compiled_loss_functions(devices, reduction):
    reference = Net()
    expected = run_loop(reference, reference.parameters())
    step = fastdp.wrap(Net(), gpus=devices).train_step(torch.compile(F.mse_loss, **EAGER), sgd, reduction=reduction)
    assert_equal([step(x, y) for x, y in data()], expected)
