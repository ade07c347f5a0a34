"""What forward and hooks write to attributes, lists and dicts is that of one device, or an error that names it."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from regression_step import data, plain_step
from torch import nn
from torch.nn import functional as F

import fastdp

DEVICES = [1, 2, 3, 8]
SEVERAL = [2, 3, 8]
SEEN: dict[str, torch.Tensor] = {}


class Net(nn.Module):
    """Writes what users keep for display."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.act, self.last = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        hidden = self.act(self.first(x))
        self.write(x, hidden)
        return self.last(hidden)

    def write(self, x, hidden):
        pass


class Steps(Net):
    steps = 0

    def write(self, x, hidden):
        self.steps += 1


class RowsSeen(Net):
    def __init__(self):
        super().__init__()
        self.rows, self.last_rows, self.mean = 0, 0, 0.0

    def write(self, x, hidden):
        self.rows += len(x)
        self.last_rows = len(x)
        self.mean = hidden.mean().item()


class Shown(Net):
    def write(self, x, hidden):
        self.hidden, self.turned = hidden.detach(), hidden.detach().t()
        self.total, self.average, self.peak = hidden.detach().sum(), hidden.detach().mean(0), hidden.detach().amax()


class Moving(Net):
    def __init__(self):
        super().__init__()
        self.average, self.total = torch.zeros(6, dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def write(self, x, hidden):
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)
        self.total = self.total + hidden.detach().sum()


class InPlace(Net):
    def __init__(self):
        super().__init__()
        self.total, self.state = torch.ones(6, dtype=torch.float64), {"mean": torch.zeros(6, dtype=torch.float64)}
        self.array = np.ones(6)

    def write(self, x, hidden):
        self.total += hidden.detach().sum(0)
        self.state["mean"].mul_(0.5).add_(hidden.detach().mean(0))
        self.array += hidden.detach().sum(0).numpy()


class Lists(Net):
    def __init__(self):
        super().__init__()
        self.history, self.recent, self.sizes = [], deque(maxlen=2), []

    def write(self, x, hidden):
        self.history.append(hidden.detach())
        self.recent.append(hidden.detach().mean())
        self.sizes.append((len(x), "rows"))


class Replaced(Net):
    def write(self, x, hidden):
        self.found = {"hidden": hidden.detach(), "deep": [(hidden.detach().mean(), "mean")], "steps": 1}
        self.part, self.function, self.used = self.first, torch.sin, {"weight": self.first.weight}


@dataclass
class Found:
    hidden: torch.Tensor
    means: list[torch.Tensor]
    steps: int


class Records(Net):
    found = None

    def write(self, x, hidden):
        steps = 1 if self.found is None else self.found.steps + 1
        self.found = Found(hidden.detach(), [hidden.detach().mean(0)], steps)
        self.space = SimpleNamespace(part=self.first, peak=hidden.detach().amax())


class Emptied(Net):
    def __init__(self):
        super().__init__()
        self.found, self.table = [], {}

    def write(self, x, hidden):
        self.found.clear()
        self.table.clear()
        self.found.append(hidden.detach())
        self.table["mean"] = hidden.detach().mean()


class Once(Net):
    ready = False

    def write(self, x, hidden):
        if not self.ready:
            self.ready, self.start = True, hidden.detach().mean(0)


def of_attributes(net):
    """What the module's attributes hold besides parameters, of all parts."""
    ours = set(vars(nn.Module()))
    return [{name: value for name, value in vars(part).items() if name not in ours} for part in net.modules()]


class InSlots:
    __slots__ = ("calls", "output")

    def __init__(self):
        self.calls = 0


def in_slots(net):
    kept = InSlots()

    def hook(part, arguments, output):
        kept.calls, kept.output = kept.calls + 1, output.detach()

    return hook, lambda: (kept.calls, kept.output)


def with_hook(make):
    """A module with a hook on its activation; `make` makes the hook and says where it writes."""

    def made():
        net = Net()
        hook, kept = make(net)
        net.act.register_forward_hook(hook)
        return net, kept

    return made


def features(net):
    found = {}
    return (lambda part, arguments, output: found.__setitem__("x", output.detach())), lambda: found


def appended(net):
    found = []
    return (lambda part, arguments, output: found.append(output.detach().mean(0))), lambda: found


def counted(net):
    count, rows = 0, 0

    def hook(part, arguments, output):
        nonlocal count, rows
        count, rows = count + 1, rows + len(output)

    return hook, lambda: (count, rows)


class Recorder:
    def __init__(self):
        self.outputs, self.calls = {}, 0

    def hook(self, part, arguments, output):
        self.calls += 1
        self.outputs[type(part).__name__] = output.detach()


def bound(net):
    recorder = Recorder()
    return recorder.hook, lambda: vars(recorder)


def on_the_part(net):
    return (lambda part, arguments, output: setattr(part, "output", output.detach())), lambda: net.act.output


def through_a_function(net):
    found = {}

    def note(name, value):
        found[name] = value.detach()

    return (lambda part, arguments, output: note("x", output)), lambda: found


def in_a_global(net):
    SEEN.clear()

    def hook(part, arguments, output):
        SEEN["x"] = output.detach()

    return hook, lambda: dict(SEEN)


def assigned_global(net):
    exec("def hook(part, arguments, output):\n    global COUNTED\n    COUNTED += len(output)", OTHER)
    OTHER["COUNTED"] = 0
    return OTHER["hook"], lambda: OTHER["COUNTED"]


OTHER = {"__name__": "a_script"}


def moved_hook(net):
    mean = torch.zeros(6, dtype=torch.float64)

    def hook(part, arguments, output):
        mean.add_(output.detach().sum(0))

    return hook, lambda: mean


def named_lists(net):
    found = defaultdict(list)
    return (lambda part, arguments, output: found["x"].append(output.mean().item())), lambda: dict(found)


class Losses(Net):
    def write(self, x, hidden):
        self.losses = []
        self.losses.append(hidden.detach().square().mean())
        self.losses.append(hidden.detach().sum())


class Read(Net):
    """What forward has written before changes its output."""

    def __init__(self):
        super().__init__()
        self.steps, self.average = 0, torch.zeros(6, dtype=torch.float64)

    def forward(self, x):
        hidden = self.act(self.first(x)) * (1 + 0.1 * self.steps) + self.average
        self.steps += 1
        self.average = 0.5 * self.average + hidden.detach().mean(0)
        return self.last(hidden)


def plain(kind):
    return lambda: (lambda net: (net, lambda: of_attributes(net)))(kind())


KINDS = {
    kind.__name__: plain(kind)
    for kind in (Steps, RowsSeen, Shown, Moving, InPlace, Lists, Replaced, Records, Emptied, Once, Read, Losses)
}
HOOKS = (
    named_lists,
    features,
    appended,
    counted,
    bound,
    on_the_part,
    through_a_function,
    in_a_global,
    assigned_global,
    moved_hook,
)
HOOKS = (*HOOKS, in_slots)
KINDS |= {hook.__name__: with_hook(hook) for hook in HOOKS}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def same(ours, theirs, path=""):
    """Compare what modules hold: tensors up to rounding, containers by content, parts by their parameters."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, (torch.Tensor, np.ndarray, float)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m: f"{path}: {m}")
    elif isinstance(ours, nn.Module):
        same(list(ours.parameters()), list(theirs.parameters()), path)
    elif isinstance(ours, (Found, SimpleNamespace)):
        same(vars(ours), vars(theirs), path)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            same(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, (list, tuple, deque)):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"{path}[{i}]")
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("how", ["step", "loop"])
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_forward_writes_is_that_of_the_whole_batch(kind, devices, how):
    def run(model_of):
        module, kept = KINDS[kind]()
        step, after = model_of(module), []
        for i, rows in enumerate((9, 9, 8, 3, 1, 9)):
            step(*data(i, rows))
            after.append(copy.deepcopy(kept()))
        return module, after

    def on_devices(module):
        model = fastdp.wrap(module, gpus=devices)
        if how == "step":
            return model.train_step(F.mse_loss, sgd)
        optimizer = sgd(model.parameters())
        return lambda x, y: plain_step(model, optimizer, x, y)

    def alone(module):
        optimizer = sgd(module.parameters())
        return lambda x, y: plain_step(module, optimizer, x, y)

    module, ours = run(on_devices)
    reference, theirs = run(alone)
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        same(*pair, f"step {i}")
    same(module.state_dict(), reference.state_dict())


class Auxiliary(Net):
    """Keeps values with their graphs for a loss."""

    def write(self, x, hidden):
        self.penalty, self.features, self.summed = hidden.square().mean(), {"x": hidden}, [hidden.sum(0)]
        self.weight = self.first.weight.square().sum()


def with_features():
    net = Auxiliary()
    kept = net.kept = {}
    net.last.register_forward_hook(lambda part, arguments, output: kept.update(y=output, x=arguments[0]))
    return net


LOSSES = {
    "mean": lambda net: net.penalty,
    "rows": lambda net: (net.features["x"][1:] * net.features["x"][:-1]).sum(),
    "sum": lambda net: net.summed[0].square().sum() * 0.01,
    "the same": lambda net: net.weight,
    "by a hook": lambda net: (net.kept["y"] ** 3).mean() + net.kept["x"].std(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("devices", DEVICES)
def test_what_forward_keeps_with_its_graph_may_be_used_in_the_loss_of_a_loop(loss, devices):
    module, reference = with_features(), with_features()
    model, losses = fastdp.wrap(module, gpus=devices), []
    for net, call in ((module, model), (reference, reference)):
        optimizer = sgd(net.parameters())
        for i, rows in enumerate((9, 9, 3, 1, 8)):
            x, y = data(i, rows)
            optimizer.zero_grad()
            value = F.mse_loss(call(x), y) + LOSSES[loss](net)
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    torch.testing.assert_close(losses[:5], losses[5:], rtol=1e-9, atol=1e-11)
    same(module.state_dict(), reference.state_dict())


@pytest.mark.parametrize("how", ["step", "loop"])
@pytest.mark.parametrize("kind", ["Moving", "Lists", "Emptied", "features", "counted", "bound"])
def test_writes_of_every_step_do_not_make_copies_anew(kind, how):
    module, _ = KINDS[kind]()
    model = fastdp.wrap(module, gpus=3)
    step = model.train_step(F.mse_loss, sgd)
    program = step._program
    if how == "loop":
        optimizer = sgd(model.parameters())
        step = lambda x, y: plain_step(model, optimizer, x, y)  # noqa: E731
        step(*data(0))
        program = model._calls.program
    for i in range(5):
        step(*data(i))
    assert program._following.remade == 0


class Deviation(Net):
    def write(self, x, hidden):
        self.deviation = hidden.detach().std()


class Distribution(Net):
    def write(self, x, hidden):
        self.distribution = torch.distributions.Normal(hidden.detach(), 1.0)


class Sometimes(Net):
    def write(self, x, hidden):
        if x[0, 0] > 0:
            self.positive = True


class Lengths(Net):
    def write(self, x, hidden):
        self.text = f"{len(x)} rows"


class Recurrent(Net):
    state = None

    def forward(self, x):
        hidden = self.act(self.first(x)) if self.state is None else self.act(self.first(x) + self.state)
        self.state = hidden.detach()
        return self.last(hidden)


class LargeTotal(Net):
    def __init__(self):
        super().__init__()
        self.total = torch.ones(1 << 18, dtype=torch.float64)

    def write(self, x, hidden):
        self.total[:6] += hidden.detach().sum(0)


class Hidden(Net):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 3).double()]

    def forward(self, x):
        return self.layers[0](super().forward(x))


def gradients_kept():
    net, kept = Net(), []
    net.act.register_full_backward_hook(lambda part, given, wanted: kept.append(wanted[0]))
    return net


REFUSED = {
    "deviation": (Deviation, "sets `deviation` by the rows of the batch"),
    "distribution": (Distribution, "sets `distribution` to a Normal"),
    "sometimes": (Sometimes, "sets `positive` "),
    "text": (Lengths, "sets `text` to different values"),
    "large": (LargeTotal, "sets `total` in place, by the rows of the batch, .*make it a buffer"),
    "gradients": (gradients_kept, "sets `kept of .*` to different values on different devices"),
}


@pytest.mark.parametrize("how", ["step", "loop"])
@pytest.mark.parametrize("devices", SEVERAL)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(kind, devices, how):
    make, message = REFUSED[kind]
    module = make()
    before, held = copy.deepcopy(module.state_dict()), set(vars(module))
    model = fastdp.wrap(module, gpus=devices)
    x, y = data(0)
    x[:, 0] = torch.arange(9) - 4.5
    with pytest.raises(ValueError, match=rf"{message}.*(Return it from forward|in backward.* Let the module return)"):
        model.train_step(F.mse_loss, sgd)(x, y) if how == "step" else plain_step(model, sgd(model.parameters()), x, y)
    same(module.state_dict(), before)
    assert set(vars(module)) == held
    module(x)  # plain torch


@pytest.mark.parametrize("how", ["step", "loop"])
@pytest.mark.parametrize("devices", SEVERAL)
def test_trained_tensors_that_are_no_parameters_are_refused(devices, how):
    module = Hidden()
    model = fastdp.wrap(module, gpus=devices)
    step = model.train_step(F.mse_loss, sgd) if how == "step" else lambda x, y: model(x)
    with pytest.raises(ValueError, match=r"`layers\[0\]\.weight` gets gradients, but is no parameter.*nn.ModuleList"):
        step(*data(0))
    with torch.no_grad():
        torch.testing.assert_close(model(data(0)[0]), module(data(0)[0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("devices", SEVERAL)
def test_a_state_by_rows_that_the_next_forward_reads_is_refused(devices):
    module = Recurrent()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, sgd)
    step(*data(0))
    assert len(module.state) == 9
    with pytest.raises(ValueError, match="does not run on"):
        step(*data(1))
    module.state = None
    step(*data(1))


@pytest.mark.parametrize("devices", SEVERAL)
def test_a_failed_step_leaves_what_the_module_holds(devices):
    class Failing(Lists):
        fails, steps = False, 0

        def write(self, x, hidden):
            super().write(x, hidden)
            self.steps += 1
            if self.fails and len(hidden) > 3 and x[-1, 0] == 7.0:
                raise ArithmeticError("here")

    module = Failing()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, sgd)
    step(*data(0, 32))
    before, steps = list(module.history), module.steps
    x, y = data(1, 32)
    x[-1, 0] = 7.0
    module.fails = True
    with pytest.raises(ArithmeticError):
        step(x, y)
    assert module.steps == steps
    assert all(a is b for a, b in zip(module.history, before, strict=True))
    module.fails = False
    step(x, y)
    assert [len(one) for one in module.history] == [32, 32]
    assert module.steps == 2


class Criterion(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = [net]

    def forward(self, y, target):
        return F.mse_loss(y, target) + self.net[0].penalty


class Trainer:
    def __init__(self, net):
        self.net = net

    def loss(self, y, target):
        return F.mse_loss(y, target) + self.more()

    def more(self):
        return getattr(self.net, "penalty")  # noqa: B009


READERS = {
    "closure": lambda net: lambda y, target: F.mse_loss(y, target) + net.penalty,
    "list": lambda net: lambda y, target: F.mse_loss(y, target) + net.summed[0].sum(),
    "dict of a hook": lambda net: lambda y, target, kept=net.kept: F.mse_loss(y, target) + kept["y"].mean(),
    "module": Criterion,
    "method": lambda net: Trainer(net).loss,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("devices", SEVERAL)
def test_a_loss_function_of_a_train_step_that_reads_what_forward_sets_is_refused(reader, devices):
    module = with_features()
    before = copy.deepcopy(module.state_dict())
    step = fastdp.wrap(module, gpus=devices).train_step(READERS[reader](module), sgd)
    with pytest.raises(ValueError, match=r"The loss function reads `.*which forward sets.*Return it from forward"):
        step(*data(0))
    same(module.state_dict(), before)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_loss_function_may_read_what_forward_does_not_set(devices):
    module, reference = with_features(), with_features()
    optimizer = sgd(reference.parameters())

    def loss_of(net):
        return lambda y, target: F.mse_loss(y, target) + 0.01 * sum(p.square().sum() for p in net.parameters())

    step = fastdp.wrap(module, gpus=devices).train_step(loss_of(module), sgd)
    for i in range(3):
        x, y = data(i)
        optimizer.zero_grad()
        loss = loss_of(reference)(reference(x), y)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(step(x, y), loss.detach(), rtol=1e-9, atol=1e-11)
    same(module.state_dict(), reference.state_dict())
