"""Profiles of one device: from results of `fastdp bench`, from those of `make gpu-check`, and from given figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fastdp.benchmark.plan.profile import from_files, from_points


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "q1": value, "q3": value, "rounds": [value]}


def entry(batch: int, seconds: float, **more: Any) -> dict[str, Any]:
    fields = {"name": "fastdp, 1 device", "library": "fastdp", "devices": 1, "kind": "gpu", "mode": "graph"}
    rates = {"samples_per_second": spread(batch / seconds), "step_seconds": spread(seconds)}
    unknown = dict.fromkeys(("efficiency", "first_step_seconds", "capture_seconds", "compile_seconds", "utilization"))
    unknown |= dict.fromkeys(("between_seconds", "overhead_seconds", "peak_host_nbytes", "joules_per_sample", "trace"))
    text = {"how": "", "why": "", "verbs": [], "buckets": [1000, 3000], "warm_up": {"steps": 1, "seconds": 1.0}}
    return {**fields, **rates, **unknown, **text, "batch": batch, **more}


def result(entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    gpu = {"name": "Made-up GPU", "memory_nbytes": 1, "compute_capability": [9, 0]}
    machine = {"cpu": "a cpu", "cores": 2, "memory_nbytes": 1, "system": "Linux", "gpus": [gpu], "driver": None}
    target = {
        "name": "m",
        "title": "M",
        "framework": "torch",
        "parameters": 1000,
        "inputs": [],
        "loss": "",
        "optimizer": "",
    }
    settings = {"batch": 64, "precision": "bf16", "data": "synthetic", "steps": 1, "seconds": 1, "rounds": 1, "seed": 0}
    noise = {"idle_loop": {"median_seconds": 1, "q1": 1, "q3": 1}, "relative_spread": 0.1, "verdict": "quiet"}
    facts = {"schema": 1, "fastdp": "0", "date": "", "command": [], "versions": {}, "failed": [], "batches": None}
    return {
        **facts,
        "machine": machine,
        "noise": noise,
        "target": target,
        "settings": settings,
        "entries": entries,
        **more,
    }


@pytest.fixture
def file_of(tmp_path):
    def write(report: Any, name: str = "result.json") -> Any:
        (tmp_path / name).write_text(report if isinstance(report, str) else json.dumps(report))
        return tmp_path / name

    return write


def test_a_result_gives_the_fastest_way_of_one_device_on_all_its_batches(file_of):
    eager = entry(64, 0.070, mode="eager", name="fastdp, 1 device, eager")
    others = [entry(64, 0.001, library="torch"), entry(128, 0.030, devices=2)]
    path = file_of(result([entry(64, 0.050), entry(32, 0.028), eager, *others]))
    (profile,) = from_files([path])
    assert profile.work.compute.points == {32: 0.028, 64: 0.050}
    assert (profile.name, profile.rows, profile.parameters) == ("m", 64, 1000)
    assert profile.work.buckets == [1000, 3000]
    assert any("Made-up GPU" in note for note in profile.basis)
    assert any("bf16" in note for note in profile.basis)


def test_batches_that_were_tried_on_one_device_count(file_of):
    tried = {"tried": [{"batch": 16, "samples_per_second": 1000.0}, {"batch": 999, "reason": "no memory"}]}
    (alone,) = from_files([file_of(result([entry(64, 0.050)], batches=tried))])
    assert alone.work.compute.points == {16: 0.016, 64: 0.050}
    (several,) = from_files([file_of(result([entry(64, 0.050), entry(64, 0.03, devices=2)], batches=tried))])
    assert several.work.compute.points == {64: 0.050}


def test_without_a_gpu_the_note_says_what_was_measured(file_of):
    (profile,) = from_files([file_of(result([entry(64, 0.05, kind="virtual")]))])
    assert any("as fast as a virtual device of a cpu" in note for note in profile.basis)


def test_gradients_of_half_the_bytes_halve_the_buckets(file_of):
    (profile,) = from_files([file_of(result([entry(64, 0.05)]))], gradients="bf16")
    assert profile.work.buckets == [500, 1500]
    assert from_points("m", {8: 0.1}, 1000, gradients="bf16").work.buckets == [2000]


def test_a_share_and_a_host_time_of_one_s_own_replace_what_is_unknown():
    profile = from_points("m", {8: 0.1}, 1000)
    assert any("host's time" in note for note in profile.basis)
    given = profile.with_share(0.5, 0.002)
    assert (given.work.backward_share, given.work.host) == (0.5, 0.002)
    assert not any("host's time" in note for note in given.basis)
    assert profile.with_share(0.5, 0.0).work.host == 0.0


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("not json", "it is not JSON"),
        ("[]", "result"),
        ({"schema": 2}, "schema"),
        (result([]), "holds no step of one device"),
        (result([entry(64, 0.05, devices=2)]), "holds no step of one device"),
        ("[" * 100_000, "it is not JSON"),
        ({"stages": 3}, "must be whole results of `make gpu-check`"),
        ({"stages": {}, "machine": {}}, "no steps of fastdp on one device"),
    ],
)
def test_a_file_that_is_none_is_named(file_of, report, said):
    path = file_of(report)
    with pytest.raises(ValueError, match=said) as error:
        from_files([path])
    assert path.name in str(error.value)


def test_a_result_without_a_number_of_parameters_says_so(file_of):
    report = result([entry(64, 0.05)])
    report["target"]["parameters"] = None
    with pytest.raises(ValueError, match="holds no number of parameters"):
        from_files([file_of(report)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batches", {"tried": [{"batch": "x", "samples_per_second": 1.0}]}),
        ("batches", {"tried": 3}),
        ("entries", [entry(64, float("nan"))]),
        ("entries", [entry(64, -1.0)]),
        ("entries", [entry(0, 1.0)]),
        ("entries", [entry(64, 0.05, buckets=[float("inf")])]),
    ],
)
def test_a_result_whose_fields_hold_what_cannot_be_is_an_error_that_says_so(file_of, field, value):
    report = result([entry(64, 0.05)])
    report[field] = value
    with pytest.raises(ValueError, match=r"result\.json is no whole result of `fastdp bench`"):
        from_files([file_of(report)])


@pytest.mark.parametrize("parameters", [-1, 10**14])
def test_a_number_of_parameters_that_no_model_has_is_refused(parameters):
    with pytest.raises(ValueError, match="`parameters` must be from 1 to"):
        from_points("m", {8: 0.1}, parameters)


def test_a_result_may_come_by_a_pipe(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(result([entry(64, 0.05)]))))
    (profile,) = from_files([Path("-")])
    assert profile.work.compute.points == {64: 0.05}


def test_a_model_that_the_files_do_not_hold_is_named(file_of):
    path = file_of(result([entry(64, 0.05)]))
    with pytest.raises(ValueError, match="is a result of 'm', not of 'other'"):
        from_files([path], "other")
    with pytest.raises(FileNotFoundError):
        from_files([path.with_name("none.json")])


# Files of make gpu-check.


def step(case: str, way: str, ms: float, rows: int, **more: Any) -> dict[str, Any]:
    line = {"what": "step", "case": case, "way": way, "library": "fastdp", "devices": 1, "how": "graph", "rows": rows}
    return {**line, "milliseconds": spread(ms), **more}


def gpu_check(lines: list[dict[str, Any]], **machine: Any) -> dict[str, Any]:
    part = {"status": "passed", "measurements": lines}
    known = {"gpus": [{"name": "Made-up GPU"}], "driver": {"version": "1"}, "commit": "a", "versions": {}}
    return {"machine": {**known, **machine}, "stages": {"bench": {"status": "passed", "parts": {"all": part}}}}


def lines_of(case: str = "mlp", parameters: int | None = 250) -> list[dict[str, Any]]:
    lines = [step(case, "fastdp 1 graph", 4.0, 128), step(case, "fastdp 8 graph", 99.0, 128, devices=8)]
    lines += [step(case, f"fastdp 1 graph, rows/{n}", ms, 128 // n) for n, ms in ((2, 3.0), (4, 2.0), (8, 1.5))]
    lines += [step(case, "fastdp 1 graph, 1 row", 1.0, 1), step(case, "fastdp 1 eager", 77.0, 128, how="eager")]
    lines += [step(case, f"fastdp 1 graph, {how}", 66.0, 128) for how in ("fed", "resident", "bare")]
    ready = {"what": "ready", "case": case, "way": "fastdp 1 graph", "parameters": parameters}
    return [*lines, *([ready] if parameters is not None else [])]


def test_a_gpu_check_gives_the_steps_of_one_device_and_the_host_s_time(file_of):
    path = file_of(gpu_check([*lines_of(), *lines_of("encoder", None)]))
    (profile,) = from_files([path])  # the encoder lacks its parameters
    assert profile.name == "mlp"
    assert profile.work.compute.points == {16: 0.0015, 32: 0.002, 64: 0.003, 128: 0.004}
    assert (profile.work.host, profile.parameters, profile.rows) == (0.001, 250, 128)


def test_several_files_of_one_check_are_read_together_and_the_last_counts(file_of):
    lines = lines_of()
    first = file_of(gpu_check(lines[:3]), "a.json")
    second = file_of(gpu_check([*lines[3:], step("mlp", "fastdp 1 graph", 5.0, 128)]), "b.json")
    (profile,) = from_files([second, first], "mlp")
    assert profile.work.compute.points == {16: 0.0015, 32: 0.002, 64: 0.003, 128: 0.005}
    other = file_of(gpu_check(lines, commit="b"), "c.json")
    with pytest.raises(ValueError, match="must have the same commit"):
        from_files([first, other])


def test_a_case_that_was_not_measured_is_named_with_those_that_were(file_of):
    path = file_of(gpu_check([*lines_of(), *lines_of("encoder")]))
    assert [one.name for one in from_files([path])] == ["mlp", "encoder"]
    with pytest.raises(ValueError, match=r"no case 'resnet'.*mlp, encoder"):
        from_files([path], "resnet")
