"""The comparison with other ways of data-parallel training: its harness, on small scripts that speak as peers do."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import matplotlib  # noqa: F401  draws the picture; names the need, so that this file is left out without it
import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH.parent))

PEER = f"""
import os, sys, time
sys.path.insert(0, {str(BENCH.parent)!r})
from fastdp.benchmark.request import Prepared, Round
from fastdp.benchmark.serve import serve
how, model, steps = sys.argv[1:]
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


@pytest.fixture
def compare(peers, tmp_path):
    """Run the comparison on fake peers that take these seconds a round; the result, and the order of the turns."""

    def run(seconds: dict[str, float], *options: str):
        script, turns = tmp_path / "peer.py", tmp_path / "turns"
        script.write_text(PEER)
        fakes = {
            how: peers.Peer(f"the {how} one", script, how, {"SECONDS": str(value), "TURNS": str(turns)})
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


def test_a_peer_whose_library_is_missing_is_not_started(peers, tmp_path, capsys):
    absent = peers.Peer("absent", tmp_path / "none.py", "fit", needs="no_such_library")
    assert peers.main(["--models", "mlp", "--out", str(tmp_path)], {"absent": absent}) == 1
    assert "absent failed: no_such_library is not installed here" in capsys.readouterr().out


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


def test_every_peer_is_a_script_of_the_checkout(peers):
    assert len(peers.PEERS) == 9
    assert all(peer.script.is_file() for peer in peers.PEERS.values())
