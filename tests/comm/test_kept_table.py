"""The file of a measured table: whole, this user's own, and of these devices, or it counts as none."""

from __future__ import annotations

import json
import os

import pytest

from fastdp.comm import kept_table
from fastdp.comm.kept_table import FOLDER, keep, load, path_of, writable

KEY = {"cards": ["a", "a"], "versions": {"nccl": "23003"}}
OTHER = {"cards": ["a", "b"], "versions": {"nccl": "23003"}}
TABLE = {"limits": [4096, 8192]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of the tables, which is not there yet."""
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / FOLDER


def test_a_table_is_kept_for_its_devices_alone_in_a_private_file(folder):
    assert load(KEY) is None
    assert not folder.exists()
    assert keep(KEY, TABLE, replace=False) == TABLE
    assert (load(KEY), load(OTHER)) == (TABLE, None)
    assert (folder.stat().st_mode & 0o777, path_of(KEY).stat().st_mode & 0o777) == (0o700, 0o600)
    assert [path.name for path in folder.iterdir()] == [path_of(KEY).name]


def test_of_processes_that_measure_at_once_the_first_decides_and_who_is_asked_to_replaces():
    assert keep(KEY, TABLE, replace=False) == TABLE
    assert keep(KEY, {"limits": [1, 2]}, replace=False) == TABLE
    assert keep(KEY, {"limits": [1, 2]}, replace=True) == {"limits": [1, 2]} == load(KEY)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"key": {"cards": ["a", "a"], "versions"',
        "[" * 50_000,
        "null",
        json.dumps({"key": OTHER, "table": TABLE}),
        json.dumps({"key": KEY, "table": [1]}),
        json.dumps({"key": KEY, "table": TABLE}) + " " * kept_table.MOST_NBYTES,
        b"\xff\xfe",
    ],
)
def test_a_torn_or_foreign_file_counts_as_none_and_is_replaced(content):
    keep(KEY, TABLE, replace=False)
    path_of(KEY).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load(KEY) is None
    assert keep(KEY, {"limits": [1, 2]}, replace=False) == {"limits": [1, 2]} == load(KEY)


def test_no_link_is_followed(folder, tmp_path):
    keep(KEY, TABLE, replace=False)
    elsewhere = tmp_path / "elsewhere.json"
    path_of(KEY).rename(elsewhere)
    path_of(KEY).symlink_to(elsewhere)
    assert load(KEY) is None
    assert keep(KEY, {"limits": [1, 2]}, replace=False) == {"limits": [1, 2]}
    assert json.loads(elsewhere.read_text())["table"] == TABLE
    folder.rename(tmp_path / "folder")
    folder.symlink_to(tmp_path / "folder")
    assert (load(KEY), keep(KEY, TABLE, replace=True), writable()) == (None, None, False)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_write_to_counts_as_none(folder, what):
    keep(KEY, TABLE, replace=False)
    (folder if what == "folder" else path_of(KEY)).chmod(0o777)
    assert load(KEY) is None


def test_what_another_user_owns_counts_as_none(monkeypatch):
    keep(KEY, TABLE, replace=False)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert (load(KEY), keep(KEY, TABLE, replace=False), writable()) == (None, None, False)


def test_a_pipe_in_the_place_of_the_file_does_not_keep_anybody_waiting():
    keep(KEY, TABLE, replace=False)
    path_of(KEY).unlink()
    os.mkfifo(path_of(KEY))
    assert load(KEY) is None
