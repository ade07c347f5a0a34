"""What is made of measurements on a card: the goals and the tables of docs/hardware.md.

All of it on records that are made up: every figure here is invented.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import goals as gpu_goals
from bench.gpu import results as gpu_results
from bench.gpu.cases import CASES

MACHINE = {
    "gpus": [{"name": "Made-up GPU"}],
    "driver": {"version": "1.2"},
    "commit": "abc1234",
    "date": "2026-11-25",
    "versions": {"torch": "2.11.0", "numpy": "2.5.2"},
    "pcie_generation": 5,
    "nccl": 22907,
    "hardware": {"cpu": "a processor", "cores": 16},
}


def spread(median):
    return {"min": median, "q1": median, "median": median, "q3": median, "max": median}


def step(case, way, ms, library="fastdp", devices=1, how="graph", rows=None):
    of = CASES[case].rows
    rows = of if rows is None else rows
    line = {"what": "step", "case": case, "way": way, "library": library, "devices": devices, "how": how}
    speed = {"milliseconds": spread(ms), "samples_per_second": 1e3 * rows / ms, "of_torch_eager": None, "rounds": 5}
    return {**line, "rows": rows, "of": of, **speed}


def ready(case, way, held, **more):
    return {"what": "ready", "case": case, "way": way, "memory": {"held_nbytes": held}, **more}


def steps_of(case, eager, keras, jax, ours, *, eight=None, part=None, fed=None, bare=None):
    """Steps of a case in milliseconds; fastdp's are of graphs."""
    rows = CASES[case].rows
    lines = [
        step(case, "torch eager", eager, "torch", how=""),
        step(case, "Keras torch", keras, "keras", how=""),
        step(case, "Keras JAX", jax, "keras", how=""),
        step(case, "fastdp 1 eager", 10 * ours, how="eager"),
        step(case, "fastdp 1 graph", ours),
        step(case, "fastdp 8 graph", eight or 8 * ours, devices=8),
        step(case, "fastdp 1 graph, rows/8", part or ours, rows=rows // 8),
        step(case, "fastdp 1 graph, fed", fed or ours),
        step(case, "fastdp 1 graph, resident", ours),
        step(case, "fastdp 1 graph, bare", bare or ours),
        ready(case, "torch eager", 1_000_000_000, parameters=1000),
        ready(case, "fastdp 1 graph", 1_100_000_000, parameters=1000, capture_seconds=4.0),
    ]
    return lines


def parts_lines(share=0.95, h2d=55.0, replay=9.0, eight=60.0):
    kernels = [
        {"what": kernel, "nbytes": nbytes, "GBps": spread(2000.0), "of_copy": share}
        for kernel in ("copy", *gpu_goals.KERNELS[:-1], "all_reduce two-shot of 2 ranks")
        for nbytes in (1 << 20, 64 << 20)
    ]
    return [
        *kernels,
        {"what": "pinned to card", "nbytes": 256 << 20, "GBps": spread(h2d)},
        {"what": "host time: replay", "nodes": 100, "microseconds": spread(replay)},
        {"what": "host time: a graph for each replica", "replicas": 8, "nodes": 100, "microseconds": spread(eight)},
    ]


def report_of(lines, machine=MACHINE, stage="bench"):
    part = {"status": "passed", "seconds": 1.0, "measurements": lines, "skipped": []}
    return {"machine": machine, "stages": {stage: {"status": "passed", "parts": {"all": part}}}}


GOOD = [
    *parts_lines(),
    *steps_of("mlp", 5.0, 15.0, 2.0, 1.0),
    *steps_of("resnet50-bf16-32", 13.0, 20.0, 10.0, 10.0),
    *steps_of("resnet50-bf16-256", 99.0, 200.0, 100.0, 100.0),
]


def verdicts(lines, machine=MACHINE):
    return {row["goal"]: row["met"] for row in gpu_goals.evaluate(report_of(lines, machine))}


def test_goals_that_are_just_reached_are_met():
    found = verdicts(GOOD)
    measured = {
        goal: met for goal, met in found.items() if not goal.startswith(("xception", "encoder", "resnet50-tf32"))
    }
    assert len(measured) > 25
    assert set(measured.values()) == {True}


WORSE = [
    (parts_lines(share=0.89), "beside the card's copy"),
    (parts_lines(h2d=49.9), "pinned memory to the card"),
    (parts_lines(replay=10.6), "host time of a replay"),
    (parts_lines(eight=81.0), "8 graphs launched by one thread"),
    (steps_of("mlp", 4.9, 99.0, 9.0, 1.0), "mlp: times as fast as torch eager"),
    (steps_of("mlp", 5.0, 14.9, 9.0, 1.0), "mlp: times as fast as Keras torch"),
    (steps_of("mlp", 5.0, 99.0, 1.9, 1.0), "mlp: times as fast as Keras JAX"),
    (steps_of("resnet50-bf16-32", 12.9, 20.0, 10.0, 10.0), "resnet50-bf16-32: times as fast as torch eager"),
    (steps_of("resnet50-bf16-256", 98.9, 200.0, 100.0, 100.0), "resnet50-bf16-256: times as fast as torch eager"),
    (steps_of("mlp", 5.0, 15.0, 2.0, 1.0, fed=1.04), "mlp: what feeding costs a step"),
    (steps_of("mlp", 5.0, 15.0, 2.0, 1.0, bare=0.98), "mlp: one replica over its bare captured step"),
    (steps_of("mlp", 5.0, 15.0, 2.0, 1.0, eight=8.5), "mlp: 8 virtual replicas over the sum of their parts"),
    ([ready("mlp", "fastdp 1 graph", 1_160_000_000, capture_seconds=4.0)], "mlp: memory beside torch eager's"),
    ([ready("mlp", "fastdp 1 graph", 1_100_000_000, capture_seconds=5.1)], "mlp: capture"),
]


@pytest.mark.parametrize(("lines", "goal"), WORSE, ids=[goal for _, goal in WORSE])
def test_a_goal_that_is_just_missed_is_not_met_and_no_other_changes(lines, goal):
    before, after = verdicts(GOOD), verdicts([*GOOD, *lines])
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    for name in changed:
        assert goal in name
        assert after[name] is False


def test_a_goal_without_measurements_is_never_met():
    found = verdicts([])
    assert len(found) > 30
    assert set(found.values()) == {None}
    rows = gpu_goals.evaluate(report_of([]))
    assert {row["measured"] for row in rows} == {"not measured"}
    assert gpu_goals.table(rows).splitlines()[-1] == f"0 met, 0 NOT MET, {len(rows)} not measured"


@pytest.mark.parametrize(
    "lost", ["torch eager", "fastdp 1 graph, resident", "fastdp 8 graph", "fastdp 1 graph, rows/8"]
)
def test_a_goal_that_lacks_one_of_its_measurements_is_not_measured(lost):
    before = verdicts(GOOD)
    after = verdicts([line for line in GOOD if line.get("way") != lost])
    gone = [name for name, met in after.items() if met is None and before[name]]
    assert gone
    assert False not in after.values()


def test_of_a_link_slower_than_pcie_5_nothing_is_asked():
    for generation in (4, None):
        found = verdicts(GOOD, {**MACHINE, "pcie_generation": generation})
        assert found["pinned memory to the card, on PCIe 5"] is None


def test_only_the_last_line_about_a_thing_counts():
    early = step("mlp", "fastdp 1 graph", 50.0)
    assert verdicts([early, *GOOD]) == verdicts(GOOD)
    assert verdicts([*GOOD, early])["mlp: times as fast as torch eager"] is False


def test_small_sizes_are_not_held_to_the_copy():
    small = {"what": "concat_rows", "nbytes": 1 << 20, "GBps": spread(10.0), "of_copy": 0.1}
    assert verdicts([*GOOD, small]) == verdicts(GOOD)


def test_a_report_of_kernels_that_are_gone_is_still_read():
    old = {"what": "fused_adam", "nbytes": 64 << 20, "GBps": spread(10.0), "of_copy": 0.1}
    assert verdicts([*GOOD, old]) == verdicts(GOOD)
    assert "| fused_adam |  |  |  | 10.0 (0.10) |  |  |" in gpu_results.markdown(report_of([old]))


def test_memory_without_the_driver_s_word_is_the_allocator_s_and_fastdp_s_own():
    ours = {
        "memory": {"torch_reserved_peak_nbytes": 50},
        "report": {"devices": [{"nbytes": {"variables": 7, "slots": 3}}]},
    }
    assert gpu_goals.held(ours) == (60, "torch's allocator and fastdp's report")
    assert gpu_goals.held({"memory": {}}) is None


# The tables.


def stage_of_tests(**more):
    part = {"status": "failed", "passed": 5, "failed": 1, "skipped": {"Skipped: no | card": 2}, "seconds": 3.0}
    part |= {"failures": [{"test": "tests/gpu/test_x.py::test_bad", "said": []}], "unfinished": [], **more}
    return {"kernels": {"status": "failed", "parts": {"tests": part}}}


def test_the_tables_have_what_was_measured_and_say_what_was_not():
    report = report_of(GOOD)
    report["stages"] |= stage_of_tests(unfinished=["tests/gpu/test_x.py::test_late"])
    text = gpu_results.markdown(report)
    assert "### 1 x Made-up GPU, 2026-11-25, commit abc1234" in text
    assert "torch 2.11.0" in text
    assert "| kernels/tests | failed | 5 | 1 | 2 | 3.0 |" in text
    assert "Failed: `tests/gpu/test_x.py::test_bad`. Cut off in `tests/gpu/test_x.py::test_late`." in text
    assert "| concat_rows |  | 2000.0 (0.95) |  | 2000.0 (0.95) |  |  |" in text
    assert "| mlp: times as fast as torch eager | >= 5 | 5.00 (fastdp 1 graph) | met |" in text
    assert "| encoder-bf16-32: capture | <= 5 s | not measured | not measured |" in text
    assert "**Steps: MLP 784-512-512-10, batch 128, TF32**" in text
    assert "| fastdp 1 graph | 128 | 1.0 | 1.0 to 1.0 | 128,000.0 |  | 1,100 | 4.0 |" in text
    assert "Xception 299" not in text
    assert "Skipped: no / card" in text  # a bar would end the cell
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_calls_of_one_lease_are_put_together_and_a_stage_that_ran_again_counts_once():
    first, second, third = report_of(GOOD), report_of([], stage="bench-mlp"), report_of(parts_lines(share=0.5))
    third["stages"]["bench-mlp"] = {"status": "skipped", "parts": {}}
    whole = gpu_results.merged([first, second, third])
    assert list(whole["stages"]) == ["bench", "bench-mlp"]
    assert whole["stages"]["bench"] is third["stages"]["bench"]
    assert whole["stages"]["bench-mlp"] is second["stages"]["bench-mlp"]


@pytest.mark.parametrize("key", ["gpus", "driver", "commit", "versions"])
def test_runs_of_different_machines_or_versions_are_not_put_together(key):
    other = copy.deepcopy(report_of(GOOD))
    other["machine"][key] = [{"name": "another"}] if key == "gpus" else {"version": "another"}
    with pytest.raises(ValueError, match="must have the same"):
        gpu_results.merged([report_of(GOOD), other])


def test_tables_replace_what_stands_between_the_marks_and_nothing_else(tmp_path, monkeypatch, capsys):
    page, results = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text(f"before\n{gpu_results.BEGIN}\nold\n{gpu_results.END}\nafter\n")
    results.write_text(json.dumps(report_of(GOOD)))
    monkeypatch.setattr(sys, "argv", ["results.py", str(results), "--into", str(page)])
    for _ in range(2):  # it repeats
        assert gpu_results.main() == 0
    text = page.read_text()
    assert text.startswith(f"before\n{gpu_results.BEGIN}\n\n### 1 x Made-up GPU")
    assert text.endswith(f"\n\n{gpu_results.END}\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="once each"):
        gpu_results.put_into("no marks", "tables")


def test_docs_hardware_has_the_marks():
    text = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert "tables" in gpu_results.put_into(text, "tables")
