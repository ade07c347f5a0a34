"""Turns the JSON files of check.py into the tables of docs/hardware.md, so that no figure is typed by hand.

    python bench/gpu/results.py bench/results/gpu_<card>_*.json                        # prints
    python bench/gpu/results.py bench/results/gpu_<card>_*.json --into docs/hardware.md

Several files form one measurement, ordered by name; if a stage ran more than once, its last run counts. All files
must have the same card, driver, commit and versions. With --into, the text between the two marks of that file is
replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import goals as gpu_goals
from bench.gpu.cases import CASES
from bench.gpu.goals import Found, Line, held

BEGIN = "<!-- results of make gpu-check: written by bench/gpu/results.py -->"
END = "<!-- end of results -->"
SIZES = {64 << 10: "64 KiB", 1 << 20: "1 MiB", 16 << 20: "16 MiB", 64 << 20: "64 MiB", 256 << 20: "256 MiB",
         1 << 30: "1 GiB"}  # fmt: skip


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge several runs into one report, with the last run of each stage that was not skipped.

    Raises:
        ValueError: the runs differ in card, driver, commit or versions.
    """
    first, stages = reports[0], dict[str, Any]()
    for report in reports:
        for what, ours, theirs in zip(_IDENTITY, _identity(first), _identity(report), strict=True):
            if ours != theirs:
                raise ValueError(f"the files must have the same {what}. Received: {ours} and {theirs}")
        for name, stage in report["stages"].items():
            if name not in stages or stage["status"] != "skipped":
                stages[name] = stage
    return {"machine": first["machine"], "stages": stages}


_IDENTITY = ("cards", "driver", "commit", "versions")


def _identity(report: Mapping[str, Any]) -> tuple[Any, ...]:
    """The properties that all merged runs must share, in the order of _IDENTITY."""
    machine = report["machine"]
    cards = [card["name"] for card in machine.get("gpus") or []]
    return cards, machine.get("driver"), machine.get("commit"), machine.get("versions")


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of a report."""
    found = Found(gpu_goals.measurements(report), report["machine"])
    parts = [
        _machine(report["machine"]),
        _section("Checks", ("stage", "result", "passed", "failed", "skipped", "seconds"), _checks(report)),
        _failures(report),
        _section("Goals", ("goal", "needed", "measured", ""), _goals(report)),
        _section(
            "Kernels on one card: GB/s read and written, and of the card's copy",
            ("kernel", *SIZES.values()),
            _by_size(found, "of_copy", ""),
        ),
        _section("Transfers: GB/s", ("copy", *SIZES.values()), _by_size(found, "", "transfers")),
        _section("Host time", ("what", "nodes", "microseconds"), _host(found)),
        *_steps(found),
        _section("Left out or failed", ("what", "reason"), _left_out(report)),
    ]
    return "\n\n".join(part for part in parts if part)


def _machine(machine: Mapping[str, Any]) -> str:
    """The heading with machine and versions."""
    cards = machine.get("gpus") or []
    named = f"{len(cards)} x {cards[0]['name']}" if cards else f"no GPU ({machine.get('reason', '')})"
    driver = (machine.get("driver") or {}).get("version", "unknown")
    versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    return (
        f"### {named}, {machine.get('date', 'no date')}, commit {machine.get('commit', 'unknown')}\n\n"
        f"Driver {driver}, NCCL {machine.get('nccl')}, PCIe generation {machine.get('pcie_generation')}; {versions}. "
        f"{machine.get('hardware', {}).get('cpu', '')}, {machine.get('hardware', {}).get('cores', '?')} cores."
    )


def _section(title: str, header: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    """A title and a table; empty if there are no rows."""
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return ""
    lines = [list(header), ["---"] * len(header), *cells]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _checks(report: Mapping[str, Any]) -> Iterator[Sequence[object]]:
    """One row per part of each stage."""
    for stage, found in report["stages"].items():
        for name, part in found["parts"].items():
            tests = "passed" in part
            skipped = sum(part["skipped"].values()) if tests else len(part.get("skipped", ()))
            passed = part["passed"] if tests else f"{len(part.get('measurements', ()))} measured"
            yield f"{stage}/{name}", part["status"], passed, part.get("failed", ""), skipped, part.get("seconds", "")


def _failures(report: Mapping[str, Any]) -> str:
    """The names of the failed tests, and of the tests during which a part was cut off."""
    parts = [part for stage in report["stages"].values() for part in stage["parts"].values()]
    names = [f"`{one['test']}`" for part in parts for one in part.get("failures", ())]
    cut = [f"`{part['unfinished'][-1]}`" for part in parts if part.get("unfinished")]
    said = [f"Failed: {', '.join(names)}."] if names else []
    return " ".join([*said, *([f"Cut off in {', '.join(cut)}."] if cut else [])])


def _goals(report: Mapping[str, Any]) -> Iterator[Sequence[object]]:
    """The goals, evaluated again because no single file has all measurements."""
    for row in gpu_goals.evaluate(report):
        yield row["goal"], row["needed"], row["measured"], gpu_goals.words(row["met"])


def _by_size(found: Found, share: str, kind: str) -> Iterator[Sequence[object]]:
    """One row per kernel or transfer, one column per size."""
    rows: dict[str, dict[int, str]] = {}
    for line in found.lines:
        if "GBps" not in line or "nbytes" not in line or (("of_copy" in line) == (kind == "transfers")):
            continue
        said = f"{line['GBps']['median']:.1f}" + (f" ({line[share]:.2f})" if share else "")
        rows.setdefault(line["what"], {})[line["nbytes"]] = said
    for what, sizes in rows.items():
        yield what, *(sizes.get(size, "") for size in SIZES)


def _host(found: Found) -> Iterator[Sequence[object]]:
    """The host time of launches."""
    for line in found.named("host time"):
        replicas = f", {line['replicas']} replicas" if "replicas" in line else ""
        yield line["what"].removeprefix("host time: ") + replicas, line.get("nodes", ""), line["microseconds"]["median"]
    for line in found.named("all_reduce of"):
        yield f"{line['what']}, {line['nbytes']:,} bytes, {'+'.join(line['way'])}", "", line["microseconds"]["median"]


def _steps(found: Found) -> Iterator[str]:
    """One table per case."""
    for name, case in CASES.items():
        steps = found.named("step", case=name)
        header = ("way", "rows", "ms", "quartiles", "samples/s", "time of torch eager's", "memory, MB", "captured in s")
        yield _section(f"Steps: {case.title}", header, (_step(found, name, line) for line in steps))


def _step(found: Found, case: str, line: Line) -> Sequence[object]:
    """The row of one way."""
    ready, ms = found.ready(case, line["way"]), line["milliseconds"]
    memory = held(ready)
    return (
        line["way"],
        line["rows"],
        ms["median"],
        f"{ms['q1']} to {ms['q3']}",
        f"{line['samples_per_second']:,}",
        line["of_torch_eager"] or "",
        f"{memory[0] / 1e6:,.0f}" if memory else "",
        ready.get("capture_seconds") or "",
    )


def _left_out(report: Mapping[str, Any]) -> Iterator[Sequence[object]]:
    """Measurements that are missing and tests that were skipped, with the reasons."""
    for stage, found in report["stages"].items():
        for name, part in found["parts"].items():
            if part.get("reason"):
                yield f"{stage}/{name}", part["reason"]
            if "passed" in part:
                for reason, count in part["skipped"].items():
                    yield f"{stage}/{name}: {count} tests", reason[:200]
            else:
                for line in part.get("skipped", ()):
                    yield f"{stage}/{name}: {line['skipped']}", line["reason"][:200]


def put_into(text: str, tables: str) -> str:
    """Put the tables between the marks of the text.

    Raises:
        ValueError: the text does not have both marks once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file must have the lines {BEGIN} and {END} once each, in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{tables}\n\n{text[text.index(END) :]}"


def main() -> int:
    """Print the tables, or put them into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON files of make gpu-check")
    parser.add_argument("--into", type=Path, help="a Markdown file with the two marks")
    asked = parser.parse_args()
    tables = markdown(merged([json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.files)]))
    if asked.into is None:
        print(tables)
    else:
        asked.into.write_text(put_into(asked.into.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
