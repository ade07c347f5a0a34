"""Reads mutated files of weights and fingerprints, as `fastdp verify` does.

`python tests/shared/weights_fuzzer.py TRIES [SEED]`, by hand. Bytes of a file are mutated one to three times. Reading
must end with numbers, or with an OSError or a ValueError that names the file.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from file_mutations import BYTE_MUTATIONS, mutated_bytes

from fastdp.checkpoint import contents, fingerprints


def write_files(folder: Path) -> list[Path]:
    """One file of each kind. A `.keras` file is one by its form."""
    tensors = {
        "w": torch.ones(4),
        "deep": {"half": torch.zeros(2, dtype=torch.bfloat16)},
        "s": torch.eye(3).to_sparse(),
    }
    with warnings.catch_warnings(), h5py.File(folder / "a.h5", "w") as file:
        warnings.simplefilter("ignore")  # sparse invariants
        torch.save(tensors, folder / "a.pt")
        torch.save({"w": torch.ones(4)}, folder / "b.pth", _use_new_zipfile_serialization=False)
        file["x/y"] = np.ones(5)
        file.create_dataset("z", data=np.arange(400), chunks=(50,), compression="gzip")
    np.savez(folder / "a.npz", w=np.ones((3, 4)), b=np.arange(3))
    with zipfile.ZipFile(folder / "a.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(folder / "a.h5", "model.weights.h5")
    head = {"format": 1, "process": "p", "weights": "w0", "shards": 8}
    step = {"kind": "train", "rows": 8, "batch": "b", "losses": "l", "gradients": "g", "weights": "w"}
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, step, step)))
    return sorted(folder.iterdir())


def read(path: Path) -> str:
    """Read a file, and say how that ended.

    Raises:
        AssertionError: in another way than it may.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fingerprints.read(path) if path.suffix == ".jsonl" else contents.read(path)
        except (OSError, ValueError) as error:
            if str(path) in str(error):
                return type(error).__name__
            raise AssertionError(f"{type(error).__name__} names no file: {error}") from error
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} is not documented: {error}") from error
    return "right"


def main(tries: int, seed: int = 0) -> Counter[str]:
    """Run, and return how the tries ended."""
    chosen, outcomes = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        files = write_files(Path(place))
        assert all(read(file) == "right" for file in files)
        for number in range(tries):
            file = chosen.choice(files)
            content = file.read_bytes()
            for _ in range(chosen.randint(1, 3)):
                content = mutated_bytes(content, chosen.choice(BYTE_MUTATIONS), chosen.randrange(1 << 32))
            mutated = file.with_name(f"mutated{file.suffix}")
            mutated.write_bytes(content)
            try:
                outcomes[f"{file.suffix} {read(mutated)}"] += 1
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, try {number}, {file.suffix}: {error}") from error
    return outcomes


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))  # noqa: T201
