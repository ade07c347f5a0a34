"""NVRTC compiles every kernel for every architecture it knows, and the cache keeps what it made.

Needs an NVRTC library, for instance of the wheel nvidia-cuda-nvrtc-cu12 (the last to know sm_70); no GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastdp import private_files
from fastdp.launch import Kernels, cubin, nvrtc
from fastdp.launch.args import ConcatRowsArgs

ARCHITECTURES = (70, 75, 80, 86, 90, 100, 120)
ELF = b"\x7fELF"


@pytest.fixture(scope="module")
def compilers() -> list[nvrtc.Nvrtc]:
    """Every NVRTC of this machine that loads."""
    found = []
    for path in nvrtc.find_libraries():
        try:
            found.append(nvrtc.Nvrtc(path))
        except OSError as error:
            warnings.warn(f"{path} does not load: {error}", RuntimeWarning, stacklevel=1)
    if not found:
        pytest.skip("no NVRTC library here: pip install nvidia-cuda-nvrtc-cu12")
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path / "cache"))
    cubin._warn_without_cache.cache_clear()
    return tmp_path / "cache" / "kernels"


def with_checksum(code: bytes) -> bytes:
    return hashlib.sha256(code).digest() + code


def entries(name: str) -> list[str]:
    """The kernels that a file defines, from its text."""
    text = (cubin.kernel_folder() / f"{name}.cu").read_text()
    found = re.findall(r"^FASTDP_KERNEL\((\w+)", text, re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", cubin.kernel_names())
def test_every_kernel_compiles_to_machine_code(compilers, cache, name, architecture):
    able = [compiler for compiler in compilers if architecture in compiler.architectures]
    if not able:
        versions = ", ".join("{}.{}".format(*compiler.version) for compiler in compilers)
        pytest.skip(f"no NVRTC here compiles for sm_{architecture} (found CUDA {versions})")
    code = cubin.cubin(name, architecture, able[-1])
    assert code.startswith(ELF)
    assert [entry for entry in entries(name) if entry.encode() not in code] == []


def test_the_second_request_is_read_from_the_cache(compilers, cache):
    architecture = compilers[0].architectures[-1]
    first = cubin.cubin("concat_rows", architecture, compilers[0])
    (file,) = cache.iterdir()
    file.write_bytes(with_checksum(b"from the cache"))
    assert cubin.cubin("concat_rows", architecture, compilers[0]) == b"from the cache" != first


@pytest.mark.parametrize("fault", ["empty", "cut", "changed", "linked", "pipe", "others may write", "of another user"])
def test_a_cached_file_that_is_not_whole_and_ones_own_is_compiled_anew(compilers, cache, fault, tmp_path, monkeypatch):
    architecture = compilers[0].architectures[-1]
    code = cubin.cubin("concat_rows", architecture, compilers[0])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    contents = {"empty": b"", "cut": whole[:-1], "changed": whole[:-1] + bytes([whole[-1] ^ 1])}
    file.write_bytes(contents.get(fault, with_checksum(b"planted")))
    if fault == "linked":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif fault == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif fault == "others may write":
        file.chmod(0o666)
    elif fault == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.warns(RuntimeWarning, match="belongs to another user"):
            assert cubin.cubin("concat_rows", architecture, compilers[0]) == code
        return
    assert cubin.cubin("concat_rows", architecture, compilers[0]) == code
    assert file.read_bytes() == whole
    assert file.stat().st_mode & 0o777 == 0o600
    assert not file.is_symlink()


def test_other_options_architectures_and_sources_have_other_files(compilers, cache, monkeypatch, tmp_path):
    compiler = compilers[0]
    for architecture in compiler.architectures[-2:]:
        cubin.cubin("concat_rows", architecture, compiler)
    monkeypatch.setattr(cubin, "OPTIONS", (*cubin.OPTIONS, "--use_fast_math"))
    cubin.cubin("concat_rows", compiler.architectures[-1], compiler)
    folder = tmp_path / "kernels"
    folder.mkdir()
    for path in cubin.kernel_folder().iterdir():
        (folder / path.name).write_text(path.read_text() + ("// changed\n" if path.suffix == ".cuh" else ""))
    monkeypatch.setattr(cubin, "kernel_folder", lambda: folder)
    cubin.cubin("concat_rows", compiler.architectures[-1], compiler)
    assert len(list(cache.iterdir())) == 4
    assert all(path.suffix == ".cubin" for path in cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named_once_and_the_code_is_still_compiled(compilers, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    architecture = compilers[0].architectures[-1]
    with pytest.warns(RuntimeWarning, match="FASTDP_CACHE_DIR") as caught:
        assert cubin.cubin("concat_rows", architecture, compilers[0]).startswith(ELF)
    assert caught
    assert cubin.cubin("concat_rows", architecture, compilers[0]).startswith(ELF)


def test_an_architecture_that_the_compiler_does_not_know_is_refused(compilers, cache):
    with pytest.raises(ValueError, match="architecture=sm_35 is not among those of NVRTC"):
        cubin.cubin("concat_rows", 35, compilers[0])


def test_a_mistake_in_the_source_is_reported_with_its_place(compilers):
    with pytest.raises(nvrtc.NvrtcError, match=r"bad\.cu\(1\)"):
        compilers[0].compile("int f( {", name="bad.cu")


def test_a_compiler_newer_than_the_driver_is_passed_over(compilers):
    with pytest.raises(nvrtc.NvrtcNotFoundError, match=r"too new.*pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc.load(newest_major=min(compiler.version[0] for compiler in compilers) - 1)
    oldest = min(compiler.version[0] for compiler in compilers)
    assert nvrtc.load(newest_major=oldest).version[0] == oldest


KNOWN = {
    "a": ((12, 4), (70, 90)),
    "b": ((12, 9), (70, 90, 120)),
    "c": ((13, 0), (75, 90, 120)),
    "d": ((12, 9), (70, 90)),
}


@pytest.mark.parametrize(
    ("driver", "card", "chosen"),
    [(12, 90, "b"), (12, 70, "b"), (13, 90, "c"), (13, 70, "b"), (13, 120, "c"), (12, 120, "b"), (None, None, "c")],
)
def test_the_newest_compiler_that_knows_the_card_is_taken_wherever_it_was_found(monkeypatch, driver, card, chosen):
    class Library:
        def __init__(self, path):
            self.path = path
            self.version, self.architectures = KNOWN[path.name]

    monkeypatch.setattr(nvrtc, "find_libraries", lambda: [Path(name) for name in KNOWN])
    monkeypatch.setattr(nvrtc, "Nvrtc", Library)
    nvrtc.load.cache_clear()
    assert nvrtc.load(driver, card).path.name == chosen
    with pytest.raises(nvrtc.NvrtcNotFoundError, match=r"for CUDA 12 or older that knows sm_75; .*does not know sm_75"):
        nvrtc.load(12, 75)
    nvrtc.load.cache_clear()


def test_kernels_are_compiled_when_first_launched_and_once(compilers, cache):
    class Recorder:
        def __init__(self):
            self.loaded, self.launched = [], []

        def load(self, code):
            self.loaded.append(code)
            return len(self.loaded)

        def function(self, module, name):
            return module, name

        def launch(self, function, grid, block, args, stream):
            self.launched.append((function, grid, block, stream))

    recorder, architecture = Recorder(), compilers[0].architectures[-1]
    kernels = Kernels(recorder, architecture, 132, lambda file, arch: cubin.cubin(file, arch, compilers[0]))
    for stream in (7, 8):
        kernels.launch("concat_rows", "concat_rows", 3, ConcatRowsArgs(), stream)
    assert [code[:4] for code in recorder.loaded] == [ELF]
    assert recorder.launched == [((1, "concat_rows"), 3, 256, 7), ((1, "concat_rows"), 3, 256, 8)]


def test_the_cache_folder_follows_the_variable_then_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path))
    assert private_files.cache_folder() == tmp_path
    monkeypatch.delenv("FASTDP_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert private_files.cache_folder() == tmp_path / "xdg" / "fastdp"


def test_without_a_library_the_error_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(nvrtc, "find_libraries", list)
    nvrtc.load.cache_clear()
    with pytest.raises(nvrtc.NvrtcNotFoundError, match="found: none; install the pip wheel"):
        nvrtc.load()
    nvrtc.load.cache_clear()


def test_importing_the_launcher_and_the_twins_loads_no_cupy_and_no_compiler():
    """In a fresh process: only runtime/cuda/cupy_api.py and cupy_nccl.py import CuPy."""
    code = "import sys, fastdp.launch, fastdp.launch.reference; print(sorted(m for m in sys.modules if 'cupy' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
