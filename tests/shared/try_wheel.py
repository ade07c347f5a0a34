"""Installs a wheel with what it needs into an empty environment, and runs each command there, without Keras and torch.

python tests/shared/try_wheel.py dist/fastdp-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import numpy as np
import fastdp
program = fastdp.FunctionProgram(
    {"w": np.zeros(3)},
    lambda parameters, batch: (((batch[0] @ parameters["w"] - 1) ** 2).mean(), {"w": batch[0].mean(0)}, []),
    lambda parameters, slots, gradients: ({"w": parameters["w"] - gradients["w"]}, {}),
    lambda parameters, batch: [batch[0] @ parameters["w"]],
)
engine = fastdp.DataParallel(program, 2)
print("loss", float(engine.train([np.ones((5, 3))]).sums[0]))
"""
# What each command is called with, its status, and what it says. Without Keras and torch some can only name them.
CALLS = (
    (("--version",), 0, "fastdp "),
    ((), 0, "fastdp COMMAND --help"),
    (("devices",), 0, "Keras"),
    (("devices", "--json"), 0, "{"),
    (("run", "--virtual", "2", "script.py"), 0, "loss 1.0"),
    (("demo",), 2, "pip install"),
    (("bench", "mlp", "--virtual", "1"), 1, "pip install"),
    (("plan", "vit-b16", "--step-ms", "90", "--bus-gbps", "200", "--latency-us", "50"), 0, "modelled"),
    (("verify", "--help"), 0, "checkpoint"),
    (("convert", "none.h5", "new.h5"), 1, "existing .h5 file"),
    (("convert", "old.h5", "new.h5"), 2, "pip install"),
)


def main() -> int:
    """Try all; the number of calls that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "env"], cwd=folder, check=True, timeout=300)
        programs = Path(folder, "env", "bin")
        install = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
        subprocess.run(install, cwd=folder, env=clean, check=True, timeout=600)
        Path(folder, "script.py").write_text(SCRIPT, "utf-8")
        Path(folder, "old.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
        wrong = [call for call in CALLS if not _works(programs / "fastdp", call, folder, clean)]
    print(f"{len(CALLS) - len(wrong)} commands of the wheel work in an empty environment, {len(wrong)} do not")  # noqa: T201
    return len(wrong)


def _works(program: Path, call: tuple[tuple[str, ...], int, str], folder: str, clean: dict[str, str]) -> bool:
    """Whether a call has its status and says its words, without a traceback or a library's warning."""
    arguments, status, words = call
    began = time.monotonic()
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=300, check=False
    )
    said = done.stdout + done.stderr
    right = done.returncode == status and words in said and "Traceback" not in said and "Warning" not in said
    print("ok " if right else "BAD", " ".join(("fastdp", *arguments)), f"{time.monotonic() - began:.1f} s")  # noqa: T201
    if not right:
        print(said)  # noqa: T201
    return right


if __name__ == "__main__":
    sys.exit(main())
