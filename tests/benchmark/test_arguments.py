"""The arguments of `fastdp bench`: which ways they ask for, and what is said of wrong ones."""

from __future__ import annotations

import argparse

import h5py
import pytest

import fastdp
from fastdp.benchmark import arguments
from fastdp.benchmark.arguments import settings_of
from fastdp.cli import bench
from fastdp.runtime.topology import DeviceInfo


@pytest.fixture(autouse=True)
def _no_devices(monkeypatch):
    monkeypatch.delenv("FASTDP_VIRTUAL_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fastdp.set_virtual_devices(0)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs that only exist in NVML's list."""
    monkeypatch.setattr(arguments, "devices", lambda: [DeviceInfo(i, f"card {i}", "cuda") for i in range(4)])


def asked(*line: str, framework: str = "torch"):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return settings_of(parser.parse_args(line), ["fastdp", "bench", *line], lambda target: framework)


def ways(*line: str):
    return [(way.library, way.devices, way.kind, way.mode) for way in asked(*line).ways]


def test_without_gpus_one_cpu_device_is_measured():
    settings = asked("mlp")
    assert ways("mlp") == [("fastdp", 1, "cpu", "auto")]
    assert (settings.batch, settings.precision, settings.data, settings.rounds) == (128, "float32", "synthetic", 5)
    assert settings.command == ["fastdp", "bench", "mlp"]
    assert "one CPU device is measured" in settings.note


def test_virtual_devices_by_name_and_as_they_are_set():
    assert asked("mlp", "--virtual", "1").note == ""
    assert ways("mlp", "--virtual", "1,2,4") == [("fastdp", count, "virtual", "auto") for count in (1, 2, 4)]
    fastdp.set_virtual_devices(4)
    assert ways("mlp", "--gpus", "1,4") == [("fastdp", count, "virtual", "auto") for count in (1, 4)]
    assert ways("mlp") == [("fastdp", count, "virtual", "auto") for count in (1, 4)]


def test_one_gpu_and_all_of_them_are_the_default(gpus):
    assert ways("mlp") == [("fastdp", 1, "gpu", "auto"), ("fastdp", 4, "gpu", "auto")]
    assert ways("mlp", "--gpus", "2", "--mode", "graph,eager") == [
        ("fastdp", 2, "gpu", "graph"),
        ("fastdp", 2, "gpu", "eager"),
    ]


def test_the_batch_is_the_global_one_unless_asked_by_device():
    assert [way.batch for way in asked("mlp", "--virtual", "1,4", "--batch", "32").ways] == [32, 32]
    assert [way.batch for way in asked("mlp", "--virtual", "1,4", "--batch", "32", "--per-device").ways] == [32, 128]
    assert asked("mlp", "--batch", "32", "--per-device", "--virtual", "2").with_batch(8).ways[0].batch == 16


def test_other_libraries_train_on_as_many_devices_as_they_can(gpus):
    found = ways("mlp", "--gpus", "1,4", "--mode", "eager,compiled", "--compare", "torch,ddp,keras,keras-jax")
    assert found[:4] == [("fastdp", count, "gpu", mode) for mode in ("eager", "compiled") for count in (1, 4)]
    assert found[4:] == [
        ("torch", 1, "gpu", "eager"),
        ("torch", 1, "gpu", "compiled"),
        ("ddp", 4, "gpu", "auto"),
        ("keras", 1, "gpu", "auto"),
        ("keras-jax", 1, "gpu", "auto"),
        ("keras-jax", 4, "gpu", "auto"),
    ]


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [("auto", ["eager"]), ("traced,compiled", ["eager", "compiled"]), ("graph", ["eager", "graph"])],
)
def test_plain_torch_runs_eagerly_and_in_the_modes_asked_for_that_it_has(gpus, modes, wanted):
    assert [way[3] for way in ways("mlp", "--mode", modes, "--compare", "torch") if way[0] == "torch"] == wanted


def test_built_in_models_come_in_the_form_of_each_library():
    settings = asked("mlp", "--virtual", "2", "--compare", "ddp,keras", "--framework", "keras")
    assert [(way.library, way.framework, way.kind) for way in settings.ways] == [
        ("fastdp", "keras", "virtual"),
        ("ddp", "torch", "cpu"),
        ("keras", "keras", "cpu"),
    ]


def test_files_get_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text("")
    (tmp_path / "m.keras").write_text("")
    h5py.File(tmp_path / "d.h5", "w").close()
    settings = asked("m.py:f", "--data", "d.h5:a,b")
    assert (settings.target, settings.name, settings.framework) == (f"{tmp_path}/m.py:f", "m.py:f", "torch")
    assert settings.data == f"{tmp_path}/d.h5:a,b"
    assert asked("m.keras").framework == "keras"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["resnet9000"], r"`resnet9000` is neither a built-in model \(mlp.*nor file\.py:function"),
        (["no.keras"], r"`no\.keras`: there is no file /.*no\.keras"),
        (["no.py:f"], r"`no\.py:f`: there is no file"),
        (["mlp", "--gpus", "2"], r"`--gpus 2`: this machine has no visible NVIDIA GPU.*--virtual 2"),
        (["mlp", "--gpus", "two"], r"`--gpus` must be counts.*such as 1,2,4. Received: 'two'"),
        (["mlp", "--virtual", "0"], r"`--virtual` must be counts.*Received: '0'"),
        (["mlp", "--virtual", "1", "--gpus", "1"], "exclude each other"),
        (["mlp", "--mode", "fast"], r"`--mode` must be some of auto,eager.*Received: 'fast'"),
        (["mlp", "--mode", "graph"], "none without GPUs"),
        (["mlp", "--compare", "fastdp"], r"`--compare` must be some of torch,ddp.*Received: 'fastdp'"),
        (["mlp", "--data", "no.h5"], r"`--data no\.h5`: there is no file .*no\.h5"),
    ],
)
def test_a_wrong_argument_is_named_with_the_remedy(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        asked(*line)


def test_more_gpus_than_there_are(gpus):
    with pytest.raises(ValueError, match="`--gpus 8`: this machine has 4"):
        asked("mlp", "--gpus", "8")
