"""With `shards=` the number of devices does not change a bit: of weights, optimizers, losses, metrics and outputs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from least_squares import line, rows
from torch import nn
from torch.nn import functional

import fastdp

SHARDS = 8
# Batches of a ragged end, of fewer rows than shards, and of one row.
SIZES = (24, 24, 13, 5, 1, 24)


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


def bits(*arrays) -> list[bytes]:
    """The bytes of arrays, tensors and numbers."""
    return [np.asarray(array.detach() if isinstance(array, torch.Tensor) else array).tobytes() for array in arrays]


def images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6, 6, 3)).astype("float32"), rng.integers(0, 5, n)


def network() -> keras.Model:
    """A model of everything that devices could change: batch statistics, draws and sums."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(5, kernel_regularizer="l2"),
        ]
    )


def wrapped(count: int, optimizer, **options) -> fastdp.ParallelModel:
    parallel = fastdp.wrap(network(), gpus=count, **{"shards": SHARDS, **options})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    parallel.compile(optimizer, loss, metrics=["accuracy"])
    return parallel


def fitted(count: int, optimizer, **options) -> list[bytes]:
    """The bits of all variables, the history and predictions after a `fit` with a ragged last batch."""
    parallel = wrapped(count, optimizer, **options)
    x, y = images(75)
    history = parallel.fit(x, y, batch_size=24, epochs=2, verbose=0, validation_split=0.1).history
    values = [value for one in (parallel.template, parallel.optimizer) for value in one.variables]
    return bits(*values, *[np.array(told) for told in history.values()], parallel.predict(x[:13], verbose=0))


FITS = {
    "batch statistics by shard": ((1, 2, 3, 4, 5, 8), lambda: keras.optimizers.Adam(0.01), {"compile": None}),
    "traced": ((1, 3), lambda: keras.optimizers.Adam(0.01), {}),
    "batch statistics of the batch": ((1, 3, 8), lambda: keras.optimizers.SGD(0.1, 0.9), {"sync_batch_norm": True}),
    "accumulation": (
        (1, 3, 8),
        lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
        {"compile": None},
    ),
    "each updates itself": (
        (1, 3, 8),
        lambda: keras.optimizers.RMSprop(0.01, clipnorm=1.0),
        {"compile": None, "update": "each"},
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_has_the_same_bits_on_any_number_of_devices(name):
    counts, optimizer, options = FITS[name]
    first = fitted(counts[0], optimizer(), **options)
    for count in counts[1:]:
        assert fitted(count, optimizer(), **options) == first, count


def test_without_shards_the_number_of_devices_changes_bits():
    assert fitted(1, "adam", shards=None) != fitted(2, "adam", shards=None)


def test_train_on_batch_has_the_same_bits_for_any_number_of_rows():
    def trained(count: int) -> list[bytes]:
        parallel = wrapped(count, "adam", compile=None)
        told = [parallel.train_on_batch(*images(n, seed)) for seed, n in enumerate(SIZES)]
        return bits(*parallel.template.variables, np.array(told))

    assert trained(1) == trained(3) == trained(8)


class OwnStep(keras.Sequential):
    """A model with a train step of its own, whose layers are called with the whole batch."""

    def train_step(self, data):
        x, y = data[:2]
        with torch.enable_grad():
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x, training=True), True))
            self.zero_grad()
            loss.backward()
        trained = self.trainable_variables
        self.optimizer.apply([v.value.grad for v in trained], trained)
        return {"loss": loss}


def test_a_train_step_of_the_models_own_has_the_same_bits():
    def trained(count: int) -> list[bytes]:
        parallel = fastdp.wrap(OwnStep([keras.Input((6, 6, 3)), *network().layers]), gpus=count, shards=SHARDS)
        parallel.compile("sgd")
        told = [parallel.train_on_batch(*images(n, seed)) for seed, n in enumerate((16, 13))]
        return bits(*parallel.template.variables, np.array(told))

    assert trained(1) == trained(3) == trained(8)


def module() -> nn.Module:
    torch.manual_seed(5)
    parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*parts)


def tensors(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = images(n, seed)
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y)


def by_train_step(count: int, accumulate: int = 1, **options) -> list[bytes]:
    model = module()
    parallel = fastdp.wrap(model, gpus=count, shards=SHARDS, **options)
    step = parallel.train_step(
        functional.cross_entropy, lambda p: torch.optim.Adam(p, lr=0.01), reduction="mean", accumulate=accumulate
    )
    told = [step(*tensors(n, seed)) for seed, n in enumerate(SIZES)]
    if accumulate > 1:
        step.flush()
    slots = [value for state in step.optimizer.state.values() for value in state.values()]
    return bits(*model.state_dict().values(), *slots, *told)


@pytest.mark.parametrize("options", [{}, {"sync_batch_norm": True, "compile": None}, {"accumulate": 4}], ids=str)
def test_a_torch_train_step_has_the_same_bits(options):
    first = by_train_step(1, **options)
    for count in (3, 8):
        assert by_train_step(count, **options) == first, count


def test_a_torch_loop_has_the_same_bits():
    def trained(count: int) -> list[bytes]:
        model = module()
        parallel = fastdp.wrap(model, gpus=count, shards=SHARDS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        told = []
        for seed, n in enumerate(SIZES):
            x, y = tensors(n, seed)
            optimizer.zero_grad()
            loss = functional.cross_entropy(parallel(x), y)
            loss.backward()
            optimizer.step()
            told.append(loss)
        return bits(*model.state_dict().values(), *told)

    first = trained(1)
    assert all(trained(count) == first for count in (3, 8))


def test_each_operation_of_a_shard_uses_the_same_threads_on_any_number_of_devices(capsys):
    class Counting(nn.Linear):
        def forward(self, x):
            print(torch.get_num_threads())  # noqa: T201 - all devices would change an object
            return super().forward(x)

    before = torch.get_num_threads()
    torch.set_num_threads(24)
    try:
        found = []
        for count in (1, 3, 8):
            step = fastdp.wrap(Counting(4, 2), gpus=count, shards=SHARDS, compile=None).train_step(
                functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), reduction="mean"
            )
            step(torch.ones(16, 4), torch.ones(16, 2))  # and trials, which run on the thread that asks
            capsys.readouterr()
            step(torch.ones(16, 4), torch.ones(16, 2))
            found.append(set(capsys.readouterr().out.split()))
        assert found == [{"3"}] * 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("n", [32, 5])
def test_a_function_program_has_the_same_bits_and_adds_in_a_tree(n, update):
    def trained(count: int, **options) -> list[bytes]:
        program = line(bias=True)
        engine = fastdp.DataParallel(program, count, update=update, **options)
        results = [engine.train(rows(n, seed)) for seed in range(3)]
        return bits(*program.parameters.values(), *[part for one in results for part in (one.sums, *one.outputs)])

    first = trained(1, shards=SHARDS)
    assert all(trained(count, shards=SHARDS) == first for count in (2, 3, 4, 5, 8))
    if n == 32:
        assert trained(8) != first  # eight devices without shards add in the order of ranks
