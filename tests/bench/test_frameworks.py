"""The comparison with other ways of data-parallel training: its table and picture, over ways of a few lines."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import matplotlib  # noqa: F401  draws the picture; names the need, so that this file is left out without it
import pytest

from fastdp.benchmark import run
from fastdp.benchmark.request import LIBRARIES

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "benchmark" / "stub_worker.py"
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def peers():
    """bench/frameworks/compare.py as a module."""
    return importlib.import_module("bench.frameworks.compare")


@pytest.fixture
def compare(peers, tmp_path, monkeypatch):
    """Run the comparison on ways that pretend; the status, the result and the path of its file."""
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    monkeypatch.setattr(run, "command", lambda request: [sys.executable, str(STUB), request.to_json()])
    monkeypatch.setattr(run, "missing", lambda request: "not here" if request.library == "keras-jax" else "")

    def measure(*names: str):
        out = tmp_path / "out"
        status = peers.main(["--models", "mlp", "--steps", "10", "--rounds", "3", "--out", str(out), "--peers", *names])
        (path,) = out.glob("*.json")
        return status, json.loads(path.read_text()), path

    return measure


def test_medians_of_samples_per_second_are_kept_with_ratios_and_failures(compare):
    status, line, path = compare("fastdp-2", "torch", "keras-jax")
    assert status == 0
    mlp = line["results"]["mlp"]
    assert {name: found["median"] for name, found in mlp["samples_per_second"].items()} == {
        "fastdp-2": pytest.approx(128 / 0.012, rel=1e-4),
        "torch": 128 / 0.02,
    }
    assert mlp["speed_of_fastdp_2_to"] == {"fastdp-2": 1.0, "torch": 1.667}
    assert mlp["failed"] == {"keras-jax": "not here"}
    assert (mlp["rounds"], mlp["steps_per_round"], mlp["rows"]) == (3, 10, 128)
    assert line["hardware"]["cores"] == os.cpu_count()
    assert (
        "Keras JAX, 1 device failed on MLP 784-512-512-10, batch 128: not here" in path.with_suffix(".md").read_text()
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")


def test_nothing_measured_is_a_failure(compare):
    status, line, _ = compare("keras-jax")
    assert status == 1
    assert line["results"]["mlp"]["samples_per_second"] == {}


def test_the_page_stars_a_model_of_another_size():
    table = importlib.import_module("bench.frameworks.table")
    rates = {"median": 10.0, "q1": 9.0, "q3": 11.0}
    line = {
        "titles": {name: f"the {name} one" for name in ("first", "twin", "other")},
        "results": {
            "mlp": {
                "title": "MLP",
                "rounds": 3,
                "samples_per_second": dict.fromkeys(("first", "twin", "other"), rates),
                "speed_of_fastdp_2_to": {},
                "facts": {name: {"parameters": 8 if name == "other" else 7} for name in ("first", "twin", "other")},
                "failed": {},
            }
        },
        "hardware": {"cpu": "a", "cores": 2},
        "versions": {},
        "commit": "c",
        "date": "d",
    }
    page = table.markdown(line)
    assert "| the other one | 10* |" in page
    assert "| the twin one | 10 |" in page
    assert "has 8 parameters" in page


@pytest.mark.parametrize("options", [["--models", "gpt"], ["--peers", "mpi"], ["--rounds", "0"]])
def test_options_that_name_nothing_are_usage_errors(peers, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers.main(options)
    assert options[0] in capsys.readouterr().err


def test_every_peer_can_be_asked_for_every_case(peers):
    assert len(peers.PEERS) == 9
    for model, case in peers.CASES.items():
        names = {peers.request(model, peer).name for peer in peers.PEERS}
        assert len(names) == 9
        assert case.title.endswith(f"batch {case.rows}")
    assert {fields["library"] for fields in peers.PEERS.values()} == set(LIBRARIES)


def test_pages_of_recorded_results_are_those_that_their_json_gives(peers):
    pages = sorted(peers.RESULTS.glob("peers*.md"))
    assert len(pages) >= 4
    for page in pages:
        assert peers.markdown(json.loads(page.with_suffix(".json").read_text("utf-8"))) == page.read_text("utf-8")
