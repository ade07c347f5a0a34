"""A torch run that is killed at any moment and started again ends with the weights of one that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from killed_runs import Moment, run

SCRIPT = Path(__file__).with_name("torch_run.py")


def leaves(value):
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def same(one, other):
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize(("devices", "kind"), [(1, "loop"), (2, "step"), (2, "loop")])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_never_killed(tmp_path, devices, kind):
    """Writing is slow: most kills come in the middle of it. The first comes when two checkpoints must be there."""
    run(SCRIPT, devices, kind, tmp_path / "whole", tmp_path / "whole.pt")
    command = (SCRIPT, devices, kind, tmp_path / "run", tmp_path / "run.pt")
    moments = random.Random(devices)
    for line in (7, moments.randrange(2, 6), moments.randrange(2, 6)):
        run(*command, moment=Moment(line, moments.uniform(0, 0.1)), status=-9)
    assert "from Position(epoch=" in run(*command)
    assert same(torch.load(tmp_path / "run.pt"), torch.load(tmp_path / "whole.pt"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "step-00000016", "step-00000018"}
    assert run(*command) == "from Position(epoch=3, batch=0, step=18)\n"
    assert same(torch.load(tmp_path / "run.pt"), torch.load(tmp_path / "whole.pt"))


def test_a_checkpoint_of_two_devices_goes_on_with_three_and_loads_in_plain_torch(tmp_path):
    run(SCRIPT, 2, "step", tmp_path / "run", tmp_path / "2.pt", moment=Moment(8, 0.05), status=-9)
    assert "from Position(epoch=" in run(SCRIPT, 3, "step", tmp_path / "run", tmp_path / "3.pt")
    run(SCRIPT, 1, "step", tmp_path / "one", tmp_path / "1.pt")
    with_three, with_one = torch.load(tmp_path / "3.pt"), torch.load(tmp_path / "1.pt")
    torch.testing.assert_close(with_three["module"], with_one["module"], rtol=1e-9, atol=1e-10)
    assert same(torch.load(tmp_path / "run" / "step-00000018" / "model.pt"), with_three["module"])
