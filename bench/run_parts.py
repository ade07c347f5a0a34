"""How long does each part of a step take? Times all of `bench/parts` by pytest-benchmark and writes the medians.

Further arguments go to pytest: `-k all_reduce`, `--benchmark-max-time=0.2`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import RESULTS, result_line, result_name

FOLDER = Path(__file__).parent / "parts"


def main() -> int:
    """Run the benchmarks and write the results; returns pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON file goes")
    asked, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        options = ["-o", "python_files=bench_*.py", "-p", "no:cacheprovider", "--benchmark-group-by=func"]
        options += ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name", f"--benchmark-json={found}"]
        command = [sys.executable, "-m", "pytest", str(FOLDER), *options, *others]
        status = subprocess.run(command, check=False, cwd=FOLDER.parents[1]).returncode
        if status or not found.exists() or not found.read_text():
            return status or 1
        measured = json.loads(found.read_text())["benchmarks"]
    results = {
        one["name"].removeprefix("test_"): {
            "median": float(f"{one['stats']['median']:.4g}"),
            "iqr": float(f"{one['stats']['iqr']:.3g}"),
            "rounds": one["stats"]["rounds"],
        }
        for one in measured
    }
    line = result_line("parts", results, libraries=("numpy", "keras", "torch", "pytest-benchmark"), unit="seconds")
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"{result_name('parts', line)}.json"
    path.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
