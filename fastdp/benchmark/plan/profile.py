"""What one device does with a model: from files of `fastdp bench` and `make gpu-check`, or from given figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdp.benchmark.plan.compute import Compute
from fastdp.benchmark.plan.model import Work, bucket_sizes
from fastdp.benchmark.result import FILE, check

GRADIENT_NBYTES = {"fp32": 4, "bf16": 2}
MOST_FILE_NBYTES = 256 << 20
MOST_PARAMETERS = 10**13


@dataclass(frozen=True)
class Profile:
    """One model on one device.

    Attributes:
        name: of the model or the case.
        rows: the batch of one device that is planned with: the largest that was measured.
        work: what a step computes and reduces.
        parameters: number of trainable parameters.
        gradients: the dtype in which gradients are reduced, "fp32" or "bf16".
        basis: sentences about where the figures come from, and what is assumed.
    """

    name: str
    rows: int
    work: Work
    parameters: int
    gradients: str
    basis: tuple[str, ...]

    def with_share(self, backward: float, host: float) -> Profile:
        """The profile with another fraction of backward, and another time of the host if that is above 0."""
        work = replace(self.work, backward_share=backward, host=host or self.work.host)
        unknown = "the host's time to issue a step is not known"
        basis = tuple(one for one in self.basis if not (host and one.startswith(unknown)))
        return replace(self, work=work, basis=basis)


def from_points(
    name: str,
    points: Mapping[int, float],
    parameters: int,
    *,
    gradients: str = "fp32",
    host: float = 0.0,
    buckets: Sequence[int] = (),
    source: str = "given figures",
) -> Profile:
    """A profile from seconds of a step by rows.

    Args:
        name: of the model.
        points: seconds of a step of one device by rows.
        parameters: number of trainable parameters.
        gradients: "fp32" or "bf16".
        host: seconds that the host needs to issue one replica's step; 0 if unknown.
        buckets: bytes of each bucket of fp32 gradients; empty: split by size alone.
        source: where the figures come from.

    Raises:
        ValueError: no step, one that is not above zero, or a number of parameters that no model has.
    """
    if not 0 < parameters <= MOST_PARAMETERS:
        raise ValueError(f"`parameters` must be from 1 to {MOST_PARAMETERS:.0e}. Received: {parameters}")
    compute, nbytes = Compute(points), GRADIENT_NBYTES[gradients]
    sizes = [one * nbytes // 4 for one in buckets] or bucket_sizes(parameters * nbytes)
    basis = [
        f"{source}: {compute.basis}",
        f"{parameters:,} parameters, gradients in {gradients}: {sum(sizes) / 1e6:.1f} MB in {len(sizes)} buckets"
        + ("" if buckets else ", as if parameters could be split anywhere"),
    ]
    if not host:
        basis.append("the host's time to issue a step is not known and taken to be hidden")
    return Profile(name, max(points), Work(compute, sizes, host), parameters, gradients, tuple(basis))


def from_files(paths: Sequence[Path], name: str | None = None, gradients: str = "fp32") -> list[Profile]:
    """The profiles in result files of `fastdp bench` (one each), or in those of one `make gpu-check`.

    Args:
        paths: JSON files; of a folder, the result inside; "-" is the standard input.
        name: the model or case to read; None: all of them.
        gradients: "fp32" or "bf16".

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no such result, or holds no step of one device; the message names file and remedy.
    """
    found: list[Profile] = []
    of_gpu_check: list[tuple[Path, Mapping[str, Any]]] = []
    for path in paths:
        report = _read(path)
        if "stages" in report:
            of_gpu_check.append((path, report))
            continue
        try:
            profile = _from_bench(path, report, gradients)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
            if str(path) in str(error):  # it is told already what is wrong with the file
                raise
            raise ValueError(
                f"{path} is no whole result of `fastdp bench` ({type(error).__name__}: {error})"
            ) from error
        if name not in (None, profile.name):
            raise ValueError(f"{path} is a result of {profile.name!r}, not of {name!r}")
        found.append(profile)
    if of_gpu_check:
        found += _from_gpu_check(of_gpu_check, name, gradients)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    """The report in a file, in the folder of a result, or ("-") in the standard input."""
    remedy = "Make one with: fastdp bench MODEL --gpus 1 --output FOLDER"
    path = path / FILE if path.is_dir() else path
    try:
        text = sys.stdin.read(MOST_FILE_NBYTES + 1) if str(path) == "-" else _text(path)
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no result: it is not JSON ({error}). {remedy}") from error
    if isinstance(report, dict) and "stages" in report:
        return report
    try:
        check(report, str(path))
    except ValueError as error:
        raise ValueError(f"{error}. {remedy}") from None
    return dict(report)


def _text(path: Path) -> str:
    """The text of a file, if it is not larger than any result is."""
    with path.open(encoding="utf-8") as file:  # a pipe has no size to ask for
        text = file.read(MOST_FILE_NBYTES + 1)
    if len(text) > MOST_FILE_NBYTES:
        raise ValueError(f"it is larger than {MOST_FILE_NBYTES >> 20} MiB")
    return text


def _from_bench(path: Path, report: Mapping[str, Any], gradients: str) -> Profile:
    """The profile in a result of `fastdp bench`: its fastest way on one device, on all batches that it ran with."""
    ones = [entry for entry in report["entries"] if entry["devices"] == 1]
    ours = [entry for entry in ones if entry["library"] == "fastdp"] or ones
    target = report["target"]
    if not ours or not target["parameters"]:
        lacks = "step of one device" if not ours else "number of parameters"
        raise ValueError(f"{path} holds no {lacks}: measure one with fastdp bench {target['name']} --gpus 1")
    rows = max(entry["batch"] for entry in ours)
    best = min((one for one in ours if one["batch"] == rows), key=lambda one: float(one["step_seconds"]["median"]))
    way = (best["library"], best["mode"], best["kind"])
    points = {
        int(one["batch"]): float(one["step_seconds"]["median"])
        for one in ours
        if (one["library"], one["mode"], one["kind"]) == way
    }
    if len(ones) == len(report["entries"]):  # else the batches were tried on several devices
        tried = (report["batches"] or {}).get("tried", [])
        points = {
            int(t["batch"]): t["batch"] / t["samples_per_second"] for t in tried if t.get("samples_per_second")
        } | points
    gpus = report["machine"]["gpus"]
    on = gpus[0]["name"] if gpus and best["kind"] == "gpu" else f"a {best['kind']} device of {report['machine']['cpu']}"
    profile = from_points(
        target["name"],
        points,
        int(target["parameters"]),
        gradients=gradients,
        buckets=[int(one) for one in best["buckets"]],
        source=f"{path.name}, {best['name']}, {report['settings']['precision']}",
    )
    note = f"the GPUs of the box are taken to be as fast as {on}, which was measured"
    return replace(profile, basis=(*profile.basis, note))


def _from_gpu_check(
    reports: Sequence[tuple[Path, Mapping[str, Any]]], name: str | None, gradients: str
) -> list[Profile]:
    """The profiles of all cases in the files of one `make gpu-check`, or of one case."""
    reports = sorted(reports, key=lambda one: one[0].name)  # the last one about a thing counts
    files = ", ".join(path.name for path, _ in reports)
    try:
        for what in ("gpus", "driver", "commit", "versions"):
            found_in = [report["machine"].get(what) for _, report in reports]
            if any(one != found_in[0] for one in found_in):
                raise ValueError(
                    f"{files}: they must have the same {what}, as parts of one check. Received: {found_in}"
                )
        lines = [line for _, report in reports for line in _measurements(report)]
        cases = list(dict.fromkeys(str(line["case"]) for line in lines if line.get("what") == "step"))
        if name is not None and name not in cases:
            known = ", ".join(cases) or "none"
            raise ValueError(f"{files}: there is no case {name!r}. Those that were measured: {known}")
        found = [_case(lines, case, files, gradients) for case in ([name] if name is not None else cases)]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{files} must be whole results of `make gpu-check`: they lack {error}") from error
    profiles = [one for one in found if one is not None]
    if not profiles:
        raise ValueError(
            f"{files}: no steps of fastdp on one device with full and partial batches: run make gpu-check with its "
            "bench stage"
        )
    return profiles


def _measurements(report: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """All measurements of a report's stages."""
    for stage in report["stages"].values():
        for part in stage["parts"].values():
            yield from (line for line in part.get("measurements", []) if isinstance(line, Mapping))


def _case(lines: Sequence[Mapping[str, Any]], case: str, files: str, gradients: str) -> Profile | None:
    """One case, by the best kind of step that was measured; None if too little was. One row is the host's work."""
    steps = [
        line
        for line in lines
        if line.get("what") == "step" and line["case"] == case and line["library"] == "fastdp" and line["devices"] == 1
    ]
    kinds = {line["how"] for line in steps}
    how = next((one for one in ("graph", "traced", "eager") if one in kinds), None)
    plain = [
        line for line in steps if line["how"] == how and not line["way"].endswith((", fed", ", resident", ", bare"))
    ]
    points = {int(line["rows"]): float(line["milliseconds"]["median"]) / 1e3 for line in plain}
    ready = [
        line
        for line in lines
        if line.get("what") == "ready" and line["case"] == case and line["way"] == f"fastdp 1 {how}"
    ]
    parameters = ready[-1].get("parameters") if ready else None
    host = points.pop(1, 0.0) if len(points) > 1 else 0.0
    if not points or parameters is None:
        return None
    return from_points(case, points, int(parameters), gradients=gradients, host=host, source=f"{files}, fastdp 1 {how}")
