"""Torch modules inside Keras models: run on the replicas' parameters, or refused with what to do instead."""

from __future__ import annotations

import threading
import warnings

import keras
import numpy as np
import pytest
import torch
from torch import nn

import fastdp
from fastdp.tensors.row_effects import NotByRowsError

L = keras.layers
X = np.random.default_rng(0).normal(size=(7, 4)).astype("float32")
Y = np.ones((7, 3), "float32")


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class OwnGenerator(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape[0], 3, generator=self.generator)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Remembering(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[0])
        return super().forward(x)


class Hidden(nn.Linear):
    """Keeps its last output, as a recurrent module keeps its state."""

    last = None

    def forward(self, x):
        out = super().forward(x)
        self.last = out.detach().mean()
        return out


class WithLock(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()


def hooked():
    module = nn.Linear(4, 3)
    module.register_forward_hook(lambda module, args, out: out * 2)
    return module


def parametrized():
    module = nn.Linear(4, 3)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    return module


def jit_traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(nn.Linear(4, 3), torch.zeros(2, 4))


def model_of(module):
    keras.utils.set_random_seed(2)
    wrapper = L.TorchModuleWrapper(module, output_shape=(None, 3))
    return keras.Sequential([keras.Input((4,)), wrapper, L.Dense(3)])


def trained(module, how=None):
    keras.utils.set_random_seed(5)
    model = model_of(module() if callable(module) and not isinstance(module, nn.Module) else module)
    one = fastdp.wrap(model, gpus=3, compile=None) if how == "wrap" else model
    one.compile(keras.optimizers.SGD(0.1), "mse")
    losses = [float(one.train_on_batch(X, Y)) for _ in range(3)]
    return [*losses, *one.predict(X, verbose=0).ravel()]


RIGHT = {
    "linear": lambda: nn.Linear(4, 3),
    "nested": lambda: nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3))),
    "hook": hooked,
    "parametrization": parametrized,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
}
REFUSED = {
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(4, 3)), r"DataParallel.*\.module"),
    "DataParallel inside": (lambda: nn.Sequential(nn.DataParallel(nn.Linear(4, 3))), r"DataParallel.*\.module"),
    "compiled": (lambda: torch.compile(nn.Linear(4, 3), backend="eager"), r"OptimizedModule.*_orig_mod"),
    "traced": (jit_traced, "from which it was made"),
    "buffers": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "buffers.*keras.layers"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), "buffers.*keras.layers"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "draws at random.*keras.layers"),
    "lock": (lambda: WithLock(4, 3), "cannot be copied.*lock"),
}
FOUND_OUT = {
    "functional dropout": (lambda: FunctionalDropout(4, 3), "draws at random in its forward pass"),
    "generator": (lambda: OwnGenerator(4, 3), "draws at random in its forward pass"),
    "inside": (lambda: nn.Sequential(nn.Identity(), FunctionalDropout(4, 3)), "draws at random in its forward pass"),
    "counter": (lambda: Counting(4, 3), "changes its attribute 'calls'"),
    "list": (lambda: Remembering(4, 3), "changes its attribute 'seen'"),
    "tensor": (lambda: nn.Sequential(Hidden(4, 3)), r"changes its attribute '0\.last'"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_modules_of_parameters_train_as_on_one_device(name):
    np.testing.assert_allclose(trained(RIGHT[name], "wrap"), trained(RIGHT[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_replicas_cannot_run_is_an_error_under_wrap_and_plain_under_install(name):
    make, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        fastdp.wrap(model_of(make()), gpus=3)
    expected = trained(make)
    fastdp.install(gpus=3, compile=None)
    with pytest.warns(UserWarning, match=said):
        found = trained(make)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FOUND_OUT)
def test_draws_and_state_in_forward_are_found_out_before_the_first_step(name):
    make, said = FOUND_OUT[name]
    expected = trained(make)
    model = model_of(make())
    parallel = fastdp.wrap(model, gpus=3, compile=None)
    parallel.compile("sgd", "mse")
    before = parallel.get_weights()
    with pytest.raises(NotByRowsError, match=f"(?s){said}.*keras.layers"):
        parallel.train_on_batch(X, Y)
    for weight, other in zip(parallel.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, other)
    fastdp.install(gpus=3, compile=None)
    with pytest.warns(UserWarning, match=f"(?s)run on one device.*{said}"):
        found = trained(make)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # the trial has drawn and kept nothing


def test_a_module_in_two_wrappers_is_an_error_and_in_one_layer_called_twice_right():
    module = nn.Linear(4, 4)
    inputs = keras.Input((4,))
    two = [L.TorchModuleWrapper(module, output_shape=(None, 4)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"share one tensor.*call that layer twice"):
        fastdp.wrap(keras.Model(inputs, two[1](two[0](inputs))), gpus=2)

    def once(wrapped):
        keras.utils.set_random_seed(3)
        layer = L.TorchModuleWrapper(nn.Linear(4, 4), output_shape=(None, 4))
        model = keras.Model(inputs, L.Dense(3)(layer(layer(inputs))))
        one = fastdp.wrap(model, gpus=3, compile=None) if wrapped else model
        one.compile(keras.optimizers.SGD(0.1), "mse")
        return [float(one.train_on_batch(X, Y)) for _ in range(3)]

    np.testing.assert_allclose(once(True), once(False), rtol=1e-5)


class Holder(keras.layers.Layer):
    """Holds modules where Keras does not look."""

    def __init__(self, held):
        super().__init__(name="holder")
        self.held = held

    def call(self, x):
        return next(iter(self.held))(x)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (lambda: [nn.BatchNorm1d(4)], "buffers"),
        (lambda: (nn.Dropout(0.5),), "draws at random"),
        (lambda: [nn.DataParallel(nn.Linear(4, 4))], "DataParallel"),
        (lambda: [fastdp.wrap(nn.Linear(4, 4), gpus=2)], "parallel already"),
    ],
)
def test_modules_in_lists_of_a_layer_are_checked_too(held, said):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.Dense(3)(inputs))
    model.dense = model.layers[-1]
    model.layers[-1].held = held()
    with pytest.raises(ValueError, match=said):
        fastdp.wrap(model, gpus=2)


def test_a_parallel_model_inside_another_is_an_error():
    inputs = keras.Input((4,))
    with pytest.warns(UserWarning, match="used inside another model"):
        outer = keras.Model(inputs, fastdp.wrap(keras.Sequential([inputs, L.Dense(3)]), gpus=2)(inputs))
    with pytest.raises(ValueError, match="parallel already"):
        fastdp.wrap(outer, gpus=2)
