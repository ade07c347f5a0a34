"""The engine's steps that bench/gpu/keras_ways.py times below Keras's loop, on the simulated CUDA."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.cases import CASES
from bench.gpu.keras_ways import EngineSteps, Fitted, facts_of
from fastdp.engine.replicas import Replica
from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options


def parallel(model, box, how):
    graph = "bucket" if how == "graph" else None
    return ParallelModel(model, box.devices(1), Options(compile="trace", timeout=60.0, graph=graph))


@pytest.mark.parametrize("how", ["traced", "graph"])
def test_steps_below_keras_s_loop_train_and_are_those_that_fit_runs(box, how):
    fitted = Fitted(CASES["tiny-mlp"], 2, lambda model: parallel(model, box, how))
    for _ in range(2):
        fitted.train(3)
    facts = facts_of(fitted.model)
    assert facts["capture_seconds"] > 0
    assert [entry["how"] for entry in facts["report"]["steps"]] == [how]
    steps = EngineSteps(fitted)
    before = Replica.train, Replica.update
    for run in (steps.fed, steps.on_the_card(), steps.bare(how)):
        weights = [weight.copy() for weight in fitted.template.get_weights()]
        assert run(2) > 0
        after = fitted.template.get_weights()
        assert all((a != b).any() for a, b in zip(weights, after, strict=True))
    assert (Replica.train, Replica.update) == before
    assert [entry["how"] for entry in fitted.model.report()] == [how]
    if how == "graph":
        box.graphs.clear()  # they hold the replica's memory
    del fitted, steps, run
    keras.backend.clear_session()
    gc.collect()


def test_bare_graphs_are_not_claimed_where_none_was_recorded(box):
    fitted = Fitted(CASES["tiny-mlp"], 2, lambda model: parallel(model, box, "traced"))
    fitted.train(3)
    with pytest.raises(NotImplementedError, match="no graph was recorded"):
        EngineSteps(fitted).bare("graph")
    del fitted
    keras.backend.clear_session()
    gc.collect()
