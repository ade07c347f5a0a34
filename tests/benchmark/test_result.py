"""The file of a result: what is kept is read again, and a wrong file is a clear error."""

from __future__ import annotations

import copy
import json

import pytest

from fastdp.benchmark.result import FILE, check, load, save

RATES = {"median": 100.0, "q1": 90.0, "q3": 110.0, "rounds": [90.0, 100.0, 110.0]}
ENTRY = {
    "name": "fastdp, 2 devices",
    "library": "fastdp",
    "devices": 2,
    "kind": "virtual",
    "mode": "auto",
    "batch": 8,
    "samples_per_second": RATES,
    "step_seconds": {"median": 0.08, "q1": 0.07, "q3": 0.09, "rounds": [0.07, 0.08, 0.09]},
    "efficiency": None,
    "warm_up": {"steps": 12, "seconds": 1},
    "first_step_seconds": 0.5,
    "capture_seconds": None,
    "compile_seconds": None,
    "how": "traced",
    "why": "",
    "verbs": [{"device": "virtual:0", "rows": 4, "seconds": {"compute": 0.05}, "nbytes": {}, "peak_nbytes": None}],
    "between_seconds": 0.001,
    "overhead_seconds": 0.002,
    "peak_host_nbytes": 10**9,
    "buckets": [4096],
    "utilization": None,
    "joules_per_sample": None,
    "trace": None,
}
RESULT = {
    "schema": 1,
    "fastdp": "0.1",
    "date": "2026-11-29T12:00:00+0000",
    "command": ["fastdp", "bench", "mlp"],
    "machine": {"cpu": "a", "cores": 2, "memory_nbytes": 2**33, "system": "Linux", "gpus": [], "driver": None},
    "versions": {"python": "3.11"},
    "noise": {
        "idle_loop": {"median_seconds": 0.01, "q1": 0.01, "q3": 0.011},
        "relative_spread": 0.1,
        "verdict": "quiet",
    },
    "target": {
        "name": "mlp",
        "title": "MLP",
        "framework": "keras",
        "parameters": 7,
        "inputs": [{"name": "x", "shape": [4], "dtype": "float32"}],
        "loss": "mse",
        "optimizer": "sgd",
    },
    "settings": {
        "batch": 8,
        "precision": "float32",
        "data": "synthetic",
        "steps": None,
        "seconds": 2.0,
        "rounds": 3,
        "seed": 0,
    },
    "entries": [ENTRY],
    "failed": [{"name": "DDP, 2 devices", "reason": "not installed"}],
    "batches": None,
}


def changed(*path, value):
    """The result with another value at a place; None in place of a value removes the field."""
    made = copy.deepcopy(RESULT)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


def test_what_is_saved_is_loaded_again_from_the_file_and_from_its_folder(tmp_path):
    save(RESULT, tmp_path / "new" / FILE)
    assert load(tmp_path / "new" / FILE) == RESULT
    assert load(tmp_path / "new") == RESULT


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), 2, "has the schema 2, and this release of fastdp reads 1"),
        (("schema",), KeyError, "no field `schema`"),
        (("machine", "cpu"), KeyError, "`machine.cpu` is missing"),
        (("machine",), "an M3", "`machine` must be an object, got 'an M3'"),
        (("entries", 0, "samples_per_second", "rounds", 1), "x", r"`entries\[0\].samples_per_second.rounds\[1\]` must"),
        (("entries", 0, "devices"), True, r"`entries\[0\].devices` must be a whole number, got True"),
        (("entries", 0, "efficiency"), "93 %", "must be a number or null, got '93 %'"),
        (("entries",), {}, "`entries` must be a list"),
        (("failed", 0, "reason"), None, r"`failed\[0\].reason` must be text, got None"),
    ],
)
def test_a_result_with_a_wrong_field_is_refused_by_its_name(path, value, said, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(changed(*path, value=value)), "utf-8")
    with pytest.raises(ValueError, match=said) as error:
        load(file)
    assert str(file) in str(error.value)
    assert "fastdp bench MODEL --output FOLDER" in str(error.value)
    with pytest.raises(ValueError, match=r"no result|has the schema"):
        save(changed(*path, value=value), tmp_path / "never.json")
    assert not (tmp_path / "never.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "not JSON", "\xff"])
def test_another_file_is_no_result(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is no result of `fastdp bench`"):
        load(file)


def test_a_file_that_is_not_there_is_said_by_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load(tmp_path / "none.json")


def test_fields_of_newer_releases_are_kept():
    check({**RESULT, "further": 1}, "the result")
