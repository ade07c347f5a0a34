"""Random draws: any number of devices gets the numbers that plain torch draws for the whole batch."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastdp

DEVICES = (1, 2, 3, 8)
ROWS, STEPS, FEATURES = 19, 11, 13  # no multiples of the rows of a device


class Apply(nn.Module):
    """A function behind a layer."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def by_row(x, drawn):
    return x * drawn.to(x.dtype).reshape(len(x), *(1 for _ in x.shape[1:]))


def init_noise(x):
    noise = torch.empty(STEPS, FEATURES, dtype=x.dtype)
    nn.init.trunc_normal_(noise)
    weight = torch.empty(FEATURES, 17, dtype=x.dtype)
    nn.init.orthogonal_(weight)
    return x + noise.sum(0) + weight.sum(1)


def heads(x):
    q = x[..., :12].reshape(len(x), STEPS, 2, 6).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.4, is_causal=True)


def gates(x):
    return torch.multinomial(x.mean(1).softmax(-1).detach(), 2).to(x.dtype).sum(1)


FUNCTIONS = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(x * 1.0, 0.4, inplace=True),
    "dropout of a transposed tensor": lambda x: F.dropout(x.transpose(1, 2), 0.4),
    "dropout of rows on the second axis": lambda x: F.dropout(x.transpose(0, 1), 0.4).transpose(0, 1),
    "dropout of several entries per row": lambda x: F.dropout(x.reshape(-1, FEATURES), 0.4).reshape(x.shape),
    "native dropout": lambda x: torch.dropout(x, 0.4, True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.3, training=True),
    "dropout1d": lambda x: F.dropout1d(x, 0.4),
    "dropout2d": lambda x: F.dropout2d(x[..., None], 0.4),
    "dropout3d": lambda x: F.dropout3d(x[..., None, None], 0.4),
    "randn_like": lambda x: x + torch.randn_like(x),
    "rand by row": lambda x: by_row(x, torch.rand(x.shape[0], 1, 1, dtype=x.dtype)),
    "rand for all rows": lambda x: x * torch.rand(1, dtype=x.dtype) + torch.rand((), dtype=x.dtype),
    "randint by row": lambda x: by_row(x, torch.randint(0, 9, (len(x),))),
    "randint by name": lambda x: by_row(x, torch.randint(low=3, high=9, size=(len(x), 1))),
    "randperm of features": lambda x: x[..., torch.randperm(FEATURES)],
    "stochastic depth": lambda x: by_row(x, torch.empty(len(x), 1, 1, dtype=x.dtype).bernoulli_(0.5)),
    "bernoulli of probabilities": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "normal": lambda x: x + torch.normal(x.detach(), 0.5),
    "reparameterization": lambda x: x + (0.1 * x).exp() * torch.randn(x.shape, dtype=x.dtype, generator=None),
    "poisson": lambda x: x * torch.poisson(x.detach().abs() * 3),
    "multinomial": lambda x: x * gates(x)[:, None, None],
    "gamma": lambda x: x * torch.distributions.Gamma(x.detach().abs() + 1, 1.0).sample(),
    "dirichlet": lambda x: x * torch.distributions.Dirichlet(x.detach().abs() + 1).sample(),
    "exponential": lambda x: x * torch.empty_like(x).exponential_(2.0),
    "gumbel softmax": lambda x: F.gumbel_softmax(x, tau=0.7),
    "initializers": init_noise,
    "attention": heads,
    "no_grad": lambda x: x + torch.no_grad()(torch.rand_like)(x),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu in place": lambda x: F.rrelu(x * 1.0, 0.2, 0.4, training=True, inplace=True),
    "rrelu of a transposed tensor": lambda x: F.rrelu(x.transpose(0, 1), training=True).transpose(0, 1),
    "rrelu at rest": F.rrelu,
    "bernoulli of transposed probabilities": lambda x: (
        x * torch.bernoulli(x.detach().transpose(0, 1).sigmoid()).transpose(0, 1)
    ),
    "bernoulli of shared probabilities": lambda x: x * torch.bernoulli(torch.full((FEATURES,), 0.5, dtype=x.dtype)),
    "a generator for each call": lambda x: (
        x + torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    ),
    # What does not belong to rows along the first axis is split along another one.
    "a permutation of the rows": lambda x: x[torch.randperm(len(x))],
    "a square of rows": lambda x: x + torch.rand(len(x), len(x), dtype=x.dtype).mean(),
    "two views one behind the other": lambda x: sum(F.dropout(torch.cat([x, x]), 0.4).chunk(2)),
    "fractional pooling": lambda x: F.fractional_max_pool2d(x[:, None], 2, output_size=(2, 3)),
}


def compare(make, devices, rows=ROWS):
    """Outputs, gradients and the generator after two steps of the user's own loop, and of `train_step`."""
    torch.manual_seed(0)
    module = make().double()
    reference = copy.deepcopy(module)
    x = torch.randn(rows, STEPS, FEATURES, dtype=torch.float64)

    def loop(model):
        torch.manual_seed(7)
        found = []
        for _ in range(2):
            y = model(x)
            (y**2).mean().backward()
            found.append(y.detach())
        return [*found, *(p.grad for p in model.parameters()), torch.get_rng_state()]

    ours, theirs = loop(fastdp.wrap(module, gpus=devices)), loop(reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    torch.manual_seed(8)
    step = fastdp.wrap(module, gpus=devices).train_step(lambda y: (y**2).mean(), lambda p: torch.optim.SGD(p, lr=0.1))
    losses = [step(x) for _ in range(2)]
    torch.manual_seed(8)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for loss in losses:
        optimizer.zero_grad()
        expected = (reference(x) ** 2).mean()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_draws_are_those_of_plain_torch(name, devices):
    compare(lambda: Apply(FUNCTIONS[name]), devices)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_with_dropout(devices, weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(FEATURES, 1, dropout=0.3, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=weights)[0]

    compare(Net, devices)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_transformer_and_recurrent_layers_with_dropout(devices):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(FEATURES, 1, 12, dropout=0.3, batch_first=True)
            self.lstm = nn.LSTM(FEATURES, 4, num_layers=3, dropout=0.5, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(8, 6, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.gru(self.lstm(self.layer(x))[0])[0]

    compare(Net, devices)


def test_a_single_row_per_device_is_drawn_in_the_memory_order_of_the_whole_batch():
    """Dropout of a transposed result, as attention's: the rows are not outermost in memory."""

    def steps_first(x):
        rows, steps, features = x.shape
        found = 2 * x.transpose(0, 1).reshape(steps * rows, features)
        return F.dropout(found.view(steps, rows, features).transpose(0, 1), 0.5)

    module = Apply(steps_first).double()
    reference, x = copy.deepcopy(module), torch.randn(8, STEPS, FEATURES, dtype=torch.float64)
    torch.manual_seed(2)
    found = fastdp.wrap(module, gpus=8)(x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, reference(x))


def test_a_loss_that_draws_draws_once_for_all_rows():
    module = nn.Linear(6, 6).double()
    reference, x = copy.deepcopy(module), torch.randn(9, 6, dtype=torch.float64)
    loss = lambda y: F.dropout(y**2, 0.5).mean()  # noqa: E731
    torch.manual_seed(2)
    found = fastdp.wrap(module, gpus=3).train_step(loss, torch.optim.SGD)(x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, loss(reference(x)).detach())


REFUSED = {
    "generators that differ": (
        lambda x: x + torch.rand(FEATURES, generator=torch.Generator().manual_seed(int(x.sum() < 0))),
        "in different states",
    ),
    "a selection of rows": (lambda x: x + torch.randn_like(x[x[:, 0, 0] > 0]).sum(), "random"),
    "probabilities of the whole batch": (
        lambda x: x * torch.bernoulli(x.detach().mean((0, 1)).sigmoid()),
        "depend on the rows of the batch",
    ),
    "a draw on some replicas only": (lambda x: x + torch.rand(13) if x[0, 0, 0] > 0 else x, "draw"),
    "a draw that nobody sees": (lambda x: x + torch.default_generator.seed() * 0, "does not see"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_draw_other_numbers_is_an_error_and_changes_nothing(name):
    function, message = REFUSED[name]
    module = Apply(function).double()
    with torch.no_grad():
        module.linear.weight.copy_(torch.eye(FEATURES))
        module.linear.bias.zero_()
    before = copy.deepcopy(module.state_dict())
    x = torch.ones(8, STEPS, FEATURES, dtype=torch.float64)
    x[4:] = x[:, 6:] = -1.0
    step = fastdp.wrap(module, gpus=2).train_step(lambda y: (y**2).mean(), lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match=message):
        step(x)
    torch.testing.assert_close(module.state_dict(), before, rtol=0.0, atol=0.0)


LIKE_ROWS = {  # lengths that are multiples of a device's rows, of which a length cannot tell what they are
    "noise for all rows": lambda x: x + torch.rand(12, 1, dtype=x.dtype),
    "noise of one number": lambda x: x + torch.rand(1, 1, dtype=x.dtype) * torch.rand(1, dtype=x.dtype),
    "a mask of weights": lambda x: x @ F.dropout(torch.ones(12, 12, dtype=x.dtype), 0.4),
    "time first": lambda x: F.dropout(x.transpose(0, 1).contiguous(), 0.4).transpose(0, 1),
    "a permutation of features": lambda x: x[..., torch.randperm(12)],
}


@pytest.mark.parametrize(("devices", "rows"), [(1, 24), (2, 24), (3, 24), (8, 24), (8, 8)])
@pytest.mark.parametrize("name", LIKE_ROWS)
def test_a_length_does_not_tell_whether_a_draw_is_by_rows(name, devices, rows):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x):
            return LIKE_ROWS[name](self.linear(x))

    torch.manual_seed(0)
    module = Net().double()
    reference = copy.deepcopy(module)
    x = torch.randn(rows, 12, 12, dtype=torch.float64)
    found = []
    for model in (fastdp.wrap(module, gpus=devices), reference):
        torch.manual_seed(4)
        y = model(x)
        (y**2).mean().backward()
        found.append([y.detach(), torch.get_rng_state()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(module.linear.weight.grad, reference.linear.weight.grad, rtol=1e-9, atol=1e-11)


class Checkpointed(nn.Module):
    """Parts with dropout and other draws, which run again in backward."""

    def __init__(self, kind, **options):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.inner = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3), nn.Tanh())
        self.kind, self.options = kind, options

    def part(self, x):
        x = self.inner(F.dropout(self.first(x), 0.4)) + 0.1 * torch.randn(x.shape[0], 1, 1, dtype=x.dtype)
        return F.alpha_dropout(x * torch.bernoulli(x.detach().sigmoid()), 0.2, training=True)

    def forward(self, x):
        x = F.dropout(self.last(x), 0.2)
        if self.kind == "sequential":
            x = checkpoint_sequential([*self.inner, self.part], 2, x, **self.options)
        elif self.kind == "nested":
            x = checkpoint(lambda x: checkpoint(self.part, torch.sin(x), **self.options), x, **self.options)
        else:
            x = checkpoint(self.part, checkpoint(self.part, x, **self.options), **self.options)
        return F.dropout(x, 0.1)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of an inner part in forward
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "nested", "sequential"])
def test_parts_that_run_again_in_backward_repeat_their_draws(kind, use_reentrant, devices):
    compare(lambda: Checkpointed(kind, use_reentrant=use_reentrant), devices)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_captured_step_repeats_the_draws_of_parts_that_run_again(devices):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3), nn.Tanh())

        def forward(self, x):
            return F.dropout(checkpoint(self.part, F.dropout(x, 0.2), use_reentrant=False), 0.1)

    module, x = Net().double(), torch.randn(ROWS, FEATURES, dtype=torch.float64)
    reference = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices, compile="trace")
    step = model.train_step(lambda y: (y**2).mean(), lambda p: torch.optim.SGD(p, lr=0.1), reduction="mean")
    torch.manual_seed(8)
    losses = [step(x) for _ in range(4)]
    assert "  traced " in str(model.report())
    torch.manual_seed(8)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for loss in losses:
        optimizer.zero_grad()
        expected = (reference(x) ** 2).mean()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-11)


def test_a_part_that_may_draw_anew_in_backward_is_refused():
    module = Checkpointed("plain", use_reentrant=False, preserve_rng_state=False).double()
    y = fastdp.wrap(module, gpus=2)(torch.randn(8, STEPS, FEATURES, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="preserve_rng_state=True"):
        y.sum().backward()


class OwnGenerator(nn.Module):
    """Draws with a generator that it keeps, and with torch's in between."""

    def __init__(self, seeds=False):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.generator = torch.Generator().manual_seed(5)
        self.seeds = seeds

    def forward(self, x):
        if self.seeds:
            self.generator.manual_seed(3)
        x = self.linear(x) + torch.randn(x.shape, dtype=x.dtype, generator=self.generator)
        x = F.dropout(x, 0.3) * torch.bernoulli(x.detach().sigmoid(), generator=self.generator)
        nn.init.trunc_normal_(noise := torch.empty(FEATURES, dtype=x.dtype), generator=self.generator)
        return x[..., torch.randperm(FEATURES, generator=self.generator)] + noise


@pytest.mark.parametrize("devices", DEVICES)
def test_a_modules_own_generator_draws_what_it_draws_on_one_device(devices):
    kept = []

    def make():
        kept.append(OwnGenerator())
        return kept[-1]

    compare(make, devices)
    reference = OwnGenerator().double()
    x = torch.randn(ROWS, STEPS, FEATURES, dtype=torch.float64)
    for _ in range(4):
        reference(x)
    assert torch.equal(kept[0].generator.get_state(), reference.generator.get_state())


def test_a_failed_step_gives_a_modules_generator_its_state_back():
    class Fails(OwnGenerator):
        def forward(self, x):
            y = super().forward(x)
            if self.fails and x.sum() > 1e3:
                raise KeyError("too much")
            return y

    module = Fails().double()
    module.fails = 0  # a number: no other kind of module, which would be tried anew
    x = torch.randn(8, STEPS, FEATURES, dtype=torch.float64)
    model = fastdp.wrap(module, gpus=2)
    model(x)
    before = module.generator.get_state(), torch.get_rng_state()
    module.fails = 1
    x[4:] += 10.0
    with pytest.raises(KeyError, match="too much"):
        model(x)
    assert torch.equal(module.generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_module_that_seeds_its_generator_in_forward_is_refused():
    x = torch.randn(8, STEPS, FEATURES, dtype=torch.float64)
    with pytest.raises(ValueError, match="Seed it outside of forward"):
        fastdp.wrap(OwnGenerator(seeds=True).double(), gpus=2)(x)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_module_that_skips_parts_at_random_draws_by_rows_in_those_that_run(devices):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(6))

        def forward(self, x):
            for part in self.parts:
                if torch.rand(()) < 0.5:
                    x = x + F.dropout(part(x), 0.3)
                x = x * torch.rand(FEATURES, dtype=x.dtype)
            return x

    for _ in range(3):
        compare(Skips, devices)


@pytest.mark.parametrize("devices", DEVICES)
def test_rows_on_another_axis_of_torchs_own_parts(devices):
    """As many steps as rows: the trial tells which axis of a mask has the rows."""
    module = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.4)).double()
    reference, x = copy.deepcopy(module), torch.randn(24, 24, FEATURES, dtype=torch.float64)
    torch.manual_seed(3)
    found = fastdp.wrap(module, gpus=devices, rows={"input": 1, "output": 1})(x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, reference(x), rtol=1e-9, atol=1e-11)


LOSSES = {
    "by rows": lambda y: F.dropout(y[:, :5] ** 2, 0.5).mean(),
    "classes first": lambda y: F.dropout(y.t()[:8] ** 2, 0.5).mean(),
}


@pytest.mark.parametrize("reduction", ["mean", None])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_each_devices_rows_draws_by_rows_or_is_refused(name, reduction):
    module = nn.Linear(9, 9).double()
    reference, x = copy.deepcopy(module), torch.randn(16, 9, dtype=torch.float64)
    step = fastdp.wrap(module, gpus=4).train_step(LOSSES[name], torch.optim.SGD, reduction=reduction)
    torch.manual_seed(2)
    if name == "classes first" and reduction == "mean":
        with pytest.raises(NotImplementedError, match="reduction=None"):
            step(x)
        return
    found = step(x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, LOSSES[name](reference(x)).detach())


@pytest.mark.parametrize("devices", DEVICES)
def test_draws_in_hooks_are_those_of_one_device(devices):
    def make():
        module = Apply(lambda x: F.dropout(x, 0.3))
        module.linear.register_forward_hook(lambda part, args, output: output + torch.randn_like(output))
        return module

    compare(make, devices)


@pytest.mark.parametrize("devices", DEVICES)
def test_draws_under_autocast(devices):
    class Net(Checkpointed):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    module = Net("plain", use_reentrant=False)
    reference, x = copy.deepcopy(module), torch.randn(ROWS, STEPS, FEATURES)
    found = []
    for model in (fastdp.wrap(module, gpus=devices), reference):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), torch.get_rng_state()])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    assert torch.equal(found[0][0] == 0, found[1][0] == 0)
    torch.testing.assert_close(module.first.weight.grad, reference.first.weight.grad, rtol=2e-2, atol=1e-3)


UNALIKE = {
    "Python's generator": (lambda x: x * random.random(), "random in forward"),
    "NumPy's generator": (lambda x: x * np.random.rand(), "numpy.random in forward"),  # noqa: NPY002
}


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_two_views_one_behind_the_other_are_split_along_the_steps(devices):
    module = Apply(lambda x: sum(F.dropout(torch.cat([x, x]), 0.4).chunk(2))).double()
    x = torch.randn(8, STEPS, FEATURES, dtype=torch.float64)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fastdp.wrap(copy.deepcopy(module), gpus=devices)(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", UNALIKE)
def test_draws_that_replicas_cannot_make_alike_are_refused_before_the_step(name):
    function, message = UNALIKE[name]
    x = torch.randn(8, STEPS, FEATURES, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        fastdp.wrap(Apply(function).double(), gpus=2)(x)
