"""Private files: what another user, a link or a torn write has put there counts as none; no link is written through."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fastdp import private_files
from fastdp.private_files import check_path, opened_folder, private_folder, put, read

MOST = 1 << 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "above" / "folder"


def test_what_was_put_is_read_and_the_first_of_two_wins_unless_it_is_replaced(folder: Path) -> None:
    with pytest.raises(FileNotFoundError), opened_folder(folder, make=False):
        pass
    with opened_folder(folder, make=True) as opened:
        assert read(opened, "a", MOST) is None
        assert put(opened, "a", b"one", replace=False)
        assert not put(opened, "a", b"two", replace=False)
        assert read(opened, "a", MOST) == b"one"
        assert put(opened, "a", b"three", replace=True)
        assert read(opened, "a", MOST) == b"three"
        assert read(opened, "a", 4) is None, "larger than asked for"
    modes = [path.stat().st_mode & 0o777 for path in (folder.parent, folder, folder / "a")]
    assert modes == [0o700, 0o700, 0o600]
    assert [path.name for path in folder.iterdir()] == ["a"], "no part is left"


def test_readers_find_all_of_a_file_or_nothing(folder: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with opened_folder(folder, make=True) as opened:
        threads = [threading.Thread(target=put, args=(opened, "a", one), kwargs={"replace": True}) for one in contents]
        for thread in threads:
            thread.start()
        found = [read(opened, "a", 1 << 20) for _ in range(50)]
        for thread in threads:
            thread.join(60)
        found.append(read(opened, "a", 1 << 20))
    assert set(found) <= {None, *contents}
    assert found[-1] is not None


@pytest.mark.parametrize("fault", ["linked", "linked to nothing", "group", "others", "pipe", "folder"])
def test_a_file_that_is_not_ones_own_counts_as_none_and_is_replaced_without_a_trace(
    folder: Path, fault: str, tmp_path: Path
) -> None:
    with opened_folder(folder, make=True) as opened:
        put(opened, "a", b"one", replace=False)
        file, elsewhere = folder / "a", tmp_path / "elsewhere"
        if fault.startswith("linked"):
            file.rename(elsewhere)
            file.symlink_to(elsewhere if fault == "linked" else tmp_path / "nowhere")
        elif fault in ("group", "others"):
            file.chmod(0o620 if fault == "group" else 0o602)
        else:
            file.unlink()
            os.mkfifo(file) if fault == "pipe" else file.mkdir()
        assert read(opened, "a", MOST) is None
        if fault == "folder":
            with pytest.raises(IsADirectoryError):
                put(opened, "a", b"two", replace=True)
            return
        assert put(opened, "a", b"two", replace=True)
        assert read(opened, "a", MOST) == b"two"
    assert not fault.startswith("linked") or elsewhere.read_bytes() == b"one"
    assert not (tmp_path / "nowhere").exists()


def test_another_users_folder_and_file_count_as_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened_folder(folder, make=True) as opened:
        put(opened, "a", b"one", replace=False)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert read(opened, "a", MOST) is None
        with pytest.raises(PermissionError, match="belongs to another user"), opened_folder(folder, make=False):
            pass


@pytest.mark.parametrize("fault", ["linked", "open", "a file"])
def test_a_folder_that_is_not_private_is_refused(folder: Path, fault: str, tmp_path: Path) -> None:
    folder.parent.mkdir()
    if fault == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o770 if fault == "open" else 0o700)
    if fault == "linked":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(OSError, match=r"others can write|Not a directory|File exists|symbolic"),
        opened_folder(folder, make=True),
    ):
        pass


def test_a_path_is_safe_if_nobody_else_can_change_any_part_of_it(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    assert private_folder(place) == place
    (tmp_path / "link").symlink_to("a")
    check_path(tmp_path / "link" / "b")
    check_path(tmp_path / "link" / ".." / "a" / "b")
    place.parent.chmod(0o1777)
    check_path(place)  # as /tmp: others cannot rename what is not theirs
    place.parent.chmod(0o777)
    for path in (place, tmp_path / "link" / "b"):
        with pytest.raises(PermissionError, match=r"others can write to .*/a"):
            check_path(path)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="more than 40 links"):
        check_path(tmp_path / "round")


def test_a_path_with_another_users_folder_or_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    real = os.lstat

    class Foreign:
        def __init__(self, found: os.stat_result) -> None:
            self.st_uid, self.st_gid, self.st_mode = 65_000, found.st_gid, found.st_mode

    for name in ("mine", "link"):

        def foreign(path: Path, name: str = name) -> os.stat_result | Foreign:
            return Foreign(real(path)) if Path(path).name == name else real(path)

        monkeypatch.setattr(private_files.os, "lstat", foreign)
        with pytest.raises(PermissionError, match=f"/{name} belongs to another user"):
            check_path(tmp_path / "link")


def test_group_members_may_write_on_the_way_only_where_the_group_is_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o775)
    group = (tmp_path / "a").stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: group)
    if group == os.geteuid():
        check_path(tmp_path / "a")
    monkeypatch.setattr(os, "getegid", lambda: group + 1)
    with pytest.raises(PermissionError, match="others can write"):
        check_path(tmp_path / "a")
