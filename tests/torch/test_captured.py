"""Captured train steps of torch modules give plain torch's numbers on any number of devices, or say why not.

In float64, on eleven rows: the first step of a batch shape runs eagerly, two more are compared with the captured one,
and all others are replays.
"""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from small_buckets import make_buckets_small
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastdp
from fastdp.capture import patience, speed_trial
from fastdp.capture import steps as capture_steps
from fastdp.capture.compile.compiler import missing_compiler

ROWS, STEPS, DEVICES = 11, 6, (1, 2, 3, 8)
TOLERANCE = 1e-11
WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64)
Data = list[tuple[torch.Tensor, ...]]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """Dropout, a relu in place, and a buffer that follows the batches."""

    def __init__(self, rate: float = 0.0, outputs: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, outputs)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(rate)
        self.scale = 1.0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().mean()
        return self.last(self.drop(self.relu(self.first(x)))) * self.scale


def data(steps: int = STEPS, rows: int = ROWS, targets: str = "classes") -> Data:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(steps):
        x, numbers = torch.randn(rows, 6, generator=generator), torch.randn(rows, 4, generator=generator)
        classes = torch.randint(4, (rows,), generator=generator)
        made.append((x, {"classes": classes, "numbers": numbers, "shares": numbers.softmax(1)}[targets]))
    return made


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def plainly(module: nn.Module, batches: Data, loss_fn: Any, change: Callable[..., Any] | None = None) -> list[float]:
    """Train by plain torch. `change(step, module, optimizer)` is called before each step."""
    optimizer, losses = adam(module.parameters()), []
    torch.manual_seed(5)
    for i, (x, y) in enumerate(batches):
        if change is not None:
            change(i, module, optimizer)
        optimizer.zero_grad()
        loss = loss_fn(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def captured(
    module: nn.Module,
    batches: Data,
    loss_fn: Any,
    devices: int,
    change: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[list[float], Any]:
    """Train by captured steps; the losses, and the parallel module."""
    parallel = fastdp.wrap(module, gpus=devices, **({"compile": "trace"} | (options or {})))
    step, losses = parallel.train_step(loss_fn, adam, **how), []
    torch.manual_seed(5)
    for i, (x, y) in enumerate(batches):
        if change is not None:
            change(i, module, step.optimizer)
        losses.append(float(step(x, y)))
    return losses, parallel


def hows(parallel: Any) -> set[str]:
    return {entry["how"] for entry in parallel.report()}


def whys(parallel: Any) -> str:
    return "; ".join(entry.get("why", "") for entry in parallel.report())


def assert_same(module: nn.Module, reference: nn.Module, losses: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=TOLERANCE, atol=TOLERANCE)
    for (name, value), other in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def check(module: nn.Module, batches: Data, loss_fn: Any, devices: int, change: Any = None, **how: Any) -> Any:
    """Captured steps train as plain torch, and draw the same numbers. The parallel module."""
    reference = copy.deepcopy(module)
    expected, drawn = plainly(reference, batches, loss_fn, change), torch.rand(2)
    losses, parallel = captured(module, batches, loss_fn, devices, change, **how)
    assert_same(module, reference, losses, expected)
    assert torch.equal(torch.rand(2), drawn)
    return parallel


@pytest.mark.parametrize("devices", DEVICES)
def test_captured_steps_with_dropout_and_buffers_train_as_plain_torch(devices):
    parallel = check(Net(rate=0.3), data(), F.cross_entropy, devices)
    assert hows(parallel) == {"traced"}
    assert sum(entry["of"] for entry in parallel.report()) == ROWS * len(parallel.report())


LOSSES = {
    "class weights and rows that do not count": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=2), "classes"),
    "smoothed labels": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), "classes"),
    "a sum of classes": (nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), "classes"),
    "shares of classes": (nn.CrossEntropyLoss(WEIGHTS), "shares"),
    "a function with arguments": (partial(F.cross_entropy, weight=WEIGHTS, ignore_index=1), "classes"),
    "squares": (F.mse_loss, "numbers"),
    "a sum of squares": (nn.MSELoss(reduction="sum"), "numbers"),
    "a smooth distance": (nn.SmoothL1Loss(beta=0.5), "numbers"),
    "logits with weights": (nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=2 * WEIGHTS), "shares"),
    "a divergence per row": (nn.KLDivLoss(reduction="batchmean"), "shares"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_replica_computes_its_part_of_losses_that_torch_defines(loss):
    loss_fn, targets = LOSSES[loss]
    assert hows(check(Net(), data(5, targets=targets), loss_fn, 3)) == {"traced"}


def row_mean(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


def row_sum(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).abs().sum()


@pytest.mark.parametrize(("loss_fn", "reduction"), [(row_mean, "mean"), (row_sum, "sum")])
def test_losses_that_the_user_declares_are_captured(loss_fn, reduction):
    for devices in (1, 3):
        parallel = check(Net(), data(targets="numbers"), loss_fn, devices, reduction=reduction)
        assert hows(parallel) == {"traced"}


def test_other_losses_are_captured_on_one_device_and_run_eagerly_on_several_with_a_remedy():
    assert hows(check(Net(), data(targets="numbers"), row_mean, 1)) == {"traced"}
    parallel = check(Net(), data(targets="numbers"), row_mean, 2, options={"compile": "auto"})
    assert hows(parallel) == {"eager"}
    assert 'reduction="mean"' in whys(parallel)
    with pytest.warns(UserWarning, match="a loss that is computed on the merged outputs"):
        check(Net(), data(targets="numbers"), row_mean, 2)


def test_a_loss_in_which_rows_meet_by_their_shapes_is_not_taken_for_a_mean():
    module, batches = Net(outputs=1), [(x, y[:, 0]) for x, y in data(targets="numbers")]
    loss = nn.MSELoss()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        with pytest.warns(UserWarning, match="rows may meet"):
            parallel = check(module, batches, loss, 2)
    assert hows(parallel) == {"eager"}


@pytest.mark.parametrize("devices", [1, 3])
def test_running_statistics_are_those_of_the_whole_batch(devices):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    module[0].requires_grad_(False)  # then statistics depend on the inputs alone
    reference = copy.deepcopy(module)
    _, parallel = captured(module, data(), F.cross_entropy, devices)
    plainly(reference, data(), F.cross_entropy)
    assert hows(parallel) == {"traced"}
    assert int(module[1].num_batches_tracked) == STEPS
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(module[1], name), getattr(reference[1], name), rtol=1e-12, atol=1e-12)
    if devices == 1:
        assert hows(check(copy.deepcopy(module), data(), F.cross_entropy, 1)) == {"traced"}


def test_norms_that_run_twice_move_their_statistics_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.norm, self.last = nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(torch.tanh(self.norm(x))))

    assert hows(check(Twice(), data(), F.cross_entropy, 1)) == {"traced"}


def test_accumulated_gradients_and_clipping_are_as_in_eager_steps():
    for devices in (1, 3):
        modules = [Net(0.2), Net(0.2)]
        how = {"accumulate": 2, "clip_grad_norm": 0.1}
        expected, _ = captured(modules[0], data(8), F.cross_entropy, devices, options={"compile": None}, **how)
        losses, parallel = captured(modules[1], data(8), F.cross_entropy, devices, **how)
        assert hows(parallel) == {"traced"}
        assert_same(modules[1], modules[0], losses, expected)


@pytest.mark.parametrize("update", ["first", "each"])
def test_gradients_are_reduced_bucket_by_bucket(update, monkeypatch):
    make_buckets_small(monkeypatch)
    parallel = check(Net(), data(), F.cross_entropy, 3, options={"update": update, "check_replicas": True})
    assert hows(parallel) == {"traced"}
    assert parallel.report().buckets > 1


def test_outputs_of_captured_steps_are_those_of_eager_ones():
    found = []
    for devices, mode in ((1, None), (1, "trace"), (3, "trace")):
        step = fastdp.wrap(Net(0.2), gpus=devices, compile=mode).train_step(F.cross_entropy, adam, outputs=True)
        torch.manual_seed(5)
        found.append([])
        for x, y in data():
            step(x, y)
            found[-1].append(step.result.outputs)
    for outputs in found[1:]:
        for one, other in zip(outputs, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def lower_rate(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)


def freeze(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        module.first.requires_grad_(False)


def scale(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        module.scale = 0.5


def evaluate(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module.train(step not in (5, 6))


def assign(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        module.first.weight.data.mul_(0.5)
        module.seen.fill_(3.0)


def hook(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        module.first.register_forward_hook(lambda part, inputs, output: output * 2.0)


CHANGES = [(lower_rate, 3), (freeze, 1), (freeze, 3), (scale, 1), (evaluate, 3), (assign, 1), (assign, 3)]


@pytest.mark.parametrize(("change", "devices"), CHANGES)
def test_what_changes_between_two_steps_counts_in_the_next(change, devices):
    assert hows(check(Net(rate=0.2), data(10), F.cross_entropy, devices, change)) == {"traced"}


def test_a_hook_that_is_added_between_two_steps_counts_in_the_next():
    assert hows(check(Net(rate=0.2), data(10), F.cross_entropy, 1, hook)) == {"traced"}


class Counts(Net):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) / self.calls


class Reads(Net):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum() > 0 else 1.0)


class Flips(Net):
    def forward(self, x):
        import random

        return super().forward(x) * random.choice([1.0, 2.0])


class Renormalizes(Net):
    def forward(self, x):
        with torch.no_grad():
            self.first.weight.div_(self.first.weight.norm())
        return super().forward(x)


class Grows(Net):
    def forward(self, x):
        self.seen = torch.cat([self.seen.reshape(-1), x.detach().mean().reshape(1)])
        return self.last(self.first(x))


class Scribbles(Net):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class Remembers(Net):
    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(5)  # no buffer

    def forward(self, x):
        self.memory += x.detach().mean()
        return super().forward(x) + self.memory.mean()


class Unregistered(Net):
    def __init__(self):
        super().__init__()
        self.table = torch.ones(600)

    def forward(self, x):
        return super().forward(x) * self.table.mean()


class Borrows(Net):
    def __init__(self):
        super().__init__()
        self.others = [nn.Linear(6, 4)]

    def forward(self, x):
        return super().forward(x) + self.others[0](x)


class Samples(Net):
    def forward(self, x):
        return super().forward(x) * torch.bernoulli(torch.sigmoid(x.detach()[:, :4]))


class Iterates(Net):
    def __init__(self):
        super().__init__()
        self.scales = iter([1.0, 0.5] * 30)

    def forward(self, x):
        return super().forward(x) * next(self.scales)


class CountsOnClass(Net):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) * (1 + 0.1 * type(self).calls)


class ReadsFile(Net):
    def forward(self, x):
        with open(__file__) as file:
            return super().forward(x) * len(file.readline())


REFUSED = {
    Counts: "changes while the model trains",
    Reads: "needs values on the host",
    Renormalizes: "`first.weight`, which forward changes",
    Grows: "`seen`, whose shape or dtype forward changes",
    Remembers: "memory, which changes while the model trains",
    Unregistered: "table, a tensor of 4800 bytes that is no parameter or buffer",
    Borrows: "no parameter of the module and gets a gradient",
    Samples: "torch.bernoulli, whose parameters the step computes",
    Iterates: "scales, an iterator",
    ReadsFile: r"open in ReadsFile.forward(): what is in a file may change",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_step_that_no_graph_can_repeat_runs_eagerly_and_the_report_says_why(kind):
    with pytest.warns(UserWarning, match=re.escape(REFUSED[kind])):
        parallel = check(kind(), data(), F.cross_entropy, 1)
    assert hows(parallel) == {"eager"}
    assert REFUSED[kind] in whys(parallel)


def test_a_count_on_a_class_is_put_back_after_the_trace():
    expected, calls = plainly(CountsOnClass(), data(), F.cross_entropy), CountsOnClass.calls
    CountsOnClass.calls = 0
    with pytest.warns(UserWarning, match=r"CountsOnClass\.calls, which changes while the model trains"):
        losses, _ = captured(CountsOnClass(), data(), F.cross_entropy, 1)
    assert (losses, CountsOnClass.calls) == (expected, calls)


def test_a_hook_that_removes_itself_is_put_back_after_the_trace():
    def change(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == 1:  # a trace is made before this step, and runs the hook

            def hook(part: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
                handles.pop().remove()
                return output * 2

            handles = [module.first.register_forward_hook(hook)]

    with pytest.warns(UserWarning, match="_forward_hooks, which changes while the model trains"):
        check(Net(), data(), F.cross_entropy, 1, change)


def test_python_draws_are_refused_and_put_back():
    import random

    found = []
    for mode in (None, "trace"):
        random.seed(3)
        if mode is None:
            found.append(captured(Flips(), data(), F.cross_entropy, 1, options={"compile": None})[0])
        else:
            with pytest.warns(UserWarning, match="random, which the model draws random numbers from"):
                found.append(captured(Flips(), data(), F.cross_entropy, 1)[0])
    assert found[0] == found[1]


def test_a_step_that_writes_to_its_batch_runs_eagerly():
    batches, others = data(), data()
    expected = plainly(Scribbles(), others, F.cross_entropy)
    with pytest.warns(UserWarning, match="writes to what the step is given"):
        losses, _ = captured(Scribbles(), batches, F.cross_entropy, 1)
    assert losses == expected
    for (x, _), (y, _) in zip(batches, others, strict=True):
        assert torch.equal(x, y)


def test_a_hook_on_a_parameter_runs_in_each_step():
    reference, module = Net(), Net()
    for one in (reference, module):
        one.last.weight.register_hook(lambda gradient: gradient * 0.5)
    expected = plainly(reference, data(), F.cross_entropy)
    with pytest.warns(UserWarning, match="a hook on the parameter `last.weight`"):
        losses, _ = captured(module, data(), F.cross_entropy, 1)
    assert_same(module, reference, losses, expected)


def test_sparse_gradients_run_eagerly():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(0, 1), nn.Linear(4, 4))
    step = fastdp.wrap(module, gpus=1, compile="trace").train_step(
        F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1)
    )
    x, y = torch.arange(6).reshape(6, 1), torch.arange(6) % 4
    step(x, y)
    with pytest.warns(UserWarning, match="sparse gradients"):
        step(x, y)


class Secret(Net):
    """Reads a number that no walk over Python's objects finds: in the attributes of a function of torch's."""

    def forward(self, x):
        return super().forward(x) * F.relu.__dict__.get("secret", 1.0)


def test_a_value_that_no_guard_sees_is_found_in_the_steps_that_are_compared(monkeypatch):
    def change(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        monkeypatch.setitem(F.relu.__dict__, "secret", 1.0 + (step == 2))

    with pytest.warns(UserWarning, match="the loss, .* in which the captured step disagrees with the eager one"):
        parallel = check(Secret(), data(), F.cross_entropy, 1, change)
    assert hows(parallel) == {"eager"}


def test_a_number_among_the_arguments_has_its_own_graph():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.last = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, by: float, also: torch.Tensor) -> torch.Tensor:
            return self.last(x) * by * also

    def run(devices: int, mode: str | None) -> tuple[list[float], Any]:
        parallel = fastdp.wrap(Scaled(), gpus=devices, compile=mode)
        step = parallel.train_step(F.cross_entropy, adam)
        made = data(12)
        return [
            float(step((x, (0.5, 2.0)[i % 2], torch.tensor(1.0 + i)), y)) for i, (x, y) in enumerate(made)
        ], parallel

    expected, _ = run(1, None)
    for devices in (1, 2):
        losses, parallel = run(devices, "trace")
        assert hows(parallel) == {"traced"}
        assert len(parallel.report()) == 2 * devices
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_batch_with_its_axes_in_another_order_of_memory_draws_as_in_eager_steps():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Dropout(0.4), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(4))
    module(torch.zeros(2, 3, 5, 5))
    generator = torch.Generator().manual_seed(2)
    batches = []
    for i in range(10):
        x = torch.randn(ROWS, 3, 5, 5, generator=generator)
        batches.append((x.to(memory_format=torch.channels_last) if i % 2 else x, torch.arange(ROWS) % 4))
    assert hows(check(module, batches, F.cross_entropy, 1)) == {"traced"}


def test_a_failed_replay_changes_nothing_and_the_next_step_works():
    module, reference = Net(), Net()
    batches = data()
    bad = (batches[0][0], torch.full((ROWS,), 9))
    step = fastdp.wrap(module, gpus=2, compile="trace").train_step(F.cross_entropy, adam)
    for x, y in batches[:5]:
        step(x, y)
    with pytest.raises(IndexError):
        step(*bad)
    step(*batches[5])
    plainly(reference, batches, F.cross_entropy)
    for one, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_auto_leaves_code_that_prints_or_reads_a_clock_eager_and_says_so(capsys):
    class Chatty(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("forward")  # noqa: T201
            return super().forward(x)

    parallel = fastdp.wrap(Chatty(), gpus=1, compile="auto")
    parallel.train_step(F.cross_entropy, adam)
    assert "print in" in whys(parallel)
    assert 'compile="trace"' in whys(parallel)


def test_a_module_under_torch_compile_keeps_its_own_compilation():
    module = Net()
    module.compile()
    parallel = fastdp.wrap(module, gpus=1)
    parallel.train_step(F.cross_entropy, adam)
    assert "runs its own compilation" in whys(parallel)


def test_the_report_tells_of_steps_before_there_is_a_train_step_and_without_captures():
    parallel = fastdp.wrap(Net(), gpus=2, compile=None)
    assert "no train_step yet" in whys(parallel)
    parallel.train_step(F.cross_entropy, adam)
    assert whys(parallel) == "compile=None"
    assert not parallel.compiling
    parallel.wait_compiled(1.0)


def test_auto_keeps_the_form_whose_steps_are_fastest(monkeypatch):
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    monkeypatch.setattr(capture_steps, "missing_compiler", lambda: "no compiler")
    monkeypatch.setattr(speed_trial, "STEPS", 3)
    notes = capture_steps.Captures.note
    for slow in ("eager", "traced"):

        def noted(self: Any, seconds: float, slow: str = slow) -> None:
            (shape,) = self._shapes.values()
            replays = shape.captured is not None and not shape.captured.runs_eagerly
            notes(self, 0.5 if replays == (slow == "traced") else 0.1)

        monkeypatch.setattr(capture_steps.Captures, "note", noted)
        parallel = check(Net(0.2), data(14), F.cross_entropy, 1, options={"compile": "auto"})
        assert hows(parallel) == {"eager", "traced"} - {slow}
        assert ("a step takes 500.00 ms traced and 100.00 eager" in whys(parallel)) == (slow == "traced")


@pytest.mark.skipif(bool(missing_compiler()), reason="TorchInductor needs a C++ compiler")
def test_compiled_steps_train_as_plain_torch():
    module, reference, batches = Net(0.2), Net(0.2), data(9)
    parallel = fastdp.wrap(module, gpus=1, compile="inductor", deterministic=True)  # the second step waits for it
    step, losses = parallel.train_step(F.cross_entropy, adam), []
    torch.manual_seed(5)
    losses = [float(step(x, y)) for x, y in batches]
    assert hows(parallel) == {"compiled"}
    assert_same(module, reference, losses, plainly(reference, batches, F.cross_entropy))


def test_a_compiled_step_that_gives_other_numbers_is_dropped_and_the_traced_one_goes_on(monkeypatch):
    class Wrong:
        """A compiler that is done at once, and changes the loss."""

        busy = False

        def submit(self, graph: Any, threads: int) -> Any:
            return types.SimpleNamespace(run=graph, seconds=0.0, load_seconds=0.0)

        def done(self, job: Any) -> bool:
            return True

        def result(self, job: Any) -> Any:
            def run(*arguments: torch.Tensor) -> list[torch.Tensor]:
                sums, *others = job.run(*arguments)
                return [sums + 1.0, *others]

            return run

        def close(self) -> None:
            """Nothing runs."""

    monkeypatch.setattr(capture_steps, "BackgroundCompiler", Wrong)
    monkeypatch.setattr(capture_steps, "missing_compiler", str)
    with pytest.warns(UserWarning, match="the compiled step disagrees with the eager one in the loss"):
        parallel = check(Net(0.2), data(10), F.cross_entropy, 1, options={"compile": "inductor"})
    assert hows(parallel) == {"traced"}


def test_a_step_inside_a_mode_that_counts_operations_runs_eagerly():
    parallel = fastdp.wrap(Net(), gpus=1, compile="trace")
    step = parallel.train_step(F.cross_entropy, adam)
    for x, y in data(5):
        step(x, y)
    (x, y), counts = data()[0], []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            step(x, y)
        counts.append(dict(counter.get_flop_counts()))
    assert "Net" in counts[0]  # by modules, which a replay does not run
    assert counts[0] == counts[1]


def test_auto_tells_in_the_report_alone_why_a_step_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    parallel = check(Reads(), data(), F.cross_entropy, 1, options={"compile": "auto"})  # warnings are errors here
    assert hows(parallel) == {"eager"}
    assert REFUSED[Reads] in whys(parallel)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.last = nn.Linear(6, 4)
        self.register_buffer("total", torch.zeros(6, dtype=torch.complex128))
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += torch.complex(x.detach(), -x.detach()).sum(0)
        self.rows += len(x)
        self.calls = self.calls + 1.0
        return self.last(x)


@pytest.mark.parametrize("rows", [None, {"buffer:total": "sum", "buffer:rows": "sum", "buffer:calls": "same"}])
def test_buffers_that_are_sums_or_the_same_are_those_of_one_device(rows):
    for devices in (1, 3):
        assert hows(check(Keeps(), data(), F.cross_entropy, devices, options={"rows": rows})) == {"traced"}
        assert hows(check(Keeps(), data(3), F.cross_entropy, devices, options={"compile": None, "rows": rows})) == {
            "eager"
        }


def test_float16_runs_eagerly_on_several_devices():
    module = Net().half()
    step = fastdp.wrap(module, gpus=2, compile="trace").train_step(F.cross_entropy, adam)
    (x, y), *_ = data()
    step(x.half(), y)
    with pytest.warns(UserWarning, match="float16 on several devices"):
        step(x.half(), y)
