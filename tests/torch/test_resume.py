"""`step.state_dict()`: a run that was saved and goes on anew is the run that was not interrupted."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from scripts import loaded_python
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.capture import patience, speed_trial
from fastdp.capture import steps as capture_steps

each_number = pytest.mark.parametrize("devices", [1, 2, 3, 8])


class Drops(nn.Module):
    """Dropout, running statistics, an embedding, and a layer that only some batches use."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.embed = nn.Embedding(7, 6, sparse=sparse)
        # Without biases: behind a normalization they have no gradient but noise, which Adam would take for one.
        self.a, self.rare = nn.Linear(6, 16, bias=False), nn.Linear(6, 16, bias=False)
        self.norm, self.drop, self.b = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        self.double()

    def forward(self, x, word, rare):
        layer = self.rare if rare else self.a
        return self.b(self.drop(torch.tanh(self.norm(layer(x + self.embed(word))))))


def batches() -> list[tuple[tuple[torch.Tensor, torch.Tensor, bool], torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    made = []
    for n in (24, 16, 19, 24, 17, 32, 16, 23, 16):
        x = torch.randn(n, 6, generator=generator).double()
        word = torch.randint(0, 7, (n,), generator=generator)
        made.append(((x, word, n == 24), torch.randint(0, 4, (n,), generator=generator)))
    return made


def factory(parameters):
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True)


def build(devices, seed, accumulate=1, make=factory, module=None, compile=None):
    """Everything that a script makes anew: module, step and schedule, from another seed than before."""
    torch.manual_seed(seed)
    module = module or Drops()
    model = fastdp.wrap(module, gpus=devices, sync_batch_norm=True, compile=compile)
    step = model.train_step(F.cross_entropy, make, accumulate=accumulate, clip_grad_norm=0.5)
    schedules = [torch.optim.lr_scheduler.StepLR(one, 2, 0.5) for one in step.optimizers]
    return model, step, schedules


def run(step, schedules, data) -> list[float]:
    losses = []
    for x, y in data:
        losses.append(float(step(x, y)))
        if step.result.updated:
            for schedule in schedules:
                schedule.step()
    return losses


def saved(model, step, schedules) -> io.BytesIO:
    file = io.BytesIO()
    state = {"model": model.state_dict(), "step": step.state_dict(), "schedules": [s.state_dict() for s in schedules]}
    torch.save(state, file)
    file.seek(0)
    return file


def loaded(model, step, schedules, file) -> None:
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    for schedule, one in zip(schedules, state["schedules"], strict=True):
        schedule.load_state_dict(one)
    step.load_state_dict(state["step"])


def everything(model, step) -> list[torch.Tensor]:
    """Weights, buffers, and the states of the optimizers."""
    states = [value for one in step.optimizers for of in one.state.values() for value in of.values()]
    return [*model.state_dict().values(), *states]


@pytest.mark.parametrize(("accumulate", "after"), [(1, 4), (3, 4), (3, 5), (3, 6)])
@each_number
def test_a_run_that_goes_on_anew_is_the_uninterrupted_one_bit_for_bit(devices, accumulate, after):
    model, step, schedules = build(devices, 1, accumulate)
    losses = run(step, schedules, batches()[:after])
    file = saved(model, step, schedules)
    losses += run(step, schedules, batches()[after:])

    other, again, others = build(devices, 2, accumulate)
    loaded(other, again, others, file)
    assert again.result is None
    found = run(again, others, batches()[after:])
    assert found == losses[after:]
    torch.testing.assert_close(everything(other, again), everything(model, step), rtol=0, atol=0)
    assert again.optimizer.param_groups[0]["lr"] == step.optimizer.param_groups[0]["lr"]
    assert again.state_dict()["calls"] == len(batches())


class Captured(Drops):
    """With a normalization that several devices can capture."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16).double()


@pytest.mark.parametrize(("mode", "devices"), [("trace", 1), ("trace", 3), ("auto", 1), ("auto", 2)])
def test_captured_steps_go_on_bit_for_bit(mode, devices, monkeypatch):
    """Each step has the form that it has in the uninterrupted run: forms round differently."""
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    monkeypatch.setattr(capture_steps, "missing_compiler", lambda: "no compiler")
    monkeypatch.setattr(speed_trial, "STEPS", 1)
    sizes = [batches()[i] for i in ((1, 2) if mode == "trace" else (1,))]  # a trial has ended after seven steps
    made = [((x.float(), word, rare), y) for (x, word, rare), y in sizes * 12]
    after = len(made) - 5
    model, step, schedules = build(devices, 1, 3, module=Captured().float(), compile=mode)
    losses = run(step, schedules, made[:after])
    file = saved(model, step, schedules)
    losses += run(step, schedules, made[after:])
    assert mode == "auto" or "traced" in str(model.report())
    other, again, others = build(devices, 2, 3, module=Captured().float(), compile=mode)
    loaded(other, again, others, file)
    assert run(again, others, made[after:]) == losses[after:]
    torch.testing.assert_close(everything(other, again), everything(model, step), rtol=0, atol=0)
    assert hows(other) == hows(model)


def hows(model):
    return sorted((entry["rows"], entry["of"], entry["steps"], entry["how"]) for entry in model.report())


@pytest.mark.parametrize("change", ["a state of before", "a value that has changed"])
def test_captured_steps_begin_anew_where_nothing_tells_how_they_ran(change):
    model, step, schedules = build(2, 1, 1, module=Captured(), compile="trace")
    run(step, schedules, batches()[:1] * 5)
    if change == "a value that has changed":
        model.module.drop.p = 0.5
    state = step.state_dict()
    other, again, others = build(2, 2, 1, module=Captured(), compile="trace")
    if change == "a state of before":
        del state["captures"]
    again.load_state_dict(state)
    run(again, others, batches()[:1])
    assert {entry["how"] for entry in other.report()} == {"eager"}


def train_plainly(module, accumulate) -> list[float]:
    optimizer, losses = factory(module.parameters()), []
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for i, (x, y) in enumerate(batches(), 1):
        loss = F.cross_entropy(module(*x), y)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if i % accumulate == 0:
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("before", "then"), [(8, 3), (3, 8), (2, 1), (1, 2), (8, 2)])
def test_a_run_may_go_on_with_another_number_of_devices(before, then, accumulate):
    torch.manual_seed(1)
    reference = Drops()
    expected = train_plainly(reference, accumulate)
    model, step, schedules = build(before, 1, accumulate)
    losses = run(step, schedules, batches()[:5])
    file = saved(model, step, schedules)
    other, again, others = build(then, 2, accumulate)
    loaded(other, again, others, file)
    losses += run(again, others, batches()[5:])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dict(other.state_dict()), dict(reference.state_dict()), rtol=1e-12, atol=1e-13)


SCRIPT = """
import sys

import torch

sys.path[:0] = {folders!r}
import fastdp
from test_resume import batches, build, everything, loaded, run

fastdp.set_virtual_devices(8)
torch.set_num_threads({threads})  # their number changes the last bits of sums
torch.rand(17)  # another place in another generator
model, step, schedules = build({devices}, 5, 3)
loaded(model, step, schedules, {file!r})
losses = run(step, schedules, batches()[4:])
torch.save([losses, everything(model, step)], {file!r})
"""


@pytest.mark.parametrize("devices", [1, 3])
def test_another_process_goes_on_bit_for_bit(devices, tmp_path):
    model, step, schedules = build(devices, 1, 3)
    run(step, schedules, batches()[:4])
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(saved(model, step, schedules).getvalue())
    expected = run(step, schedules, batches()[4:])
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "shared")]
    code = SCRIPT.format(folders=folders, threads=torch.get_num_threads(), devices=devices, file=str(file))
    done = loaded_python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses, values = torch.load(file)
    assert losses == expected
    torch.testing.assert_close(values, everything(model, step), rtol=0, atol=0)


@each_number
def test_flush_right_after_loading_ends_the_saved_window(devices):
    model, step, schedules = build(devices, 1, 3)
    run(step, schedules, batches()[:5])
    file = saved(model, step, schedules)
    assert step.flush()
    other, again, others = build(devices, 2, 3)
    loaded(other, again, others, file)
    assert again.flush()
    torch.testing.assert_close(everything(other, again), everything(model, step), rtol=0, atol=0)
    assert not again.flush()


@each_number
def test_loading_replaces_what_waited_before(devices):
    """A state from outside a window, loaded inside of one, and back into the step that it came from."""
    model, step, schedules = build(devices, 1, 3)
    run(step, schedules, batches()[:3])
    file = saved(model, step, schedules)
    losses = run(step, schedules, batches()[3:])
    expected = copy.deepcopy(everything(model, step))
    run(step, schedules, batches()[:2])
    loaded(model, step, schedules, file)
    assert not step.flush()
    assert run(step, schedules, batches()[3:]) == losses
    torch.testing.assert_close(everything(model, step), expected, rtol=0, atol=0)


@each_number
def test_sparse_gradients_and_several_optimizers_in_a_window(devices):
    def make(module):
        embed = [module.embed.weight]
        rest = [p for p in module.parameters() if p is not module.embed.weight]
        return [torch.optim.SparseAdam(embed, lr=0.1), torch.optim.Adam(rest, lr=0.01)]

    def whole(seed):
        torch.manual_seed(seed)
        module = Drops(sparse=True)
        model = fastdp.wrap(module, gpus=devices, sync_batch_norm=True, compile=None)
        step = model.train_step(F.cross_entropy, make(module), accumulate=3)
        return model, step, []

    model, step, schedules = whole(1)
    run(step, schedules, batches()[:5])
    file = saved(model, step, schedules)
    losses = run(step, schedules, batches()[5:])
    other, again, others = whole(2)
    loaded(other, again, others, file)
    assert run(again, others, batches()[5:]) == losses
    torch.testing.assert_close(everything(other, again), everything(model, step), rtol=0, atol=0)


class Reordered(Drops):
    def __init__(self):
        super().__init__()
        self.norm = self._modules.pop("norm")


def wrong(state, step, model):
    """States that do not fit, with what the message says."""
    yield state | {"more": 1}, ValueError, "with the names .*Received the names .*more"
    yield step.optimizer.state_dict(), ValueError, "looks like the state of an optimizer"
    yield model.state_dict(), ValueError, "looks like the state of a module"
    yield [state], TypeError, "an object of type list"
    other = copy.deepcopy(state)
    other["parameters"]["b.weight"] = [5, 16]
    yield other, ValueError, r"`b.weight` has shape \(5, 16\) in it, and has shape \(4, 16\) in the module"
    other = copy.deepcopy(state)
    del other["parameters"]["norm.bias"]
    yield other, ValueError, r"`norm.bias` is not there in it, and has shape \(16,\) in the module"
    other = build(2, 1, 3, module=Reordered())[1].state_dict()
    yield other, ValueError, "another order than the module: `b.weight` in the place of `norm.weight`"
    other = build(2, 1, 3, lambda p: torch.optim.SGD(p, lr=0.1))[1].state_dict()
    yield other, ValueError, r"the states of \['SGD'\], and the step has the optimizers \['Adam'\]"
    other = build(2, 1, 3, lambda p: torch.optim.Adam([{"params": p[:2]}, {"params": p[2:]}]))[1].state_dict()
    yield (
        other,
        ValueError,
        r"groups of \[2, 5\] parameters for optimizer 0 \(Adam\), and the step's has groups of \[7\]",
    )
    other = copy.deepcopy(state)
    other["window"]["accumulate"] = 4
    yield other, ValueError, r"after 2 of 4 calls of an accumulation window, and the step has accumulate=3"


@pytest.mark.parametrize("devices", [1, 3])
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(devices):
    model, step, schedules = build(devices, 1, 3)
    run(step, schedules, batches()[:5])
    state = copy.deepcopy(step.state_dict())
    drawn = torch.get_rng_state()
    for other, error, message in wrong(copy.deepcopy(state), step, model):
        torch.set_rng_state(drawn)
        with pytest.raises(error, match=message):
            step.load_state_dict(other)
        assert torch.equal(torch.get_rng_state(), drawn)
    after = step.state_dict()
    torch.testing.assert_close(after.pop("optimizers")[0]["state"], state.pop("optimizers")[0]["state"], rtol=0, atol=0)
    torch.testing.assert_close(after["window"].pop("gradients"), state["window"].pop("gradients"), rtol=0, atol=0)
    assert after["window"] == state["window"]


def test_outside_a_window_the_number_of_calls_to_accumulate_may_change():
    model, step, schedules = build(3, 1, 3)
    run(step, schedules, batches()[:3])
    other, again, others = build(3, 2, 1)
    loaded(other, again, others, saved(model, step, schedules))
    run(again, others, batches()[3:4])
    assert again.result.updated
