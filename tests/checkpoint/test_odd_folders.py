"""Checkpoints on full disks and in folders as strangers leave them: nothing whole is lost, errors name the place."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import threading

import checkpoint_fuzzer
import folder_fuzzer
import numpy as np
import pytest
import torch
from torch import nn

import fastdp
from fastdp.checkpoint import folders
from fastdp.checkpoint.background import NAME
from fastdp.checkpoint.folders import name_of
from fastdp.checkpoint.store import Store


def run_in(folder, module, **options):
    return fastdp.Checkpoint(folder, model=module, **{"every_steps": 1, **options})


@contextlib.contextmanager
def room_for(nbytes):
    """Files of this process may have so many bytes: the system refuses more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("nbytes", [0, 100, 40000])
def test_a_disk_that_gets_full_while_torch_writes_loses_nothing_and_the_next_step_raises_it(tmp_path, nbytes):
    module = nn.Linear(400, 60)
    with run_in(tmp_path, module, every_steps=2, keep=2) as checkpoint:
        checkpoint.step()
        checkpoint.step()
        checkpoint._store.settle()
        with room_for(nbytes):
            checkpoint.step()
            checkpoint.step()  # in the background
            checkpoint._store._background._thread.join(30)
            with pytest.raises(OSError, match="step-00000004 could not be written: File too large"):
                checkpoint.step()
        assert folders.steps_in(tmp_path) == [2]
        assert folders.what_is_wrong(tmp_path / name_of(2)) is None
        checkpoint.step()
    assert folders.steps_in(tmp_path) == [6, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", name_of(2), name_of(6)]


def cut_short(folder, then):
    """A run whose first checkpoint finds the disk full, and does something then."""
    with run_in(folder, nn.Linear(40, 60)) as checkpoint:
        with room_for(100):
            checkpoint.step()
            checkpoint._store._background._thread.join(30)
        then(checkpoint)


def test_the_end_of_a_run_is_written_though_the_one_before_could_not_be(tmp_path):
    def moved_on(checkpoint):
        checkpoint._position = checkpoint._position._replace(step=2)

    with pytest.warns(UserWarning, match="step-00000001 could not be written"):
        cut_short(tmp_path, moved_on)
    assert folders.steps_in(tmp_path) == [2]


def test_after_a_signal_the_run_is_saved_though_the_one_before_could_not_be(tmp_path, capsys):
    def told_to_end(checkpoint):
        signal.raise_signal(signal.SIGTERM)
        checkpoint.step()

    with pytest.warns(UserWarning, match="step-00000001 could not be written"), pytest.raises(SystemExit, match="143"):
        cut_short(tmp_path, told_to_end)
    assert folders.steps_in(tmp_path) == [2]
    assert "saved" in capsys.readouterr().err


@pytest.mark.parametrize("nbytes", [100, 8000])
def test_a_disk_that_gets_full_while_keras_writes_loses_nothing(tmp_path, nbytes):
    keras = pytest.importorskip("keras")
    from fastdp.callbacks import Checkpoint

    class Full(keras.callbacks.Callback):
        room = contextlib.ExitStack()

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                for thread in threading.enumerate():
                    if thread.name == NAME:
                        thread.join(30)
                self.room.enter_context(room_for(nbytes))

    fastdp.set_virtual_devices(2)
    try:
        model = checkpoint_fuzzer._keras_model()
        x = np.ones((4, 3), "f4")
        with Full.room, pytest.raises(OSError, match=r"step-0000000. could not be written"):
            model.fit(x, x[:, :2], 4, 4, 0, callbacks=[Full(), Checkpoint(tmp_path, every_steps=1)])
    finally:
        fastdp.set_virtual_devices(0)
    assert folders.steps_in(tmp_path) == [1]
    assert folders.what_is_wrong(tmp_path / name_of(1)) is None


def test_a_lock_on_a_full_disk_is_held_and_given_back(tmp_path):
    with room_for(0):
        store = Store(tmp_path, 1, None, 3)
        with pytest.raises(RuntimeError, match="in use by another checkpoint"):
            Store(tmp_path, 1, None, 3)
        store.close()
        Store(tmp_path, 1, None, 3).close()


LEFT = {
    "a link": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a broken link": lambda path, elsewhere: path.symlink_to(elsewhere / "nothing"),
    "a file": lambda path, elsewhere: path.write_text("x"),
    "a folder": lambda path, elsewhere: (path / "inside").mkdir(parents=True),
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("name", ["step-00000001", "step-00000003", "step-00000003.tmp", "step-00000001.old.tmp"])
def test_what_strangers_leave_under_its_names_ends_no_run_and_nothing_elsewhere_is_touched(tmp_path, name, left):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (folder / "step-notes.tmp").mkdir(parents=True)
    LEFT[left](folder / name, elsewhere)
    module = nn.Linear(2, 1)

    def trained():
        with run_in(folder, module, keep=1) as checkpoint:
            assert checkpoint.restore() is None
            for _ in range(4):
                checkpoint.step()

    with pytest.warns(UserWarning, match=rf"{name[:13]}.* (is not whole|was a part of one)"):
        trained()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "step-00000004", "step-notes.tmp"]
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]


def test_an_older_one_that_cannot_be_removed_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    def fails(place):
        raise OSError(16, "Device or resource busy", str(place))

    monkeypatch.setattr(folders, "remove", fails)
    store = Store(tmp_path, 1, None, 1)
    found = []
    monkeypatch.setattr("fastdp.checkpoint.store.warn_user", found.append)
    for step in (1, 2):
        store.save(step, lambda folder: (folder / "weights").write_text("x"))
    store.close()
    (told,) = found
    assert "step-00000002 is written, and an older one could not be removed" in told
    assert folders.steps_in(tmp_path) == [2, 1]


def test_an_error_at_the_start_leaves_the_folder_free(tmp_path, monkeypatch):
    (tmp_path / "step-00000001.tmp").mkdir()

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove_rest", fails)
        with pytest.raises(PermissionError, match=r"step-00000001\.tmp"):
            Store(tmp_path, 1, None, 1)
    with pytest.warns(UserWarning, match="was a part of one"):
        Store(tmp_path, 1, None, 1).close()


@pytest.mark.parametrize("name", ["with spaces", "日本 ü \u202e", "a\nb", "%s{x}", "a" * 200, "\udcff"])
def test_any_name_of_a_folder_and_a_link_to_it(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "real")
    module, other = nn.Linear(2, 1), nn.Linear(2, 1)
    for one in (module, other):
        with run_in(tmp_path / name, one, every_minutes=1e-300, every_steps=None) as checkpoint:
            checkpoint.restore()
            checkpoint.step()
    assert torch.equal(module.weight, other.weight)
    assert folders.steps_in(tmp_path / "real") == [2, 1]
    with pytest.raises(RuntimeError, match="in use by another checkpoint"), run_in(tmp_path / name, module):
        run_in(tmp_path / "real", module)


LOCKS = {
    "a pipe": (os.mkfifo, "cannot be locked against other processes"),
    "a folder": (lambda path: path.mkdir(), r"\.lock"),
    "a link": (lambda path: path.symlink_to("elsewhere"), r"\.lock"),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_is_no_file_is_an_error_that_names_it(tmp_path, kind):
    make, said = LOCKS[kind]
    make(tmp_path / ".lock")
    with pytest.raises(OSError, match=said):
        Store(tmp_path, 1, None, 3)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def unlocked(file):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr("fastdp.checkpoint.lock._lock", unlocked)
        with pytest.raises(OSError, match=rf"{tmp_path} \(No locks available\)\. Choose a folder"):
            Store(tmp_path, 1, None, 3)
    Store(tmp_path, 1, None, 3).close()


def test_one_under_the_name_of_a_later_step_hides_none_and_is_left_out(tmp_path):
    module = nn.Linear(2, 1)
    with run_in(tmp_path, module) as checkpoint:
        for _ in range(3):
            checkpoint.step()
    (tmp_path / name_of(1)).rename(tmp_path / name_of(7))

    def again():
        with run_in(tmp_path, module) as checkpoint:
            found = checkpoint.restore().step
            checkpoint.step()
        return found

    with pytest.warns(UserWarning, match="step-00000007 is not whole: it is the checkpoint of step 1, under another"):
        assert again() == 3
    assert again() == 4


def test_a_run_goes_on_whatever_is_left_in_its_folder_between_restarts(monkeypatch):
    monkeypatch.setattr(folders, "_sync", lambda path: None)  # which is slow
    assert folder_fuzzer.main(15, 7) == 15 * folder_fuzzer.RESTARTS
