"""Checkpoints are whole or left out, one process writes them, and a failure names the place."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from fastdp.checkpoint import folders, nest
from fastdp.checkpoint.background import NAME
from fastdp.checkpoint.store import Store


def store_in(folder, every_steps=1, keep=2, every_minutes=None):
    return Store(folder, every_steps, every_minutes, keep)


def filled(number):
    def fill(folder: Path) -> None:
        nest.pack({"number": number, "weights": np.full(3, number)}).write(folder)

    return fill


@pytest.fixture
def run(tmp_path):
    """A folder with the checkpoints of steps 1 to 3."""
    store = store_in(tmp_path / "run", keep=3)
    for step in (1, 2, 3):
        store.save(step, filled(step))
    store.close()
    return tmp_path / "run"


def newest(folder):
    store = store_in(folder)
    try:
        step, place = store.newest()
        return step, nest.read(place)["number"]
    finally:
        store.close()


def test_the_newest_is_read_and_so_many_are_kept(run):
    assert newest(run) == (3, 3)
    store = store_in(run, keep=2)
    store.newest()
    store.save(4, filled(4))
    store.close()
    assert sorted(path.name for path in run.iterdir()) == [".lock", "step-00000003", "step-00000004"]
    assert [thread.name for thread in threading.enumerate() if thread.name == NAME] == []


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {
    "changed": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a link": lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to("../elsewhere")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["state.json", "state.npz", "manifest.json"])
def test_one_with_a_file_that_is_not_as_it_was_written_is_left_out_with_a_warning(run, name, harm):
    HARMS[harm](run / "step-00000003" / name)
    with pytest.warns(UserWarning, match=rf"step-00000003 is not whole: .*{name}.* The one before it is used"):
        assert newest(run) == (2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["files"].update({"../../outside": {"size": 0, "sha256": ""}}), "names a file outside"),
        (lambda told: told.update(format=2), "upgrade fastdp"),
    ],
)
def test_a_manifest_that_names_files_elsewhere_or_a_later_format_is_left_out(run, change, said):
    path = run / "step-00000003" / "manifest.json"
    told = json.loads(path.read_text())
    del told["sha256"]
    change(told)
    path.write_text(json.dumps({**told, "sha256": folders._digest(folders._canonical(told))}))
    with pytest.warns(UserWarning, match=said):
        assert newest(run) == (2, 2)


def test_what_a_killed_process_has_begun_is_removed_with_a_warning(run):
    shutil.copytree(run / "step-00000003", run / "step-00000004.tmp")
    with pytest.warns(UserWarning, match=r"step-00000004\.tmp was a part of one"):
        assert newest(run) == (3, 3)
    assert not (run / "step-00000004.tmp").exists()


def test_one_that_is_not_whole_counts_for_nothing_when_old_ones_are_removed(run):
    flip(run / "step-00000003" / "state.npz")
    store = store_in(run, keep=2)
    with pytest.warns(UserWarning, match="not whole"):
        store.newest()
    store.save(3, filled(30))  # the same step anew
    store.settle()
    assert sorted(folders.steps_in(run)) == [2, 3]
    assert nest.read(run / "step-00000003")["number"] == 30
    store.close()


def test_a_run_from_its_beginning_does_not_mix_with_an_earlier_one(run):
    store = store_in(run)
    with pytest.raises(ValueError, match=r"checkpoints of another run, up to step 3.*restore\(\)"):
        store.save(1, filled(1))
    store.close()


def _open(folder, pipe):
    try:
        store_in(folder).close()
        pipe.send("opened")
    except RuntimeError as error:
        pipe.send(str(error))


def test_a_second_writer_is_refused_in_this_process_and_in_another(run):
    store = store_in(run)
    with pytest.raises(RuntimeError, match="in use by another checkpoint of this process"):
        store_in(run)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdp.checkpoint.lock._held", set())  # what a process that was not forked knows
        child = context.Process(target=_open, args=(run, theirs))
        child.start()
        assert ours.poll(30)
        assert f"in use by another process (number {os.getpid()})" in ours.recv()
        child.join(30)
    store.close()
    store_in(run).close()


def test_a_full_disk_is_an_error_with_the_place_and_the_next_save_works(tmp_path):
    store = store_in(tmp_path / "run")
    store.save(1, filled(1))

    def full(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.save(2, full)
    with pytest.raises(OSError, match=r"step-00000002 could not be written: No space left") as caught:
        store.save(3, filled(3))
    assert caught.value.errno == errno.ENOSPC
    store.save(3, filled(3))
    store.close()
    assert newest(tmp_path / "run") == (3, 3)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "step-00000001", "step-00000003"]


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        store_in(tmp_path / "file" / "run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_an_error_that_names_it(run):
    run.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="run"):
            store_in(run)
    finally:
        run.chmod(0o700)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"every_steps": 0}, ValueError, "`every_steps` must be a number of steps, at least 1"),
        ({"every_steps": 1.5}, TypeError, "`every_steps` must be a whole number"),
        ({"keep": 0}, ValueError, "`keep` must be a number of checkpoints, at least 1"),
        ({"every_minutes": 0}, ValueError, "`every_minutes` must be a number of minutes above 0"),
        ({"every_minutes": "5"}, TypeError, "`every_minutes` must be a number of minutes"),
    ],
)
def test_an_argument_of_no_use_is_an_error_before_anything_is_made(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        store_in(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_it_is_due_by_steps_and_by_minutes(tmp_path):
    by_steps, by_time = store_in(tmp_path / "a", every_steps=3), store_in(tmp_path / "b", None, every_minutes=1e-9)
    never = store_in(tmp_path / "c", None, every_minutes=60)
    assert [by_steps.due(step) for step in (1, 2, 3)] == [False, False, True]
    assert by_time.due(1)
    assert not never.due(10**9)
    for store in (by_steps, by_time, never):
        store.close()


def test_one_whose_place_cannot_be_taken_is_kept(tmp_path, monkeypatch):
    place = folders.write(tmp_path, 3, lambda new: (new / "weights").write_text("first"))
    rename = Path.rename

    def fails_once(path, target):
        if target == place and not path.name.startswith(f"{place.name}.old"):
            raise OSError("planned")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="planned"):
        folders.write(tmp_path, 3, lambda new: (new / "weights").write_text("second"))
    assert (place / "weights").read_text() == "first"
    assert folders.what_is_wrong(place) is None
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
