"""Captured steps of a model that is neither Keras's nor a torch.nn.Module: `PureStep` is all that they know of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from linear_step import UNUSED, LinearStep, train
from small_buckets import make_buckets_small

TESTS = Path(__file__).parents[1]


def assert_same(found, expected):
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    for ours, theirs in zip(found.outputs, expected.outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    for replica, other in zip(found.variables, expected.variables, strict=True):
        for ours, theirs in zip(replica, other, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def hows(trained):
    return {entry["how"] for entry in trained.captures.report}


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_replays_equal_eager_steps(parts):
    expected, found = train(None, parts), train("trace", parts)
    assert hows(found) == {"traced"}
    assert {entry["of"] for entry in found.captures.report} == {5, 6}
    assert not found.captures.compiling
    assert not any("compile_seconds" in entry for entry in found.captures.report)
    assert_same(found, expected)
    np.testing.assert_allclose(found.losses, train(None, 1).losses, rtol=1e-5)


def test_masks_are_drawn_anew_by_the_seed_that_the_step_before_has_moved():
    found = train("trace", 2)
    zeros = {tuple((outputs == 0).ravel()) for outputs in found.outputs}
    assert len(zeros) == len(found.outputs)


def scaled(step: LinearStep) -> None:
    step.settings.scale = 0.5


def inside_a_list(step: LinearStep) -> None:
    step.settings.factors[0] = 0.25


def another_loss(step: LinearStep) -> None:
    step.settings.loss = lambda outputs, targets: (outputs - targets).abs().sum()


@pytest.mark.parametrize("change", [scaled, inside_a_list, another_loss])
def test_what_the_step_has_read_of_python_is_compared_before_each_step(change):
    expected, found = train(None, 2, change), train("trace", 2, change)
    assert hows(found) == {"traced"}
    assert_same(found, expected)
    assert not np.allclose(found.losses[5:], train(None, 2).losses[5:], rtol=1e-3)


def test_each_bucket_of_gradients_is_told_once_in_a_step(monkeypatch):
    make_buckets_small(monkeypatch)
    found = train("trace", 2)
    (buckets,) = {len(replica.gradient_buffers.buckets()) for replica in LinearStep(1).replicas.values()}
    assert buckets > 1
    told = [mine for mine in found.ready if mine]
    assert len(told) == 2 * 8  # all steps but the first of each shape, on each replica
    assert all(sorted(mine) == list(range(buckets)) for mine in told)


def test_a_variable_that_nothing_depends_on_has_no_gradient_and_its_buffer_is_zero():
    def fill(step):
        for replica in step.replicas.values():
            replica.gradients[UNUSED].fill_(3.0)

    found = train("trace", 2, fill)
    assert hows(found) == {"traced"}
    assert [replica.gradients[UNUSED].tolist() for replica in found.step.replicas.values()] == [[0.0, 0.0]] * 2
    assert [outcome.gradients[UNUSED] for outcome in found.latest] == [None, None]


def test_a_value_that_is_read_on_the_host_is_told_with_its_place():
    expected = train(None, 2, reads=True)
    with pytest.warns(UserWarning, match=r"fastdp runs 'linear' eagerly.*needs values on the host, in the formula"):
        found = train("trace", 2, reads=True)
    assert hows(found) == {"eager"}
    assert_same(found, expected)


def test_what_is_known_beforehand_is_not_traced():
    with pytest.warns(UserWarning, match="because of its phase"):
        assert train("trace", 1, never="its phase").captures.report == [{"how": "eager", "why": "its phase"}]
    (entry,) = train("auto", 1, own="the loss").captures.report
    assert entry["why"].startswith("the loss is your own code")


WITHOUT_KERAS = """
import sys
sys.modules["keras"] = None  # to import it is an error
import linear_step
eager, traced = linear_step.train(None, 2), linear_step.train("trace", 2)
assert {entry["how"] for entry in traced.captures.report} == {"traced"}
assert all(abs(a - b) < 1e-6 for a, b in zip(eager.losses, traced.losses, strict=True))
others = ("keras.", "fastdp.keras", "fastdp.program.keras", "fastdp.program.torch")
loaded = [name for name in sys.modules if name.startswith(others)]
assert not loaded, loaded
"""


def test_a_process_without_keras_captures_steps():
    paths = [str(TESTS / "shared"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", WITHOUT_KERAS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
