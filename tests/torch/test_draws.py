"""Random draws: any number of devices gets the numbers that plain torch draws for the whole batch."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    "rrelu": (lambda x: F.rrelu(x, training=True), "depends on the values"),
    "a permutation of the rows": (lambda x: x[torch.randperm(len(x))], "permutes the rows"),
    "a generator of its own": (
        lambda x: x + torch.rand(FEATURES, dtype=x.dtype, generator=torch.Generator().manual_seed(1)),
        "torch.Generator of its own",
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
    x[4:] = -1.0
    step = fastdp.wrap(module, gpus=2).train_step(lambda y: (y**2).mean(), lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
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


UNALIKE = {
    "Python's generator": (lambda x: x * random.random(), "random in forward"),
    "NumPy's generator": (lambda x: x * np.random.rand(), "numpy.random in forward"),  # noqa: NPY002
    "two views one behind the other": (lambda x: sum(F.dropout(torch.cat([x, x]), 0.4).chunk(2)), "gpus="),
}


@pytest.mark.parametrize("name", UNALIKE)
def test_draws_that_replicas_cannot_make_alike_are_refused_before_the_step(name):
    function, message = UNALIKE[name]
    x = torch.randn(8, STEPS, FEATURES, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        fastdp.wrap(Apply(function).double(), gpus=2)(x)
