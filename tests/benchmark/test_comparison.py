"""Comparisons: ratios with their intervals, what differs, and what may be said."""

from __future__ import annotations

import json

import benchmark_results
import numpy as np
import pytest

from fastdp.benchmark.comparison import compare, ratio_of
from fastdp.benchmark.figures import Spread
from fastdp.benchmark.result import save
from fastdp.cli import bench_report, main
from fastdp.cli.status import WrongUseError


def spread(rounds):
    q1, median, q3 = np.quantile(rounds, [0.25, 0.5, 0.75])
    return Spread(float(median), float(q1), float(q3), tuple(map(float, rounds)))


def faster(result, factor):
    """The same result with each throughput times a factor."""
    for one in result["entries"]:
        found = one["samples_per_second"]
        one["samples_per_second"] = {
            key: [factor * each for each in value] if key == "rounds" else factor * value
            for key, value in found.items()
        }
    return result


def test_a_clear_difference_is_told_with_its_ratio():
    found = ratio_of(spread([100, 101, 99, 100, 102, 98]), spread([120, 121, 119, 120, 122, 118]))
    assert found.ratio == pytest.approx(1.2)
    assert 1.15 < found.low < 1.2 < found.high < 1.25
    assert found.verdict == "20.0% faster"
    assert ratio_of(spread([120.0] * 6), spread([100.0] * 6)).verdict == "16.7% slower"


def test_overlapping_rounds_are_no_difference():
    found = ratio_of(spread([90, 100, 110, 95, 105]), spread([92, 103, 112, 97, 108]))
    assert found.low < 1 < found.high
    assert found.verdict == "no difference beyond the noise"


def test_a_difference_within_the_noise_of_the_machine_is_none():
    first, second = spread([100, 100.1, 99.9, 100, 100.2]), spread([103, 103.1, 102.9, 103, 103.2])
    assert ratio_of(first, second, noise=0.0).verdict == "3.0% faster"
    assert ratio_of(first, second, noise=0.05).verdict == "no difference beyond the noise"


def test_few_rounds_have_the_interval_of_their_extremes():
    found = ratio_of(spread([100, 110]), spread([120, 150]))
    assert (found.low, found.high) == pytest.approx((120 / 110, 150 / 100))


def test_one_round_says_that_nothing_is_known():
    found = ratio_of(spread([100]), spread([200]))
    assert found.ratio == 2
    assert found.low is None
    assert found.verdict == "one round: the noise is not known"


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    random = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        first, second = random.normal(100, 3, 9), random.normal(110, 3, 9)
        found = ratio_of(spread(first), spread(second))
        held += found.low <= 1.1 <= found.high
    assert held >= 88


def test_the_same_files_give_the_same_words():
    results = [benchmark_results.result(), faster(benchmark_results.result(), 1.1)]
    assert compare(results, ["a", "b"]) == compare(results, ["a", "b"])


def test_ways_are_compared_with_themselves():
    found = compare([benchmark_results.result(), faster(benchmark_results.result(), 1.2)], ["a", "b"])
    assert [row.name for row in found.rows] == [one["name"] for one in benchmark_results.result()["entries"]]
    assert [row.ratios[1].verdict for row in found.rows] == ["20.0% faster"] * 7
    assert all(row.ratios[0] is None for row in found.rows)
    assert found.differences == ()


def test_ways_of_one_result_alone_are_there_without_a_ratio():
    other = benchmark_results.result([benchmark_results.entry("fastdp", 8)])
    found = compare([benchmark_results.result(), other], ["a", "b"])
    assert found.rows[-1].name == "fastdp, 8 devices, compiled"
    assert found.rows[-1].rates[0] is None
    assert [row.ratios[1] for row in found.rows] == [None] * 8


def test_entries_that_differ_in_their_batch_alone_are_kept_apart():
    entries = [benchmark_results.entry(rate=rate) | {"batch": batch} for rate, batch in ((100.0, 8), (200.0, 16))]
    first, second = benchmark_results.result(entries), benchmark_results.result(entries[::-1])
    found = compare([first, second], ["a", "b"])
    assert [row.ratios[1].ratio for row in found.rows] == [1, 1]


def test_what_differs_is_named_with_both_values():
    after = benchmark_results.result()
    after["fastdp"], after["versions"]["jax"] = "0.10.0", "0.9"
    after["machine"]["gpus"] = [{"name": "H100", "memory_nbytes": None, "compute_capability": None}] * 2
    after["machine"]["memory_nbytes"] = 32_000_000_000
    after["settings"]["batch"] = 512
    found = {one.what: one.values for one in compare([benchmark_results.result(), after], ["a", "b"]).differences}
    assert found == {
        "fastdp": ("0.9.0", "0.10.0"),
        "memory": ("16.7 GB", "32.0 GB"),
        "GPUs": ("none", "2 x H100"),
        "batch": ("256", "512"),
        "jax": ("-", "0.9"),
    }


def test_noise_and_slower_processors_are_cautions():
    after = benchmark_results.result()
    after["noise"] = {
        "idle_loop": {"median_seconds": 0.0151, "q1": 0.015, "q3": 0.016},
        "relative_spread": 0.07,
        "verdict": "noisy: the same work takes longer at some times",
    }
    noisy, slower = compare([benchmark_results.result(), after], ["a", "b"]).cautions
    assert "in 1 result (number 2)" in noisy
    assert "50% longer" in slower
    assert compare([benchmark_results.result()] * 2, ["a", "b"]).cautions == ()


def test_equal_names_are_told_apart():
    assert compare([benchmark_results.result()] * 2, ["result.json"] * 2).names == (
        "result.json (1)",
        "result.json (2)",
    )


@pytest.mark.parametrize(("count", "names", "said"), [(1, ["a"], "at least two"), (2, ["a"], "one for each of 2")])
def test_wrong_arguments_are_errors(count, names, said):
    with pytest.raises(ValueError, match=said):
        compare([benchmark_results.result()] * count, names)


@pytest.mark.parametrize("other", [benchmark_results.without_figures, benchmark_results.hostile])
def test_any_result_is_compared(other):
    found = compare([benchmark_results.result(), other(), benchmark_results.many()], ["a", "b", "c"])
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.fixture
def files(tmp_path):
    """Two results on disk."""
    save(benchmark_results.result(), tmp_path / "a.json")
    save(faster(benchmark_results.result(), 1.2), tmp_path / "b" / "result.json")
    return [str(tmp_path / "a.json"), str(tmp_path / "b")]


def test_the_command_prints_and_writes_the_comparison(files, tmp_path, capsys):
    assert bench_report.run(files, as_json=False, output=tmp_path / "out") == 0
    assert "20.0% faster" in " ".join(capsys.readouterr().out.split())
    assert "<h1>Comparison" in (tmp_path / "out" / "comparison.html").read_text("utf-8")
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))["rows"]) == 7


def test_json_is_all_that_stdout_gets(files, capsys):
    assert main(["bench", "report", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["ratios"][1]["verdict"] == "20.0% faster"


def test_the_page_of_one_result_is_made_again(files, tmp_path, capsys):
    assert bench_report.run(files[1:], as_json=False, output=tmp_path / "out") == 0
    assert "<h1>MLP of 3 layers" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_the_command_ends_with_the_status_of_wrong_use(files, capsys):
    assert main(["bench", "report", files[0], "nothing.json"]) == 2
    assert capsys.readouterr().err == "fastdp bench: cannot read nothing.json: No such file or directory\n"


def test_a_missing_file_and_too_few_are_errors_with_a_remedy(files, tmp_path):
    with pytest.raises(WrongUseError, match=r"none\.json: No such file"):
        bench_report.run([str(tmp_path / "none.json"), files[0]], as_json=False, output=None)
    with pytest.raises(WrongUseError, match=r"fastdp bench report A\.json B\.json"):
        bench_report.run(files[:1], as_json=False, output=None)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(WrongUseError, match=r"other\.json is no result of `fastdp bench`"):
        bench_report.run([str(tmp_path / "other.json")] * 2, as_json=False, output=None)
