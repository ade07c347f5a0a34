"""The comparison with other ways of data-parallel training: its harness, on small scripts that speak as peers do."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib  # noqa: F401  draws the picture; names the need, so that this file is left out without it
import pytest

from fastdp.benchmark.process import Process
from fastdp.benchmark.request import LIBRARIES

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH.parent))

PEER = f"""
import os, sys, time
sys.path.insert(0, {str(BENCH.parent)!r})
from fastdp.benchmark.request import Prepared, Round
from fastdp.benchmark.serve import serve
how = sys.argv[1]
print("printed, and no answer", end="")

def prepare():
    if how == "broken":
        print("words on stderr", file=sys.stderr)
        raise ValueError("cannot build")
    if how == "slow to start":
        time.sleep(60)
    rounds = []

    def run(count):
        rounds.append(os.environ["SECONDS"])
        with open(os.environ["TURNS"], "a") as file:
            print(how, file=file)
        if how == "dies" and len(rounds) == 2:
            raise MemoryError("no room\\nand more lines")
        if how == "hangs":
            os.fork() or time.sleep(60)
            time.sleep(60)
        return Round(count, float(rounds[-1]))

    return Prepared(run, {{"parameters": 8 if how == "other" else 7}})

serve(prepare)
"""


@pytest.fixture(scope="module")
def peers():
    """bench/frameworks/compare.py as a module."""
    return importlib.import_module("bench.frameworks.compare")


class Fake(NamedTuple):
    """A peer that is a script of its own."""

    title: str
    script: Path
    how: str
    environment: dict[str, str]

    def start(self, case, timeout: float) -> Process:
        """Start the script."""
        return Process([sys.executable, str(self.script), self.how], self.environment, timeout)


@pytest.fixture
def compare(peers, tmp_path):
    """Run the comparison on fake peers that take these seconds a round; the result, and the order of the turns."""

    def run(seconds: dict[str, float], *options: str):
        script, turns = tmp_path / "peer.py", tmp_path / "turns"
        script.write_text(PEER)
        fakes = {
            how: Fake(f"the {how} one", script, how, {"SECONDS": str(value), "TURNS": str(turns)})
            for how, value in seconds.items()
        }
        out = tmp_path / "out"
        status = peers.main(["--models", "mlp", "--steps", "10", "--out", str(out), *options], fakes)
        (path,) = out.glob("*.json")
        order = turns.read_text().splitlines() if turns.exists() else []
        return status, json.loads(path.read_text()), path, order

    return run


def test_peers_take_turns_and_medians_of_samples_per_second_are_kept(compare):
    status, line, _, order = compare({"fastdp-2": 0.5, "fit": 2.0}, "--rounds", "3")
    assert status == 0
    assert order == ["fastdp-2", "fit"] * 3
    mlp = line["results"]["mlp"]
    assert {name: found["median"] for name, found in mlp["samples_per_second"].items()} == {
        "fastdp-2": 10 * 128 / 0.5,
        "fit": 10 * 128 / 2.0,
    }
    assert mlp["speed_of_fastdp_2_to"] == {"fastdp-2": 1.0, "fit": 4.0}
    assert mlp["failed"] == {}
    assert line["hardware"]["cores"] == os.cpu_count()
    assert line["versions"]["python"]


def test_a_peer_that_fails_is_recorded_with_its_reason_and_the_others_go_on(compare):
    status, line, path, order = compare({"broken": 1.0, "dies": 1.0, "fit": 1.0}, "--rounds", "3")
    mlp = line["results"]["mlp"]
    assert status == 0
    assert mlp["failed"] == {
        "broken": "ended with status 1: ValueError: cannot build",
        "dies": "ended with status 1: MemoryError: no room",
    }
    assert list(mlp["samples_per_second"]) == ["fit"]
    assert order.count("fit") == 3
    assert "the dies one failed on MLP 784-512-512-10, batch 128: ended" in path.with_suffix(".md").read_text()


def test_a_late_peer_is_ended_with_all_that_it_started(compare):
    began = time.monotonic()
    options = ("--rounds", "2", "--timeout", "1", "--start-timeout", "5")
    status, line, _, _ = compare({"hangs": 1.0, "slow to start": 1.0}, *options)
    assert status == 1  # nothing was measured
    assert line["results"]["mlp"]["failed"] == {
        "slow to start": "building, compiling and the first step took longer than 5 seconds",
        "hangs": "a round took longer than 1 seconds",
    }
    assert time.monotonic() - began < 55  # not waited for: each would sleep for 60 seconds


def test_a_peer_whose_library_is_missing_is_not_started(peers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else object())
    asked = ["--models", "mlp", "--peers", "keras-jax", "--out", str(tmp_path)]
    assert peers.main(asked) == 1
    assert "keras-jax failed: not installed here: pip install jax" in capsys.readouterr().out


def test_the_page_stars_a_model_of_another_size_and_the_picture_is_drawn(compare):
    _, _, path, _ = compare({"fit": 1.0, "twin": 1.0, "other": 1.0}, "--rounds", "1")
    page = path.with_suffix(".md").read_text()
    assert "| the other one | 1,280* |" in page
    assert "| the twin one | 1,280 |" in page
    assert "has 8 parameters" in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("options", [["--models", "gpt"], ["--peers", "mpi"], ["--rounds", "0"]])
def test_options_that_name_nothing_are_usage_errors(peers, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers.main(options)
    assert options[0] in capsys.readouterr().err


def test_a_peer_trains_a_case_by_the_ways_of_the_command(peers, tmp_path, monkeypatch):
    small = {"mlp": peers.Case("mlp:features=6,width=8", 8, 2)}
    monkeypatch.setattr(peers, "CASES", small)
    assert (
        peers.main(["--models", "mlp", "--peers", "keras-torch", "torch", "--rounds", "1", "--out", str(tmp_path)]) == 0
    )
    (path,) = tmp_path.glob("*.json")
    mlp = json.loads(path.read_text())["results"]["mlp"]
    assert mlp["failed"] == {}
    assert mlp["title"] == "MLP 6-8-8-10, batch 8"
    assert {name: facts["parameters"] for name, facts in mlp["facts"].items()} == {"keras-torch": 218, "torch": 218}


def test_every_peer_can_be_asked_for_every_case(peers):
    assert len(peers.PEERS) == 9
    assert all(one.library in LIBRARIES for one in peers.PEERS.values())
    assert all(case.title.endswith(f"batch {case.rows}") for case in peers.CASES.values())


def test_pages_of_recorded_results_are_those_that_their_json_gives(peers):
    pages = sorted(peers.RESULTS.glob("peers*.md"))
    assert len(pages) >= 4
    for page in pages:
        assert peers.markdown(json.loads(page.with_suffix(".json").read_text("utf-8"))) == page.read_text("utf-8")
