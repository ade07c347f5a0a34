"""get_file with file:// origins: the cache, the hash, and archives that mean harm."""

import gzip
import hashlib
import io
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdp.keras.keras2 import archive_limits
from fastdp.keras.keras2.get_file import get_file, hash_file

CONTENT = b"eight rows of data"
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def origin(tmp_path):
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "data.bin").write_bytes(CONTENT)
    return (tmp_path / "origin" / "data.bin").as_uri()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def rewrite(origin, content):
    Path(origin.removeprefix("file://")).write_bytes(content)


def everything_under(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


def tar_of(path, *members, mode="w:gz"):
    """A tar of (name, content) files, or of TarInfo objects as they are."""
    with tarfile.open(path, mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path.as_uri()


def zip_of(path, *members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path.as_uri()


def link(kind, name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_the_file_lies_in_the_subfolder_of_the_cache_and_its_path_is_returned(origin, cache):
    path = get_file("x.bin", origin, cache_dir=cache)
    assert path == str(cache / "datasets" / "x.bin")
    assert Path(path).read_bytes() == CONTENT
    assert everything_under(cache) == ["datasets", "datasets/x.bin"]


def test_the_old_positional_order_of_arguments_holds(origin, cache):
    path = get_file("x.bin", origin, False, MD5, None, "models", "auto", False, "auto", cache)
    assert path == str(cache / "models" / "x.bin")


def test_without_a_name_it_is_the_last_part_of_the_url(origin, cache):
    assert get_file(None, origin, cache_dir=cache) == str(cache / "datasets" / "data.bin")
    with pytest.raises(ValueError, match="fname must be given"):
        get_file(None, "file:///", cache_dir=cache)


def test_absolute_names_and_subfolders_stand_for_themselves(origin, cache, tmp_path):
    assert get_file(str(tmp_path / "here.bin"), origin, cache_dir=cache) == str(tmp_path / "here.bin")
    path = get_file("x.bin", origin, cache_subdir=str(tmp_path / "there"), cache_dir=cache)
    assert path == str(tmp_path / "there" / "x.bin")


@pytest.mark.parametrize("name", ["../x.bin", "a/../../x.bin", "", "folder/"])
def test_a_name_that_is_none_or_climbs_is_a_value_error(origin, cache, name):
    with pytest.raises(ValueError, match="fname must be a file name"):
        get_file(name, origin, cache_dir=cache)


def test_without_cache_dir_keras_home_is_the_cache(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    assert get_file("x.bin", origin) == str(tmp_path / "home" / "datasets" / "x.bin")
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert get_file("x.bin", origin) == str(tmp_path / "user" / ".keras" / "datasets" / "x.bin")


def test_a_cached_file_is_not_fetched_again(origin, cache):
    first = get_file("x.bin", origin, cache_dir=cache, file_hash=SHA256)
    rewrite(origin, b"other")
    assert get_file("x.bin", origin, cache_dir=cache, file_hash=SHA256) == first
    assert get_file("x.bin", origin, cache_dir=cache) == first
    assert Path(first).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "hashes",
    [
        {"md5_hash": MD5},
        {"file_hash": MD5},
        {"file_hash": SHA256},
        {"file_hash": SHA256.upper(), "hash_algorithm": "sha256"},
        {"file_hash": MD5, "hash_algorithm": "md5"},
        {"file_hash": SHA256, "md5_hash": "ignored where file_hash is given"},
    ],
    ids=str,
)
def test_a_right_hash_in_each_spelling_is_accepted(origin, cache, hashes):
    assert Path(get_file("x.bin", origin, cache_dir=cache, **hashes)).read_bytes() == CONTENT


@pytest.mark.parametrize("hashes", [{"md5_hash": "0" * 32}, {"file_hash": "0" * 64}], ids=str)
def test_a_wrong_hash_is_a_value_error_and_nothing_is_kept(origin, cache, hashes):
    with pytest.raises(ValueError, match=r"file_hash must be the (md5|sha256) of .*expected 0+, got [0-9a-f]+"):
        get_file("x.bin", origin, cache_dir=cache, **hashes)
    assert everything_under(cache) == ["datasets"]


def test_a_cached_file_with_a_wrong_hash_is_fetched_again(origin, cache):
    path = Path(get_file("x.bin", origin, cache_dir=cache))
    path.write_bytes(b"broken")
    assert Path(get_file("x.bin", origin, cache_dir=cache, file_hash=SHA256)).read_bytes() == CONTENT
    path.write_bytes(b"broken")
    rewrite(origin, b"other")
    with pytest.raises(ValueError, match="not kept"):
        get_file("x.bin", origin, cache_dir=cache, file_hash=SHA256)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_hash": "abc"}, "file_hash must be 32"),
        ({"file_hash": "z" * 32}, "file_hash must be 32"),
        ({"md5_hash": SHA256}, "file_hash must be 32"),
        ({"file_hash": MD5, "hash_algorithm": "sha256"}, "file_hash must be 32"),
        (
            {"file_hash": MD5, "hash_algorithm": "crc"},
            'hash_algorithm must be "auto", "md5" or "sha256", got',
        ),
        ({"archive_format": "rar", "extract": True}, "archive_format must be"),
    ],
)
def test_arguments_that_make_no_sense_fail_before_anything_is_fetched(cache, options, message):
    with pytest.raises(ValueError, match=message):
        get_file("x.bin", "file:///nowhere/at/all", cache_dir=cache, **options)
    assert not cache.exists()


def test_an_origin_that_is_not_there_is_an_os_error_and_nothing_is_kept(cache, tmp_path):
    with pytest.raises(OSError, match=r"origin must be a URL that can be fetched, got .*missing\.bin"):
        get_file("x.bin", (tmp_path / "missing.bin").as_uri(), cache_dir=cache)
    assert everything_under(cache) == ["datasets"]


def test_a_download_that_breaks_off_is_an_os_error_and_nothing_is_kept(cache):
    class Short(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"ten bytes.")

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Short) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(OSError, match="broke off: expected 100 bytes, got 10"):
            get_file("x.bin", f"http://127.0.0.1:{server.server_port}/x.bin", cache_dir=cache)
        thread.join()
    assert everything_under(cache) == ["datasets"]


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.bz2", "w:bz2")])
def test_extract_unpacks_a_tar_into_the_files_folder_and_returns_the_archive(tmp_path, cache, suffix, mode):
    origin = tar_of(tmp_path / f"a.{suffix}", ("flowers/rose.txt", b"red"), ("top.txt", b"t"), mode=mode)
    path = get_file(f"a.{suffix}", origin, cache_dir=cache, extract=True)
    assert path == str(cache / "datasets" / f"a.{suffix}")
    assert (cache / "datasets/flowers/rose.txt").read_bytes() == b"red"
    assert everything_under(cache / "datasets") == [f"a.{suffix}", "flowers", "flowers/rose.txt", "top.txt"]


def test_extract_unpacks_a_zip_and_replaces_files_but_leaves_others(tmp_path, cache):
    origin = zip_of(tmp_path / "a.zip", ("flowers/", b""), ("flowers/rose.txt", b"red"))
    (cache / "datasets" / "flowers").mkdir(parents=True)
    (cache / "datasets/flowers/rose.txt").write_bytes(b"old")
    (cache / "datasets/flowers/tulip.txt").write_bytes(b"yellow")
    assert get_file("a.zip", origin, cache_dir=cache, extract=True) == str(cache / "datasets" / "a.zip")
    assert (cache / "datasets/flowers/rose.txt").read_bytes() == b"red"
    assert (cache / "datasets/flowers/tulip.txt").read_bytes() == b"yellow"


def test_untar_returns_the_folder_and_keeps_the_archive_beside_it(tmp_path, cache):
    origin = tar_of(tmp_path / "f.tgz", ("flowers/rose.txt", b"red"))
    path = get_file("flowers", origin, untar=True, cache_dir=cache)
    assert path == str(cache / "datasets" / "flowers")
    assert everything_under(cache / "datasets") == ["flowers", "flowers.tar.gz", "flowers/rose.txt"]
    os.remove(cache / "datasets/flowers/rose.txt")
    get_file("flowers", origin, untar=True, cache_dir=cache)
    assert everything_under(path) == [], "it was unpacked a second time"


def test_untar_puts_content_without_that_top_folder_into_a_new_one(tmp_path, cache):
    origin = tar_of(tmp_path / "f.tgz", ("rose.txt", b"red"), ("other/tulip.txt", b"yellow"))
    path = get_file("flowers", origin, untar=True, cache_dir=cache)
    assert everything_under(path) == ["other", "other/tulip.txt", "rose.txt"]
    assert everything_under(cache / "datasets")[:2] == ["flowers", "flowers.tar.gz"]


def test_what_is_no_archive_is_a_value_error(origin, tmp_path, cache):
    for options in ({"extract": True}, {"untar": True}, {"extract": True, "archive_format": ["zip"]}):
        with pytest.raises(ValueError, match="archive_format must fit the file, expected"):
            get_file("x", origin, cache_dir=cache, **options)


def test_archive_format_none_unpacks_nothing(tmp_path, cache):
    origin = zip_of(tmp_path / "a.zip", ("rose.txt", b"red"))
    for wanted in (None, []):
        get_file("a.zip", origin, cache_dir=cache, extract=True, archive_format=wanted)
    assert everything_under(cache / "datasets") == ["a.zip"]


def test_an_executable_file_stays_executable_and_gets_no_other_right(tmp_path, cache):
    program = tarfile.TarInfo("run.sh")
    program.mode = 0o6777
    get_file("a", tar_of(tmp_path / "a.tar", program), cache_dir=cache, extract=True)
    mode = (cache / "datasets" / "run.sh").stat().st_mode
    assert mode & 0o100
    assert not mode & 0o6000


def test_links_inside_an_archive_work(tmp_path, cache):
    origin = tar_of(
        tmp_path / "a.tar",
        link(tarfile.SYMTYPE, "data/latest", "../versions/2"),
        link(tarfile.LNKTYPE, "data/copy.txt", "versions/2/rose.txt"),
        ("versions/2/rose.txt", b"red"),
    )
    get_file("a.tar", origin, cache_dir=cache, extract=True)
    assert (cache / "datasets/data/latest/rose.txt").read_bytes() == b"red"
    assert (cache / "datasets/data/copy.txt").read_bytes() == b"red"


SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE_TARS = {
    "climbing path": [("../evil.txt", b"x")],
    "path that climbs later": [("a/../../evil.txt", b"x")],
    "absolute path": [("/tmp/fastdp-evil.txt", b"x")],
    "absolute symbolic link": [link(SYM, "l", "/etc/passwd")],
    "climbing symbolic link": [link(SYM, "a/l", "../../secret.txt")],
    "write through a symbolic link": [link(SYM, "l", ".."), ("l/evil.txt", b"x")],
    "write through a link inside": [link(SYM, "l", "a"), ("a/x", b"x"), ("l/evil.txt", b"x")],
    "link through a link": [("s/x", b"x"), link(SYM, "t", "."), link(SYM, "u", "t/t/../../secret.txt")],
    "hard link out": [link(HARD, "l", "../secret.txt")],
    "absolute hard link": [link(HARD, "l", "/etc/passwd")],
    "hard link to a symbolic link": [link(SYM, "s", "../secret.txt"), link(HARD, "l", "s")],
    "link back in through the parent": [link(SYM, "l", "../datasets/data")],
    "link under a link": [link(SYM, "a", "b"), link(SYM, "a/c", "../x")],
    "device": [link(tarfile.CHRTYPE, "null", "")],
    "pipe": [link(tarfile.FIFOTYPE, "pipe", "")],
}


@pytest.mark.parametrize("members", HOSTILE_TARS.values(), ids=HOSTILE_TARS)
@pytest.mark.parametrize("options", [{"extract": True}, {"untar": True}], ids=["extract", "untar"])
def test_a_tar_that_leaves_its_folder_is_refused_whole(tmp_path, cache, members, options):
    (cache / "datasets").mkdir(parents=True)
    (cache / "secret.txt").write_bytes(b"secret")
    origin = tar_of(tmp_path / "a.tgz", ("harmless.txt", b"x"), *members)
    with pytest.raises(ValueError, match="archive members must stay inside their folder, got"):
        get_file("a", origin, cache_dir=cache, **options)
    archive = "a.tar.gz" if "untar" in options else "a"
    assert everything_under(cache) == ["datasets", f"datasets/{archive}", "secret.txt"]
    assert not os.path.exists("/tmp/fastdp-evil.txt")


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/fastdp-evil.txt", "..\\evil.txt"])
def test_a_zip_that_leaves_its_folder_is_refused_whole(tmp_path, cache, name):
    origin = zip_of(tmp_path / "a.zip", ("harmless.txt", b"x"), (name, b"x"))
    with pytest.raises(ValueError, match="archive members must stay inside their folder, got"):
        get_file("a.zip", origin, cache_dir=cache, extract=True)
    assert everything_under(cache) == ["datasets", "datasets/a.zip"]
    assert not os.path.exists("/tmp/fastdp-evil.txt")


def cut(path, keep):
    """The first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


NOISE = os.urandom(20_000)
ARCHIVES = {
    "zip": lambda path: zip_of(path, ("a/rose.bin", NOISE), ("tulip.bin", NOISE)),
    "tar": lambda path: tar_of(path, ("a/rose.bin", NOISE), ("tulip.bin", NOISE), mode="w"),
    "tgz": lambda path: tar_of(path, ("a/rose.bin", NOISE), ("tulip.bin", NOISE)),
    "tar.bz2": lambda path: tar_of(path, ("a/rose.bin", NOISE), ("tulip.bin", NOISE), mode="w:bz2"),
    "tar.xz": lambda path: tar_of(path, ("a/rose.bin", NOISE), ("tulip.bin", NOISE), mode="w:xz"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_an_archive_that_is_cut_is_not_kept_and_a_cut_one_in_the_cache_is_fetched_anew(tmp_path, cache, kind, keep):
    source = tmp_path / f"a.{kind}"
    origin = ARCHIVES[kind](source)
    whole = source.read_bytes()
    cut(source, keep)
    with pytest.raises(ValueError, match=r"(cut|damaged).*") as error:
        get_file("archive", origin, cache_dir=cache, extract=True)
    assert str(cache / "datasets" / "archive") in str(error.value)
    assert everything_under(cache) == ["datasets"]
    get_file("archive", origin, cache_dir=cache)  # the cut one is in the cache
    source.write_bytes(whole)
    get_file("archive", origin, cache_dir=cache, extract=True)
    assert (cache / "datasets/tulip.bin").read_bytes() == NOISE
    assert (cache / "datasets/archive").read_bytes() == whole


def test_an_archive_whose_hash_is_right_is_kept_even_if_it_is_damaged(tmp_path, cache):
    source = tmp_path / "a.tgz"
    origin = ARCHIVES["tgz"](source)
    cut(source, 0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match="cut or damaged"):
            get_file("a.tgz", origin, cache_dir=cache, extract=True, file_hash=hash_file(source))
    assert everything_under(cache) == ["datasets", "datasets/a.tgz"]


def test_a_compressed_file_that_is_no_tar_is_of_another_format_and_stays(tmp_path, cache):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"1,2,3" * 1000))
    for _ in range(2):
        with pytest.raises(ValueError, match="archive_format must fit the file"):
            get_file("a.csv.gz", (tmp_path / "a.csv.gz").as_uri(), cache_dir=cache, extract=True)
    assert everything_under(cache) == ["datasets", "datasets/a.csv.gz"]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_an_archive_unpacks_to_as_much_as_allowed_and_to_nothing_if_it_is_more(tmp_path, cache, kind, monkeypatch):
    zeros = bytes(3 << 20)
    make = {"zip": lambda path: zip_of(path, ("zeros", zeros)), "tgz": lambda path: tar_of(path, ("zeros", zeros))}[
        kind
    ]
    origin = make(tmp_path / "a")
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", zeros)
    with pytest.raises(ValueError, match=r"at most 3,000,000 bytes, got 3,149,824 with 'zeros'.*max_extracted_nbytes"):
        get_file("a", origin, cache_dir=cache, extract=True, max_extracted_nbytes=3_000_000)
    assert everything_under(cache) == ["datasets", "datasets/a"]
    monkeypatch.setattr(archive_limits, "FREE_NBYTES", 0)
    with pytest.raises(ValueError, match="must unpack to at most"):
        get_file("a", origin, cache_dir=cache, extract=True)
    get_file("a", origin, cache_dir=cache, extract=True, max_extracted_nbytes=4 << 20)
    assert (cache / "datasets/zeros").stat().st_size == 3 << 20
    with pytest.raises(ValueError, match="max_extracted_nbytes must be 0 or more"):
        get_file("a", origin, cache_dir=cache, extract=True, max_extracted_nbytes=-1)


def test_many_empty_members_count_too(tmp_path, cache):
    origin = tar_of(tmp_path / "a.tgz", *[(f"f{number}", b"") for number in range(300)])
    with pytest.raises(ValueError, match=r"at most 1,048,576 bytes"):
        get_file("a.tgz", origin, cache_dir=cache, extract=True, max_extracted_nbytes=1 << 20)


def test_a_disk_without_space_is_an_os_error_before_it_is_full(tmp_path, cache, monkeypatch):
    origin = tar_of(tmp_path / "a.tgz", ("zeros", bytes(1 << 20)))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 19))
    with pytest.raises(OSError, match=r"no space for .* bytes"):
        get_file("a.tgz", origin, cache_dir=cache, extract=True)
    assert everything_under(cache) == ["datasets", "datasets/a.tgz"]


def test_a_header_that_declares_more_than_there_can_be_is_not_read_into_memory(tmp_path, cache):
    """Zeros compress a thousandfold: tarfile would read the text of this header at once."""
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, 1 << 40
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write(head.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    with pytest.raises(ValueError, match=r"declares a header of 1,099,511,627,776 bytes"):
        get_file("a.tgz", (tmp_path / "a.tgz").as_uri(), cache_dir=cache, extract=True)
    assert everything_under(cache) == ["datasets"]


def test_a_tar_whose_sizes_lead_back_ends(tmp_path, cache):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.pax_headers = {"size": "-2048"}
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"a\.tar.*(cut|damaged)"):
        get_file("a.tar", (tmp_path / "a.tar").as_uri(), cache_dir=cache, extract=True)


def test_a_download_in_chunks_that_breaks_off_is_an_os_error_and_nothing_is_kept(cache):
    class Short(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ff\r\nten bytes.")
            self.close_connection = True

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Short) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(OSError, match=r"origin must be a URL that can be fetched, got .*IncompleteRead"):
            get_file("x.bin", f"http://127.0.0.1:{server.server_port}/x.bin", cache_dir=cache)
        thread.join()
    assert everything_under(cache) == ["datasets"]


def test_hash_file_gives_what_the_command_line_programs_give(origin):
    path = origin.removeprefix("file://")
    assert (hash_file(path), hash_file(path, "md5")) == (SHA256, MD5)
