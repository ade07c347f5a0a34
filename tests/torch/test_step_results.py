"""What a train step tells besides the loss: outputs, several losses, the gradient's norm, skipped updates."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fastdp

each_number = pytest.mark.parametrize("devices", [1, 2, 3, 8])
each_update = pytest.mark.parametrize(("devices", "update"), [(1, "first"), (2, "each"), (3, "first"), (8, "each")])


def mlp() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 4)).double()


def batches(sizes: tuple[int, ...] = (24, 16, 19, 24, 17, 32)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(n, 6, generator=generator).double(), torch.randint(0, 4, (n,), generator=generator)) for n in sizes
    ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


@dataclass
class Told:
    """What a loop knows after each batch."""

    losses: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)
    updated: list[bool] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)


def train_plainly(module, data, loss_fn=F.cross_entropy, *, clip=None, accumulate=1, skips=False) -> Told:
    """What a torch user writes for one device."""
    optimizer, told = adam(module.parameters()), Told()
    parameters, finite = list(module.parameters()), True
    for i, (x, y) in enumerate(data):
        outputs = module(x)
        loss = loss_fn(outputs, y)
        (loss / accumulate).backward()
        finite = finite and bool(loss.isfinite())
        norm, ends = None, (i + 1) % accumulate == 0
        if ends:
            finite = finite and all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if finite or not skips:
                if clip is not None:
                    norm = nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
            optimizer.zero_grad()
        told.losses.append(loss.detach())
        told.outputs.append(outputs.detach())
        told.norms.append(norm)
        told.updated.append(ends and (finite or not skips))
        told.skipped.append(ends and not finite and skips)
        finite = finite or ends
    return told


def train(step, data) -> Told:
    told = Told()
    for x, y in data:
        loss = step(x, y)
        assert step.result.loss is loss
        told.losses.append(loss)
        told.outputs.append(step.result.outputs)
        told.norms.append(step.result.grad_norm)
        told.updated.append(step.result.updated)
        told.skipped.append(step.result.skipped)
    return told


def wrapped(module, devices, update="first"):
    return fastdp.wrap(module, gpus=devices, update=update, sync_batch_norm=True, check_replicas=True)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, equal_nan=True)


@each_update
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.3, 3)])
def test_outputs_and_the_norm_before_clipping_are_those_of_plain_torch(devices, update, accumulate, clip):
    module = mlp()
    reference = copy.deepcopy(module)
    step = wrapped(module, devices, update).train_step(
        F.cross_entropy, adam, accumulate=accumulate, clip_grad_norm=clip, outputs=True, grad_norm=True
    )
    assert step.result is None
    ours, theirs = train(step, batches()), train_plainly(reference, batches(), accumulate=accumulate, clip=clip)
    assert_equal(vars(ours), vars(theirs))
    assert_equal(dict(module.state_dict()), dict(reference.state_dict()))
    assert step.result.grad_norm.dtype == torch.float64
    assert clip is None or step.result.grad_norm > clip


@each_number
def test_nothing_is_computed_that_was_not_asked_for(devices, monkeypatch):
    from fastdp.program.torch import update as torch_update

    monkeypatch.setattr(torch_update, "get_total_norm", None)
    step = wrapped(mlp(), devices).train_step(F.cross_entropy, adam)
    step(*batches()[0])
    assert (step.result.outputs, step.result.grad_norm) == (None, None)
    assert (step.result.updated, step.result.skipped) == (True, False)


class Nested(nn.Module):
    """Outputs in a nest: rows along another axis, a mean, whole numbers, and what all rows share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(6, 4).double()

    def forward(self, x):
        y = self.a(x)
        return {"y": y, "parts": (y.T, y.square().mean(), y.argmax(1)), "weight": self.a.weight, "name": "a"}


@each_number
def test_outputs_keep_the_structure_of_the_module_and_belong_to_the_caller(devices):
    module = Nested()
    reference = copy.deepcopy(module)
    dp = fastdp.wrap(module, gpus=devices, rows={"output['parts'][0]": 1, "output['weight']": "same"})
    loss_fn = lambda out, y: F.cross_entropy(out["y"], y) + out["parts"][1]  # noqa: E731
    step = dp.train_step(loss_fn, adam, outputs=True)
    x, y = batches()[0]
    step(x, y)
    kept, expected = step.result.outputs, reference(x)
    for _ in range(2):
        assert kept["name"] == expected["name"]
        for ours, theirs in zip(pytree.tree_leaves(kept)[:-1], pytree.tree_leaves(expected)[:-1], strict=True):
            assert not ours.requires_grad
            assert_equal(ours, theirs.detach())
        step(x, y)  # changes weights, and nothing that was given out


def poisoned(kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of which one has a number in a single row that spoils the loss or the gradient."""
    data = batches()
    data[2][0][5] = {"nan": float("nan"), "inf": float("inf")}[kind]
    return data


@each_update
@pytest.mark.parametrize(("kind", "accumulate"), [("nan", 1), ("inf", 3)])
def test_steps_that_are_not_finite_change_weights_and_optimizer_on_no_device(devices, update, accumulate, kind):
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    reference = copy.deepcopy(module)
    step = wrapped(module, devices, update).train_step(
        F.cross_entropy, adam, accumulate=accumulate, clip_grad_norm=0.3, skip_nonfinite=True, outputs=True
    )
    data = poisoned(kind)
    ours, theirs = train(step, data), train_plainly(reference, data, accumulate=accumulate, clip=0.3, skips=True)
    assert ours.skipped == [False, False, True, False, False, False]
    assert_equal(vars(ours), vars(theirs))
    assert_equal(dict(module.state_dict()), dict(reference.state_dict()))
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert {float(state["step"]) for state in step.optimizer.state.values()} == {6 / accumulate - 1}


@each_number
def test_a_loss_that_is_not_finite_skips_though_its_gradient_is(devices):
    x, y = batches()[0]

    def loss_fn(outputs, y):
        return F.cross_entropy(outputs, y) + torch.tensor(float("inf")).double()

    for accumulate in (1, 2):
        module = mlp()
        before = copy.deepcopy(list(module.parameters()))
        dp = wrapped(module, devices)
        step = dp.train_step(loss_fn, adam, skip_nonfinite=True, accumulate=accumulate, reduction="mean")
        for _ in range(accumulate):
            step(x, y)
        assert step.result.skipped
        assert_equal(list(module.parameters()), before)


@each_number
def test_a_norm_that_overflows_is_no_reason_to_skip(devices):
    module = nn.Linear(6, 4, bias=False)
    before = module.weight.detach().clone()
    loss_fn = lambda out, y: (out * 1e25).sum()  # noqa: E731
    step = fastdp.wrap(module, gpus=devices).train_step(
        loss_fn, lambda p: torch.optim.SGD(p, lr=1e-30), skip_nonfinite=True, grad_norm=True
    )
    step(batches()[0][0].float(), batches()[0][1])
    assert step.result.grad_norm == float("inf")
    assert step.result.updated
    assert not torch.equal(module.weight, before)


@each_number
def test_running_statistics_of_a_skipped_step_are_those_of_plain_torch(devices):
    module = mlp()
    reference = copy.deepcopy(module)
    data = batches()
    loss_fn = lambda out, y: F.cross_entropy(out, y) * (float("nan") if len(y) == 19 else 1.0)  # noqa: E731
    step = wrapped(module, devices).train_step(loss_fn, adam, skip_nonfinite=True)
    ours, theirs = train(step, data), train_plainly(reference, data, loss_fn, skips=True)
    assert sum(ours.skipped) == 1
    assert_equal(ours.losses, theirs.losses)
    assert_equal(dict(module.state_dict()), dict(reference.state_dict()))


class FailsOnce(torch.optim.Adam):
    """Fails in the middle of its first step."""

    fails = True

    def step(self, closure=None):
        if FailsOnce.fails and self.param_groups[0]["params"][0].grad is not None:
            FailsOnce.fails = False
            with torch.no_grad():
                self.param_groups[0]["params"][0].zero_()
            raise ArithmeticError("not today")
        return super().step(closure)


FailsOnce.__module__ = "torch.optim.fails"  # as if torch's own


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("first", ["a skipped step", "a window"])
def test_an_update_that_fails_is_undone_though_calls_before_it_have_made_none(devices, first):
    FailsOnce.fails = True
    module = mlp()
    skips = first == "a skipped step"
    step = wrapped(module, devices).train_step(
        F.cross_entropy, lambda p: FailsOnce(p, lr=0.01), skip_nonfinite=skips, accumulate=1 if skips else 2
    )
    before = copy.deepcopy(list(module.parameters()))
    (x, y), (bad, _) = batches()[0], poisoned("nan")[2]
    step(bad if skips else x, y[: len(bad)] if skips else y)
    with pytest.raises(ArithmeticError, match="not today"):
        step(x, y)
    assert_equal(list(module.parameters()), before)
    step(x, y)
    assert step.result.updated


@pytest.mark.parametrize("devices", [1, 3])
def test_a_failed_call_leaves_the_result_of_the_one_before(devices):
    step = wrapped(mlp(), devices).train_step(F.cross_entropy, adam, outputs=True)
    x, y = batches()[0]
    step(x, y)
    before = step.result
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        step(x, y + 17)
    assert step.result is before


@each_number
def test_sparse_gradients_have_a_norm_too(devices):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 4)).double()
    reference = copy.deepcopy(module)
    x, y = torch.randint(0, 9, (16, 3)), batches()[1][1]
    step = fastdp.wrap(module, gpus=devices).train_step(
        F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), grad_norm=True, skip_nonfinite=True
    )
    step(x, y)
    F.cross_entropy(reference(x), y).backward()
    dense = [p.grad.to_dense() for p in reference.parameters()]
    assert_equal(step.result.grad_norm, nn.utils.get_total_norm(dense))


def several(outputs, y, kind="dict"):
    ce, l2 = F.cross_entropy(outputs, y), outputs.square().mean()
    accuracy = (outputs.argmax(1) == y).double().mean()
    return {
        "dict": {"loss": ce + 0.1 * l2, "ce": ce, "parts": [l2, accuracy.float()]},
        "tuple": (ce + 0.1 * l2, ce, l2.reshape(1)),
        "loss and dict": (ce, {"ce": ce, "accuracy": accuracy}),
        "list of one": [ce],
    }[kind]


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize(
    ("devices", "kind"),
    [
        *((n, "dict") for n in (1, 2, 3, 8)),
        *((n, kind) for n in (1, 3) for kind in ("tuple", "loss and dict", "list of one")),
    ],
)
def test_several_losses_are_those_of_the_global_batch_and_one_is_trained_on(devices, kind, reduction):
    module = mlp()
    reference = copy.deepcopy(module)
    loss_fn = lambda outputs, y: several(outputs, y, kind)  # noqa: E731
    step = wrapped(module, devices).train_step(loss_fn, adam, reduction=reduction, accumulate=2)
    optimizer = adam(reference.parameters())
    for i, (x, y) in enumerate(batches((7, 24, 19, 8))):
        loss = step(x, y)
        expected = loss_fn(reference(x), y)
        trained = expected["loss"] if kind == "dict" else expected[0]
        (trained / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(loss, trained.detach())
        found, spec = pytree.tree_flatten(step.result.losses)
        wanted, expected_spec = pytree.tree_flatten(expected)
        assert spec == expected_spec
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                ours, theirs.detach().reshape(()), rtol=1e-6 if theirs.dtype == torch.float32 else 1e-9, atol=1e-11
            )
            assert not ours.requires_grad
    assert_equal(dict(module.state_dict()), dict(reference.state_dict()))


@each_number
def test_sums_and_counts_of_a_loss_that_is_a_sum(devices):
    module = mlp()
    reference = copy.deepcopy(module).eval()
    module.eval()

    def loss_fn(outputs, y):
        return F.cross_entropy(outputs, y, reduction="sum"), {"right": (outputs.argmax(1) == y).sum()}

    step = wrapped(module, devices).train_step(loss_fn, adam, reduction="sum")
    x, y = batches()[2]
    step(x, y)
    loss, others = loss_fn(reference(x), y)
    assert_equal(step.result.losses, (loss.detach(), others))
    assert step.result.losses[1]["right"].dtype == torch.int64


@each_number
def test_plain_values_pass_through_where_the_loss_is_of_the_merged_outputs(devices):
    step = wrapped(mlp(), devices).train_step(
        lambda out, y: {
            "name": "ce",
            "loss": F.cross_entropy(out, y),
            "rows": len(y),
            "right": (out.argmax(1) == y).sum(),
        },
        adam,
    )
    x, y = batches()[0]
    loss = step(x, y)
    losses = step.result.losses
    assert list(losses) == ["name", "loss", "rows", "right"]
    assert (losses["name"], losses["rows"], losses["loss"]) == ("ce", 24, loss)
    assert 0 <= losses["right"] <= 24


@dataclass
class Own:
    loss: torch.Tensor


REFUSED = {
    "no loss": (lambda ce, out, y: {"ce": ce}, None, ValueError, r'under the name "loss".*\[\'ce\'\]'),
    "no tensor": (
        lambda ce, out, y: (1.0, ce),
        None,
        TypeError,
        "must return a tensor, or the one to train on as",
    ),
    "nothing": (lambda ce, out, y: (), None, TypeError, "must return a tensor, or the one"),
    "a class": (lambda ce, out, y: Own(ce), None, TypeError, "must return a tensor, or the one.*Own"),
    "rows": (lambda ce, out, y: (ce, out[:, 0]), None, ValueError, r"at \[1\] must be one number.*outputs=True"),
    "trained rows": (lambda ce, out, y: {"loss": out[:, 0]}, None, ValueError, "must return one number to train on"),
    "item": (
        lambda ce, out, y: (ce, {"ce": ce.item()}),
        "mean",
        TypeError,
        r"at \[1\]\['ce'\] must be a tensor with red",
    ),
    "count": (lambda ce, out, y: (ce, (y > 0).sum()), "mean", ValueError, "int64, which is no mean over samples"),
    "flag": (lambda ce, out, y: (ce, (y > 0).any()), "sum", ValueError, "bool, which is no sum over samples"),
}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_loss_is_refused_and_changes_nothing(devices, case):
    wrong, reduction, error, message = REFUSED[case]
    module, right = mlp(), []
    before = copy.deepcopy(module.state_dict())

    def loss_fn(out, y):
        ce = F.cross_entropy(out, y)
        return ce if right else wrong(ce, out, y)

    step = wrapped(module, devices).train_step(loss_fn, adam, reduction=reduction)
    x, y = batches()[0]
    with pytest.raises(error, match=message):
        step(x, y)
    assert_equal(dict(module.state_dict()), dict(before))
    right.append(True)
    step(x, y)
    assert step.result.updated


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("first", [True, False])
def test_losses_that_differ_between_devices_are_refused(devices, first):
    module = mlp()
    before = copy.deepcopy(module.state_dict())
    x, y = batches()[0]

    def loss_fn(out, y, rows):
        ce = F.cross_entropy(out, y)
        return (ce, ce) if (0 in rows) is first else ce

    step = wrapped(module, devices).train_step(loss_fn, adam, reduction="mean")
    with pytest.raises(ValueError, match=r"the same numbers on all devices.*only the loss"):
        step(x, y, torch.arange(len(x)))
    assert_equal(dict(module.state_dict()), dict(before))
