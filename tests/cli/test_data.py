"""The commands `data bench` and `data pack`: what they print and write, and what an interruption leaves."""

import json

import h5py
import numpy as np
import pytest

import fastdp
from fastdp.cli import main
from fastdp.cli.status import FAILED, INTERRUPTED, OK, WRONG_USE
from fastdp.data import pack
from fastdp.data.image_folder import list_images, load_image

Image = pytest.importorskip("PIL.Image")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def images(tmp_path):
    """35 images of three classes, 12 x 10 pixels, each of one color."""
    for number in range(35):
        folder = tmp_path / "images" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (number * 7, number, 255 - number)).save(folder / f"{number:02}.png")
    return tmp_path / "images"


def packed(images, out, *options):
    """Pack to 8 x 6 pixels in chunks of two images, so that a part has 32."""
    return main(["data", "pack", str(images), str(out), "--size", "8x6", "--chunk-mb", "0.0003", *options])


@pytest.mark.parametrize("codec", ["blosc2", "lzf", "gzip", "none"])
def test_pack_writes_each_image_with_its_label(images, tmp_path, codec, capsys):
    assert packed(images, tmp_path / "out.h5", "--codec", codec, "--json") == OK
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["shape"], result["chunk_rows"]) == (35, [6, 8, 3], 2)
    assert result["classes"] == list(CLASSES)
    with fastdp.HDF5Matrix(tmp_path / "out.h5", "images") as x, fastdp.HDF5Matrix(tmp_path / "out.h5", "labels") as y:
        numbers = x[:][:, 0, 0, 1].astype(int)
        assert sorted(numbers) == list(range(35))
        assert numbers.tolist() != sorted(numbers)
        np.testing.assert_array_equal(y[:], numbers % 3)
        for row, number in zip(x, numbers, strict=True):
            np.testing.assert_array_equal(row, load_image(images / CLASSES[number % 3] / f"{number:02}.png", 6, 8))
    assert not (tmp_path / "out.h5.parts").exists()


def test_pack_goes_on_after_an_interruption_and_gives_the_same_file(images, tmp_path, monkeypatch, capsys):
    done, real = [], pack.Packer.pack

    def interrupted(self, part):
        if done:
            raise KeyboardInterrupt
        real(self, part)
        done.append(part)

    monkeypatch.setattr(pack.Packer, "pack", interrupted)
    assert packed(images, tmp_path / "out.h5") == INTERRUPTED
    assert not (tmp_path / "out.h5").exists()
    monkeypatch.setattr(pack.Packer, "pack", lambda self, part: done.append(part) or real(self, part))
    assert packed(images, tmp_path / "out.h5") == OK
    assert done == [0, 1]
    assert "goes on after 32 images" in capsys.readouterr().err
    assert packed(images, tmp_path / "whole.h5") == OK
    with h5py.File(tmp_path / "out.h5") as out, h5py.File(tmp_path / "whole.h5") as whole:
        for name in ("images", "labels"):
            np.testing.assert_array_equal(out[name][:], whole[name][:], strict=True)


def test_parts_of_other_images_or_settings_are_not_taken_over(images, tmp_path):
    def begun(seed=0, **settings):
        settings = {"height": 6, "width": 8, "codec": "none", "chunk_nbytes": 300, **settings}
        packer = pack.Packer(list_images(images, seed), tmp_path / "out.h5", pack.PackSettings(**settings))
        return packer, packer.begin()

    packer, before = begun()
    assert before == 0
    packer.pack(0)
    assert begun()[1] == 32
    assert begun(seed=1)[1] == 0
    packer.begin()
    packer.pack(1)
    assert begun()[1] == 3
    assert begun(codec="gzip")[1] == 0


def test_a_broken_image_is_named_or_left_out(images, tmp_path, capsys):
    (images / "cat" / "00.png").write_bytes(b"no image")
    assert packed(images, tmp_path / "out.h5") == FAILED
    error = capsys.readouterr().err
    assert "00.png cannot be decoded" in error
    assert "--skip-broken" in error
    assert packed(images, tmp_path / "out.h5", "--skip-broken", "--json") == OK
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["skipped"]) == (34, ["cat/00.png"])
    with h5py.File(tmp_path / "out.h5") as file:
        assert sorted(file["images"][:, 0, 0, 1].tolist()) == list(range(1, 35))
        np.testing.assert_array_equal(file["labels"][:], file["images"][:, 0, 0, 1] % 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out.h5"], "is no folder of images"),
        (["images", "taken.h5"], "exists: pass another name"),
        (["images", "no/where/out.h5"], "does not exist: make it first"),
        (["empty", "out.h5"], "has no images"),
    ],
)
def test_wrong_arguments_of_pack_are_told_in_a_line(images, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.h5").touch()
    assert main(["data", "pack", *arguments]) == WRONG_USE
    assert message in capsys.readouterr().err


def test_images_without_subfolders_have_no_labels_and_mixed_folders_are_refused(images, tmp_path):
    assert list_images(images / "cat", None).labels is None
    Image.new("RGB", (4, 4)).save(images / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png"):
        list_images(images, None)


def test_bench_tells_how_a_file_is_read_and_what_other_layouts_would_give(tmp_path, capsys):
    path = tmp_path / "a.h5"
    array = np.random.default_rng(0).integers(0, 9, (400, 64, 64), np.uint8)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array, chunks=(50, 64, 64), compression="gzip")
        file["y"] = np.arange(400)
    arguments = ["data", "bench", str(path), "--batch", "100", "--seconds", "0.005"]
    assert main([*arguments, "--json"]) == OK
    x, y = json.loads(capsys.readouterr().out)["datasets"]
    assert (x["dataset"], x["rows"], x["row_nbytes"], y["dataset"]) == ("x", 400, 4096, "y")
    assert x["how"] == "by threads: 8 chunks of 50 rows, gzip"
    assert x["shares"]["decode"] > x["shares"]["copy"] >= 0
    assert [trial["layout"].split(",")[0] for trial in x["trials"]] == ["one piece", "lzf", "gzip", "blosc2", "zstd"]
    assert all(speed["rows_per_second"] > 0 for speed in x["speeds"] + y["speeds"])
    assert main([f"{arguments[2]}" if part == str(path) else part for part in arguments]) == OK
    text = capsys.readouterr().out
    assert "Where the time of one thread goes" in text
    assert "Fastest shuffled" in text


@pytest.mark.parametrize(
    ("file", "status", "message"),
    [
        ("none.h5", WRONG_USE, "there is no file"),
        ("a.h5:z", WRONG_USE, "it has 'x'"),
        ("text.h5", FAILED, "text.h5"),
        ("empty.h5", FAILED, "has no array of numbers"),
    ],
)
def test_files_that_bench_cannot_read_are_named(tmp_path, monkeypatch, capsys, file, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File("a.h5", "w") as made, h5py.File("empty.h5", "w"):
        made["x"] = np.arange(4)
    assert main(["data", "bench", file]) == status
    assert message in capsys.readouterr().err
