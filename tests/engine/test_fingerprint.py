"""The fingerprint of a run: a line for each training step, only where it is asked for."""

from __future__ import annotations

import pytest
from least_squares import line, rows

import fastdp
from fastdp import settings
from fastdp.checkpoint import fingerprints


@pytest.fixture(autouse=True)
def two_devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def trained(steps, **options):
    engine = fastdp.DataParallel(line(), 2, **options)
    for step in steps:
        engine.train(rows(8, step))
    engine.predict(rows(8))
    return engine


def test_a_step_has_hashes_of_what_goes_in_and_comes_out(tmp_path):
    for name, steps in (("a", [1, 2, 3]), ("b", [1, 2, 3]), ("c", [1, 5, 3])):
        trained(steps, fingerprint=tmp_path / name)
    a, b, c = (fingerprints.read(tmp_path / name) for name in "abc")
    assert [(step["kind"], step["rows"]) for step in a.steps] == [("train", 8)] * 3
    assert (a.facts["shards"], a.facts["replicas"]) == (None, 2)
    assert fingerprints.first_parting(a, b) is None
    assert fingerprints.first_parting(a, c) == fingerprints.Parting(1, "batch")
    assert len({step["weights"] for step in a.steps} | {a.facts["weights"]}) == 4


def test_steps_that_wait_and_those_that_fail(tmp_path):
    program = line()
    engine = fastdp.DataParallel(program, 2, fingerprint=tmp_path / "a")
    engine.train(rows(8), reduce=False)
    train, program.train = program.train, lambda *given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.train(rows(8))
    program.train = train
    engine.train(rows(8))
    found = fingerprints.read(tmp_path / "a")
    assert [step["gradients"] is None for step in found.steps] == [True, False]


def test_the_environment_asks_for_all_models_of_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv(settings.FINGERPRINT, str(tmp_path / "a"))
    trained([1])
    trained([1, 2], fingerprint=tmp_path / "b")  # the argument counts
    assert len(fingerprints.read(tmp_path / "a").steps) == 1
    monkeypatch.setenv(settings.FINGERPRINT, str(tmp_path / "no" / "a"))
    assert any("a file in a folder that exists" in problem for problem in settings.problems())


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained([1])
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_that_is_no_path_is_an_error():
    with pytest.raises(TypeError, match=r"`fingerprint` must be a path\. Received: True"):
        fastdp.DataParallel(line(), 2, fingerprint=True)
