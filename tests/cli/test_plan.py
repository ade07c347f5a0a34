"""`fastdp plan`: what a newcomer types, what a script reads, and that each line says that it is a model."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp.benchmark.plan.boxes import BOXES
from fastdp.cli import main

GIVEN = ["plan", "resnet50", "--batch", "256", "--step-ms", "250", "--box", "dgx-a100"]


def test_the_plan_is_a_table_of_60_columns_whose_lines_say_that_it_is_modelled(capsys):
    assert main(GIVEN) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [line for line in said if line.startswith("modelled ")]
    assert [line.split()[1] for line in rows] == ["1", "2", "4", "8"] * 2
    assert max(map(len, rows)) <= 60
    assert all(line.startswith(("modelled", "     ")) or not line for line in said)
    assert rows[3].split()[2:4] == ["2048", "254.79"]


def test_json_is_one_object_whose_rows_say_that_they_are_modelled(capsys):
    assert main([*GIVEN, "--json", "--gpus", "8,1,8"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["what"] == "modelled, not measured"
    assert {row["what"] for sharing in ("weak", "strong") for row in found[sharing]} == {found["what"]}
    assert [row["gpus"] for row in found["weak"]] == [1, 8]
    assert found["weak"][1]["efficiency"] == pytest.approx(0.98, abs=0.005)
    assert found["strong"][1]["rows"] == 256
    assert sum(found["buckets"]) == 4 * found["parameters"]
    assert "nccl-tests issue 149" in found["box"]["source"]
    assert any("assumed to take proportionally less" in note for note in found["assumptions"])


@pytest.mark.parametrize("box", BOXES)
def test_two_batches_are_fitted_on_every_box(box, capsys):
    assert (
        main(["plan", "--parameters", "25.6e6", "--batch", "64", "32", "--step-ms", "50", "28", "--box", box, "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    eight = found["strong"][-1]
    assert eight["step_seconds"] > 0.006 + 8 * 0.022 / 32  # the fixed part does not shrink
    assert not any("assumed to take proportionally" in note for note in found["assumptions"])


def test_a_box_of_one_s_own_and_gradients_in_bf16(capsys):
    own = ["plan", "vit-b16", "--step-ms", "90", "--bus-gbps", "20", "--latency-us", "50", "--json"]
    seconds = []
    for more in ([], ["--gradients", "bf16"]):
        assert main([*own, *more]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["weak"][-1]["all_reduce_seconds"])
    assert seconds[0] / seconds[1] == pytest.approx(2, rel=0.05)


def test_alone_it_prints_its_help(capsys):
    assert main(["plan"]) == 0
    assert "fastdp plan --profile RESULT.json --box dgx-h100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["resnet50"], "argument --box: name one of dgx-a100"),
        (["resnet50", "--box", "pcie4"], "argument --step-ms: expected"),
        (["x", "--step-ms", "5", "--box", "pcie4"], "argument --parameters: expected"),
        (["x", "--step-ms", "5", "--parameters", "1e6", "--box", "pcie4"], "argument --batch: expected"),
        (["resnet50", "--step-ms", "5", "6", "--box", "pcie4"], "argument --step-ms: expected one for each"),
        (["resnet50", "--step-ms", "5", "6", "--batch", "8", "8", "--box", "pcie4"], "different batches"),
        (["resnet50", "--step-ms", "5", "--bus-gbps", "3"], "argument --box"),
        (["resnet50", "--step-ms", "5", "--box", "pcie4", "--latency-us", "3"], "argument --box: leave it out"),
        (["--profile", "none.json", "--box", "pcie4"], "argument --profile: .*none.json"),
        (["--profile", "none.json", "--box", "pcie4", "--batch", "3"], "argument --batch: leave it out"),
    ],
)
def test_what_does_not_make_a_model_is_named(line, said, capsys):
    assert main(["plan", *line]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastdp plan: ")
    assert err.count("\n") == 1
    assert re.search(said, err)


NUMBERS = st.sampled_from(["0", "-1", "1e-300", "1e300", "inf", "nan", "25.6e6", "1e-6", "1e9", "1e12", "x", ""])
FITTING = {
    "--step-ms": "50",
    "--batch": "64",
    "--parameters": "1e6",
    "--bus-gbps": "20",
    "--latency-us": "9",
    "--gpus": "1,8",
    "--jitter": "1",
    "--backward-share": "60",
    "--host-ms": "1",
}


@given(st.dictionaries(st.sampled_from([*FITTING]), NUMBERS, max_size=3))
def test_any_numbers_make_a_plan_or_a_usage_error(wrong):
    """No overflow, no division by zero, no JSON that is none."""
    line = ["plan", "m", "--json", *(word for pair in {**FITTING, **wrong}.items() for word in pair)]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("sys.stdout.write", lambda text: printed.append(text) or len(text))
        patch.setattr("sys.stderr.write", len)
        try:
            code = main(line)
        except SystemExit as end:
            code = end.code
    assert code == 0 or (code == 2 and wrong)
    if code == 0:
        rows = json.loads("".join(printed))["weak"]
        assert all(row["step_seconds"] is not None and row["step_seconds"] > 0 for row in rows)


def test_marks_of_what_holds_steps_up_are_explained_where_they_stand(capsys):
    assert main(["plan", "resnet50", "--step-ms", "30", "--box", "pcie4", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^modelled +8 .*a$", said, re.MULTILINE)
    assert "modelled: a: a tenth of the step or more is waiting for the all-reduce." in said
    assert "modelled: h:" not in said
    assert main([*GIVEN, "--host-ms", "100"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^modelled +8 .*h$", said, re.MULTILINE)
    assert "modelled: h: the host" in said
