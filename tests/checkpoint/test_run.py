"""`fastdp.Checkpoint`: what it holds, what it refuses, and how it ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastdp
from fastdp.runtime.select import resolve


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def gradient(parameters, batch):
    x, y = batch
    error = x @ parameters["w"] - y
    return (error**2).mean(), {"w": 2 * x.T @ error / len(x)}, [error]


def momentum(parameters, slots, gradients):
    slot = 0.9 * slots["m"] + gradients["w"]
    return {"w": parameters["w"] - 0.01 * slot}, {"m": slot}


def engine_of(slot=0.0):
    program = fastdp.FunctionProgram({"w": np.zeros(3)}, gradient, momentum, gradient, {"m": np.full(3, slot)})
    return program, fastdp.DataParallel(program, resolve(2))


def test_a_program_of_functions_goes_on_with_parameters_and_slots(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 3))
    batch = [x, x.sum(1)]
    program, engine = engine_of()
    with fastdp.Checkpoint(tmp_path, model=program, every_steps=3) as checkpoint:
        assert checkpoint.restore() is None
        for _ in range(4):
            engine.train(batch)
            checkpoint.step()
    for _ in range(2):
        engine.train(batch)
    for trains_before in (False, True):  # replicas that exist follow too
        other, second = engine_of(slot=9.0)
        if trains_before:
            second.train(batch)
        with fastdp.Checkpoint(tmp_path, model=other) as checkpoint:
            assert checkpoint.restore().step == 4
            for _ in range(2):
                second.train(batch)
        np.testing.assert_array_equal(other.parameters["w"], program.parameters["w"])


def fail(checkpoint):
    checkpoint.step()
    raise ValueError("`epoch` of the loop")


def test_nothing_is_saved_after_an_error_and_the_folder_is_free_again(tmp_path):
    module = nn.Linear(2, 1)
    with (
        pytest.raises(ValueError, match="`epoch` of the loop"),
        fastdp.Checkpoint(tmp_path, model=module, every_steps=100) as checkpoint,
    ):
        fail(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    fastdp.Checkpoint(tmp_path, model=module).close()


def test_positions_of_a_loop_that_counts_by_itself(tmp_path):
    module = nn.Linear(2, 1)
    with fastdp.Checkpoint(tmp_path, model=module, every_steps=1) as checkpoint:
        checkpoint.step(epoch=3, batch=6)
        assert checkpoint.position == (3, 7, 1)
    with fastdp.Checkpoint(tmp_path, model=module) as checkpoint:
        assert checkpoint.restore() == (3, 7, 1)


def test_a_loader_with_a_generator_of_its_own_goes_on_in_mid_epoch(tmp_path):
    module = nn.Linear(2, 1)

    def loader():
        generator = torch.Generator().manual_seed(3)
        return torch.utils.data.DataLoader(range(9), batch_size=2, shuffle=True, generator=generator)

    def epochs(stop=None):
        seen, data = [], loader()
        with fastdp.Checkpoint(tmp_path / str(stop is None), model=module, every_steps=1) as checkpoint:
            checkpoint.restore()
            for _ in checkpoint.epochs(2):
                for batch in checkpoint.batches(data):
                    seen.append(batch.tolist())
                    checkpoint.step()
                    if checkpoint.position.step == stop:
                        return seen
        return seen

    whole = epochs()
    (tmp_path / "True").rename(tmp_path / "whole")
    first = epochs(stop=7)
    (tmp_path / "False").rename(tmp_path / "True")
    assert first + epochs() == whole


def test_data_that_is_shorter_than_before_is_an_error(tmp_path):
    module = nn.Linear(2, 1)
    with fastdp.Checkpoint(tmp_path, model=module) as checkpoint:
        batches = checkpoint.batches([1, 2, 3])
        for _ in range(2):
            next(batches)
            checkpoint.step()
    with fastdp.Checkpoint(tmp_path, model=module) as checkpoint:
        checkpoint.restore()
        with pytest.raises(ValueError, match="`data` has 1 batches, and the checkpoint was made after 2"):
            list(checkpoint.batches([1]))


def test_an_iterator_is_refused(tmp_path):
    with (
        fastdp.Checkpoint(tmp_path, model=nn.Linear(2, 1)) as checkpoint,
        pytest.raises(TypeError, match="`data` must be something that can be iterated anew"),
    ):
        list(checkpoint.batches(iter([1])))


def test_other_parts_than_before_are_an_error_before_anything_changes(tmp_path):
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with fastdp.Checkpoint(tmp_path, model=module, optimizer=optimizer) as checkpoint:
        checkpoint.step()
    other = nn.Linear(2, 1)
    before = other.weight.clone()
    with (
        pytest.raises(ValueError, match=r"has the parts \{'optimizer': 1\}.*this run has none"),
        fastdp.Checkpoint(tmp_path, model=other) as checkpoint,
    ):
        checkpoint.restore()
    assert torch.equal(other.weight, before)


def test_an_object_without_a_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"`extra\['x'\]` must have `state_dict`"):
        fastdp.Checkpoint(tmp_path, model=nn.Linear(2, 1), extra={"x": 3})
