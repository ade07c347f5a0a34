"""The user's module: tied, frozen and reloaded weights, buffers, failures, autocast, and what is refused."""

from __future__ import annotations

import copy
import queue

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.torch import TorchParallel


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def plain_step(module, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(module(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_same(module, reference, tolerance=1e-5):
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], expected, rtol=tolerance, atol=tolerance * 0.1)


def pair(rows=11, inputs=4, outputs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator), torch.randn(rows, outputs, generator=generator)


def test_tied_weights_stay_tied_and_train_as_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    module, reference = Tied(), Tied()
    weight = module.first.weight
    step = fastdp.wrap(module, gpus=3, check_replicas=True).train_step(F.mse_loss, sgd)
    optimizer = sgd(reference.parameters())
    for i in range(10):
        step(*pair(seed=i))
        plain_step(reference, optimizer, *pair(seed=i))
    assert module.first.weight is weight is module.second.weight
    assert_same(module, reference)


def test_frozen_parameters_keep_still_and_train_again_once_they_are_thawed():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reference = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=2, check_replicas=True).train_step(F.mse_loss, sgd)
    optimizer = sgd(reference.parameters())
    for i in range(9):
        for one in (module, reference):
            one[0].weight.requires_grad_(i // 3 != 1)
        before = module[0].weight.detach().clone()
        step(*pair(seed=i))
        plain_step(reference, optimizer, *pair(seed=i))
        assert torch.equal(module[0].weight, before) is (i // 3 == 1)
    assert_same(module, reference)


def test_a_parameter_without_a_gradient_is_left_alone_by_weight_decay():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    module = Unused()
    before = module.unused.weight.detach().clone()
    step = fastdp.wrap(module, gpus=2).train_step(F.mse_loss, lambda p: torch.optim.AdamW(p, weight_decay=0.5))
    used = module.used.weight.detach().clone()
    step(*pair())
    assert torch.equal(module.unused.weight, before)
    assert not torch.equal(module.used.weight, used)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loaded_between_steps_reaches_all_replicas(assign):
    module = nn.Linear(4, 4)
    other = copy.deepcopy(nn.Linear(4, 4).state_dict())
    dp = fastdp.wrap(module, gpus=4, check_replicas=True)
    step = dp.train_step(F.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1))
    step(*pair())
    dp.load_state_dict(copy.deepcopy(other), assign=assign)
    step(*pair(seed=1))
    reference = nn.Linear(4, 4)
    reference.load_state_dict(other)
    plain_step(reference, torch.optim.SGD(reference.parameters(), lr=0.1), *pair(seed=1))
    assert_same(module, reference)
    assert dp.state_dict().keys() == reference.state_dict().keys()


def test_weights_assigned_in_place_reach_every_train_step_of_the_module():
    module = nn.Linear(4, 4)
    dp = fastdp.wrap(module, gpus=3, check_replicas=True)
    one, two = (dp.train_step(F.mse_loss, sgd) for _ in range(2))
    for step in (one, two, one):
        with torch.no_grad():
            module.weight.zero_()
            module.bias.zero_()
        x, y = pair()
        torch.testing.assert_close(step(x, y), F.mse_loss(torch.zeros(11, 4), y))


def test_weights_that_another_engine_noticed_first_still_reach_this_one():
    module = nn.Linear(4, 4)
    dp = fastdp.wrap(module, gpus=3, check_replicas=True)
    step = dp.train_step(F.mse_loss, sgd)
    dp.train_step(F.mse_loss, sgd)  # `dp(x)` runs on this one's engine
    x, y = pair()
    step(x, y)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    assert not dp(x).any()
    torch.testing.assert_close(step(x, y), F.mse_loss(torch.zeros(11, 4), y))


def test_an_optimizer_that_fails_names_its_device_and_the_next_step_works():
    calls = []

    class Moody(torch.optim.Adam):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            calls.append(self)
            self.fails = False

        def step(self, closure=None):
            if self.fails:
                self.fails = False
                raise ArithmeticError("not today")
            return super().step(closure)

    dp = fastdp.wrap(nn.Linear(4, 4), gpus=3, update="each")
    step = dp.train_step(F.mse_loss, Moody)
    first = step(*pair())
    calls[0].fails = True
    with pytest.raises(fastdp.ReplicaError, match="virtual:0"):
        step(*pair())
    assert [float(step(*pair())) for _ in range(10)][-1] < first


def test_the_module_is_a_plain_module_outside_steps():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    classes = [type(part) for part in module.modules()]
    tensors = [id(t) for t in (*module.parameters(), *module.buffers())]
    fastdp.wrap(module, gpus=2).train_step(F.mse_loss, sgd)(*pair())
    assert [type(part) for part in module.modules()] == classes
    assert [id(t) for t in (*module.parameters(), *module.buffers())] == tensors
    assert all("forward" not in part.__dict__ for part in module.modules())
    assert all(p.grad is None for p in module.parameters())
    loss = F.mse_loss(module(pair()[0]), pair()[1])
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone[0].weight.zero_()
    assert module[0].weight.any()


def test_buffers_that_forward_assigns_follow_the_whole_batch():
    class Center(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("center", torch.zeros(4))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            if self.training:
                self.center = 0.5 * self.center + 0.5 * x.detach().mean(0)
                self.calls += 1
            return self.linear(x)

    module = Center()
    reference = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=3, check_replicas=True).train_step(F.mse_loss, sgd)
    for i in range(5):
        step(*pair(seed=i))
        reference(pair(seed=i)[0])
    torch.testing.assert_close(module.center, reference.center)
    assert module.calls == 5


class Failing(nn.Module):
    """Fails on rows that are negative."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(self.norm(x))
        if (x < 0).any():
            raise ValueError("a negative row")
        return y


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sync", [False, True])
def test_a_failure_on_one_device_changes_nothing_names_it_and_the_next_step_works(reduction, accumulate, sync):
    torch.manual_seed(2)
    module = Failing()
    reference = copy.deepcopy(module)
    steps = [
        fastdp.wrap(one, gpus=4, check_replicas=True, sync_batch_norm=sync).train_step(
            F.mse_loss, sgd, reduction=reduction, accumulate=accumulate
        )
        for one in (module, reference)
    ]
    x, y = pair(12)
    x = x.abs()
    for step in steps:
        step(x, y)
    before = copy.deepcopy(module.state_dict())
    bad = x.clone()
    bad[7] = -1.0
    with pytest.raises(fastdp.ReplicaError, match="a negative row") as caught:
        steps[0](bad, y)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.device, caught.value.rows) == ("virtual:2", (6, 9))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    for step in steps:
        for _ in range(3):
            step(x, y)
    assert_same(module, reference, 0.0)


def test_autocast_of_the_calling_thread_is_that_of_the_replicas():
    seen = queue.SimpleQueue()

    def of_the_replicas():  # not those of trials
        return set([seen.get() for _ in range(seen.qsize())][-3:])

    class Net(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.put(y.dtype)
            return y

    dp = fastdp.wrap(Net(4, 4), gpus=3, check_replicas=True)
    step = dp.train_step(lambda o, y: F.mse_loss(o.float(), y), sgd)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [float(step(*pair())) for _ in range(5)]
        assert dp(pair()[0]).dtype == torch.bfloat16
    assert of_the_replicas() == {torch.bfloat16}
    assert losses[-1] < losses[0]
    assert dp.module.weight.dtype == torch.float32
    step(*pair())
    assert of_the_replicas() == {torch.float32}


def test_a_module_in_bfloat16_trains_with_its_replicas_equal():
    module = nn.Linear(4, 4).bfloat16()
    step = fastdp.wrap(module, gpus=3, check_replicas=True).train_step(F.mse_loss, sgd)
    x, y = (t.bfloat16() for t in pair())
    losses = [step(x, y) for _ in range(10)]
    assert losses[0].dtype == torch.bfloat16
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"reduction": "average"}, ValueError, "`reduction` must be one of"),
        ({"clip_grad_norm": 0.0}, ValueError, "`clip_grad_norm`"),
        ({"accumulate": 0}, ValueError, "`accumulate`"),
        ({"optimizer": "sgd"}, TypeError, "`optimizer` is 'sgd' .*over the module's parameters, or a list"),
        ({"optimizer": []}, TypeError, "holds no optimizer"),
        ({"optimizer": lambda p: None}, TypeError, "`optimizer` makes or holds None"),
        ({"optimizer": sgd([nn.Parameter(torch.zeros(2))])}, ValueError, "a parameter that the module does not have"),
        ({"optimizer": lambda p: [sgd(p), sgd([torch.zeros(2)])]}, ValueError, "that the module does not have"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "closure"),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(options, error, said):
    dp = fastdp.wrap(nn.Linear(4, 4), gpus=2)
    with pytest.raises(error, match=said):
        dp.train_step(**{"loss_fn": F.mse_loss, "optimizer": sgd, **options})


@pytest.mark.parametrize(
    ("loss_fn", "error", "said"),
    [
        (lambda o, y: 1.0, TypeError, "must return a tensor"),
        (lambda o, y: (o - y) ** 2, ValueError, r"Received: shape \(11, 4\)"),
        (lambda o, y: (o.detach() - y).mean(), ValueError, "without a gradient"),
    ],
)
def test_a_loss_that_is_no_number_is_named(loss_fn, error, said):
    step = fastdp.wrap(nn.Linear(4, 4), gpus=2).train_step(loss_fn, sgd)
    with pytest.raises(error, match=said):
        step(*pair())


class Overlapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4))
        self.b = nn.Parameter(self.a.data[:2])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "scripted or traced"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "Wrap the module inside it"),
        (lambda: nn.Linear(2, 2, device="meta"), r"Call model\.to\('cpu'\)"),
        (lambda: nn.LazyLinear(2), "Call the model on one batch"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(2)), "sync_batch_norm=True"),
        (Overlapping, "share memory"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_module_that_cannot_be_replicated_is_refused_with_the_remedy(make, said):
    with pytest.raises(ValueError, match=said):
        fastdp.wrap(make(), gpus=2)


def test_wrapping_twice_and_wrong_gpus_are_value_errors():
    from fastdp.options import Options
    from fastdp.torch.wrap import wrap_torch

    dp = fastdp.wrap(nn.Linear(2, 2), gpus=2)
    assert isinstance(dp, TorchParallel)
    with pytest.raises(ValueError, match="parallel already"):
        wrap_torch(dp, 2, Options())
    with pytest.raises(ValueError, match="gpus"):
        fastdp.wrap(nn.Linear(2, 2), gpus=9)


def test_a_module_that_changed_its_shape_must_be_wrapped_again():
    module = nn.Sequential(nn.Linear(4, 4))
    dp = fastdp.wrap(module, gpus=2)
    dp(pair()[0])
    module[0].weight = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(RuntimeError, match="Wrap the changed module again"):
        dp(pair()[0])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda module: setattr(module[1], "head", nn.Linear(4, 4)), "1"),
        (lambda module: module.append(nn.Linear(4, 4)), "model"),
        (lambda module: module[0].register_buffer("more", torch.zeros(1)), "0"),
    ],
    ids=["another head", "a further layer", "a buffer"],
)
def test_a_module_whose_parts_were_changed_must_be_wrapped_again(change, part):
    module = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"head": nn.Linear(4, 4)}))
    module[1].forward = lambda x: x
    step = fastdp.wrap(module, gpus=2).train_step(F.mse_loss, sgd)
    step(*pair())
    change(module)
    with pytest.raises(RuntimeError, match=f"The parts of `{part}` were changed.*Wrap the changed module again"):
        step(*pair())
    fastdp.wrap(module, gpus=2).train_step(F.mse_loss, sgd)(*pair())


def test_unequal_rows_are_named():
    step = fastdp.wrap(nn.Linear(4, 4), gpus=2).train_step(F.mse_loss, sgd, reduction="mean")
    with pytest.raises(ValueError, match="same number of rows"):
        step(torch.zeros(4, 4), torch.zeros(3, 4))


def test_arrays_of_unequal_rows_are_named_as_the_user_has_them_with_the_remedy():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
    step = fastdp.wrap(module, gpus=2).train_step(F.mse_loss, sgd)
    x, mask = torch.zeros(4, 3, 4), nn.Transformer.generate_square_subsequent_mask(5)
    said = r"\{'src': 4, 'mask': 5, 'target': 4\}\. .*rows=\{\"mask\": \"same\"\}"
    with pytest.raises(ValueError, match=said):
        step({"src": x, "mask": mask}, x)


class Attends(nn.Module):
    """Attention along the axis of the steps, whichever it is."""

    def __init__(self, batch_first):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Recurs(nn.Module):
    """A recurrent layer without its states."""

    def __init__(self, kind, batch_first):
        super().__init__()
        self.inner = kind(4, 4, batch_first=batch_first)

    def forward(self, x):
        return self.inner(x)[0]


@pytest.mark.parametrize(
    "make",
    [Attends, *(lambda first, kind=kind: Recurs(kind, first) for kind in (nn.LSTM, nn.GRU, nn.RNN))],
    ids=["attention", "LSTM", "GRU", "RNN"],
)
def test_a_batch_with_time_steps_first_is_split_by_rows_and_else_warned_of_once(make):
    time_first, rows_first = torch.randn(8, 5, 4), torch.randn(8, 8, 4)
    module = make(False)
    torch.testing.assert_close(fastdp.wrap(copy.deepcopy(module), gpus=2)(time_first), module(time_first))
    with pytest.raises(ValueError, match="what `rows` says of it"):
        fastdp.wrap(make(False), gpus=2, rows={"output": 0})(time_first)
    step = fastdp.wrap(make(False), gpus=2, rows={"x": 0, "output": 0}).train_step(F.mse_loss, sgd)
    with pytest.warns(
        UserWarning, match="splits the rows of a batch along that axis: this device has 4 of 8.*batch_first=True"
    ):
        step(time_first, time_first)
    step(time_first, time_first)  # a second warning would be an error
    step = fastdp.wrap(make(True), gpus=2).train_step(F.mse_loss, sgd)
    step(rows_first, rows_first)
    step(torch.randn(8, 4, 4), torch.randn(8, 4, 4))
