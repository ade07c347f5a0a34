"""Two checkpoints or files of weights are compared to the last bit, and told apart in units in the last place."""

from __future__ import annotations

import json
import math
import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch

from fastdp.checkpoint import contents, fingerprints
from fastdp.checkpoint.compare import differences
from fastdp.checkpoint.contents import Numbers
from fastdp.cli import main


def numbers(**values) -> Numbers:
    found = Numbers()
    found.update(values)
    return found


def only(one, other):
    (difference,) = differences(numbers(w=one), numbers(w=other))
    return difference


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("value", "steps"), [(1.0, 1), (-1.0, 3), (0.0, 2), (1e-7, 5)])
def test_floats_that_are_n_steps_apart_differ_by_n_ulps(dtype, value, steps):
    a = np.full(3, value, dtype)
    b = a.copy()
    for _ in range(steps):
        b[1] = np.nextafter(b[1], dtype(math.inf))
    found = only(a, b)
    assert (found.ulps, found.count, found.total, found.place) == (steps, 1, 3, (1,))
    assert found.largest == float(b[1]) - float(a[1])


def test_signs_infinities_and_whole_numbers():
    smallest = np.nextafter(np.float32(0), np.float32(1))
    assert only(np.array([-smallest]), np.array([smallest])).ulps == 2
    zeros = only(np.array([0.0], np.float32), np.array([-0.0], np.float32))
    assert (zeros.ulps, zeros.count) == (0, 1)  # other bits all the same
    assert only(np.array([1.0, 2.0]), np.array([1.0, math.nan])).largest == math.inf
    assert only(np.array([-1.7e308]), np.array([1.7e308])).ulps > 1 << 63
    assert only(np.array([3]), np.array([5])).ulps is None
    assert differences(numbers(w=np.array([math.nan])), numbers(w=np.array([math.nan]))) == []


def test_what_is_no_pair_of_like_arrays_is_told_in_words():
    one = numbers(a=np.zeros(2), b=1.5, c="x", d=np.zeros(2, bool), e=math.nan, f=np.zeros(3))
    other = numbers(a=np.zeros(2, np.float32), b=1.5, c="y", d=np.ones(2, bool), e=math.nan, g=1)
    told = {found.name: found.what for found in differences(one, other)}
    assert told == {
        "a": "is float64 of shape (2,) and float32 of shape (2,)",
        "c": "is 'x' and 'y'",
        "d": "differs",
        "f": "is not in the second",
        "g": "is not in the first",
    }


def test_bfloat16_of_torch_is_compared_as_such(tmp_path):
    values = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    torch.save({"w": values}, tmp_path / "a.pt")
    values[1] = 2.0 + 2.0**-6
    torch.save({"w": values}, tmp_path / "b.pt")
    (found,) = differences(contents.read(tmp_path / "a.pt"), contents.read(tmp_path / "b.pt"))
    assert (found.name, found.ulps, found.largest, found.place) == ("w", 1, 2.0**-6, (1,))


def test_files_of_weights_are_named_and_compared(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", np.nextafter(np.float32(1), np.float32(2)))):
        np.savez(tmp_path / f"{name}.npz", w=np.full(3, value, np.float32))
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["layer/w"] = np.full(3, value, np.float32)
    for kind, place in (("npz", "w"), ("h5", "layer/w")):
        assert main(["verify", str(tmp_path / f"a.{kind}"), str(tmp_path / f"b.{kind}")]) == 0
        assert main(["verify", str(tmp_path / f"a.{kind}"), str(tmp_path / f"c.{kind}")]) == 1
        said = capsys.readouterr().out
        assert "The same: 1 values, to the last bit." in said
        assert f"{place} differs by up to 1 ulps (at most 1.19e-07) in 3 of 3 numbers, first at [0]" in said


class Planted:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("planted", "w")


def test_files_are_not_trusted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Planted(), 2))
    torch.save({"w": Planted()}, tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", np.array([Planted()], object))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["w"] = h5py.ExternalLink("/etc/hostname", "x")
    (tmp_path / "e.keras").write_bytes(b"PK")
    (tmp_path / "f.txt").write_text("x")
    (tmp_path / "g.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "h").mkdir()
    torch.save({"w": {"x": torch.zeros(1).expand(1 << 60)}}, tmp_path / "i.pt")
    torch.save({"w": torch.zeros(5)}, tmp_path / "j.pt")
    with zipfile.ZipFile(tmp_path / "j.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("j/data/1", bytes(1 << 20))
    for name in ("a.pt", "b.pt", "c.npz", "d.h5", "e.keras", "f.txt", "g.jsonl", "h", "i.pt", "j.pt", "nowhere"):
        (tmp_path / "planted").unlink(missing_ok=True)
        assert main(["verify", name]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("fastdp verify: ")
        assert "Traceback" not in said
        assert not (tmp_path / "planted").exists()


HEAD = {"format": 1, "process": "p", "weights": "w0", "shards": 8}


def line(weights, **more):
    return {"kind": "train", "rows": 8, "batch": "b", "losses": "l", "gradients": "g", "weights": weights, **more}


def written(path, *lines, torn=""):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + torn)
    return fingerprints.read(path)


def test_parts_of_a_run_are_put_together_where_it_went_on(tmp_path):
    other = {**HEAD, "process": "q"}
    whole = written(tmp_path / "a", HEAD, line("w1"), line("w1", batch="c"), line("w2"), line("w3"))
    killed = HEAD, line("w1"), line("w1", batch="c"), line("w2")
    parts = written(tmp_path / "b", *killed, {**other, "weights": "w1"}, line("w1", batch="c"), line("w2"), line("w3"))
    assert parts.steps == whole.steps
    assert fingerprints.first_parting(whole, parts) is None
    assert written(tmp_path / "c", *killed, torn='{"kind": "tr').steps == [*killed[1:]]
    with pytest.raises(ValueError, match="has several runs: one begins with weights that the one before it never had"):
        written(tmp_path / "d", *killed, {**other, "weights": "x"}, line("y"))
    two_models = written(tmp_path / "e", *killed, {**HEAD, "weights": "x"}, line("y"))
    assert len(two_models.steps) == 4


@pytest.mark.parametrize(
    ("change", "step", "what"),
    [
        ({"batch": "x", "losses": "y"}, 1, "batch"),
        ({"losses": "y", "weights": "z"}, 1, "losses"),
        ({"gradients": "y", "weights": "z"}, 1, "gradients"),
        ({"weights": "z"}, 1, "weights"),
        ({"rows": 7, "batch": "x"}, 1, "rows"),
    ],
)
def test_the_first_cause_in_the_first_step_that_differs_is_named(tmp_path, capsys, change, step, what):
    written(tmp_path / "a", HEAD, line("w1"), line("w2"), line("w3"))
    written(tmp_path / "b", {**HEAD, "shards": 4}, line("w1"), {**line("w2"), **change}, line("v"))
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert f"The first step that differs is {step} (counted from 0), first in its {what}." in said
    assert "At the beginning `shards` was 8 and 4." in said


def test_other_weights_at_the_beginning_and_another_length_are_told(tmp_path, capsys):
    written(tmp_path / "a", HEAD, line("w1"))
    written(tmp_path / "b", {**HEAD, "weights": "x"}, line("y", losses="m"))
    written(tmp_path / "c", HEAD, line("w1"), line("w2"))
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "first in its weights before the first step" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "The same in 1 steps, where one run ends: they have 1 and 2." in capsys.readouterr().out
