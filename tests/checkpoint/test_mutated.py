"""Mutated checkpoints: a restart finds a whole one, or raises its own error (see tests/shared/checkpoint_fuzzer.py)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import checkpoint_fuzzer
import pytest

import fastdp
from fastdp.checkpoint import nest


@pytest.mark.parametrize(("kind", "tries"), [("functions", 60), ("torch", 15), ("keras", 25)])
def test_a_restart_never_does_anything_else(kind, tries):
    if kind != "functions":
        pytest.importorskip(kind)
    try:
        outcomes = checkpoint_fuzzer.main(kind, tries, 3)
    finally:
        fastdp.set_virtual_devices(0)
    assert sum(outcomes.values()) == tries
    assert outcomes["restored" if kind == "keras" else "restored step 2"] > 0  # the one before was used


@pytest.mark.parametrize(("kind", "name"), [("torch", "model.pt"), ("keras", "model.keras")])
def test_an_archive_that_declares_more_than_it_stores_is_left_out_though_its_checksums_are_right(kind, name, tmp_path):
    pytest.importorskip(kind)
    fastdp.set_virtual_devices(2)
    try:
        fuzzer = checkpoint_fuzzer.Fuzzer(kind, 0, tmp_path)
        place = tmp_path / "original" / "step-00000003"
        with zipfile.ZipFile(place / name, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(str(Path(archive.namelist()[0]).with_name("more")), bytes(1 << 20))
        with pytest.raises(ValueError, match="declares more than it stores"):
            nest.check_stored(place / name)
        checkpoint_fuzzer._sign(place)
        outcome, _ = fuzzer._restart(tmp_path / "original")
    finally:
        fastdp.set_virtual_devices(0)
    assert outcome == ("restored step 2" if kind == "torch" else "restored")  # from the one before


def test_mutated_files_of_weights_end_in_their_numbers_or_in_an_error_that_names_the_file():
    pytest.importorskip("torch")
    import weights_fuzzer

    outcomes = weights_fuzzer.main(150, 7)
    assert {name for name in outcomes if name.endswith("right")} >= {".h5 right", ".jsonl right", ".pt right"}
