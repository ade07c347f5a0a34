"""What compiles steps, and what it made, is the user's own: no planted module, no guessable folder, no others' file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch._inductor import cpu_vec_isa
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp import private_files
from fastdp.capture.compile import compiler, isolation
from fastdp.capture.compile import worker as compile_worker

WAIT = 240.0


@pytest.fixture(autouse=True)
def _variable(monkeypatch):
    monkeypatch.delenv(isolation.INDUCTOR_CACHE, raising=False)
    yield
    os.environ.pop(isolation.INDUCTOR_CACHE, None)


def test_a_worker_looks_for_modules_nowhere_but_where_libraries_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "relative", *sys.path, str(tmp_path / "libraries")])
    path = isolation.search_path()
    assert not {"", "relative", str(tmp_path)} & set(path)
    assert str(tmp_path / "libraries") in path
    modules = ((os, 0), (fastdp, 1), (torch, 1))
    standard, own, torchs = (path.index(str(Path(one.__file__).parents[n])) for one, n in modules)
    assert standard < own <= torchs < path.index(str(tmp_path / "libraries"))


def test_neither_planted_modules_nor_the_guessable_cache_reach_compiled_steps(tmp_path):
    """Planted in the current folder; torch's folder among temporary files is made by torch itself, and stays empty."""
    for name in ("shutil", "sympy", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'planted')!r}, 'w').close()\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        f"import os, sys; sys.path[:] = [p for p in sys.path if p]; os.chdir({str(tmp_path)!r})\n"
        "import torch; from torch.fx.experimental.proxy_tensor import make_fx\n"
        "from fastdp.capture.compile.compiler import BackgroundCompiler\n"
        "os.environ['PYTHONPATH'] = ''\n"
        "import time; c = BackgroundCompiler()\n"
        "j = c.submit(make_fx(lambda a: [a + 1.0], tracing_mode='fake')(torch.ones(3)), 1)\n"
        "while not c.done(j): c.set_niceness(0); time.sleep(0.05)  # as in `wait_compiled`\n"
        "print(c.result(j)(torch.ones(3))[0].tolist(), os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
    )
    own = str(Path(fastdp.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": own},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    folder = private_files.cache_folder() / isolation.FOLDER
    assert done.stdout == f"[2.0, 2.0, 2.0] {folder}\n", done.stderr
    assert not (tmp_path / "planted").exists()
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
    assert folder.stat().st_mode & 0o777 == 0o700


def test_torchs_guessable_folder_does_not_count_as_chosen_and_another_one_does(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path))
    for value in ("", os.path.join(tempfile.gettempdir(), "torchinductor_me")):
        monkeypatch.setenv(isolation.INDUCTOR_CACHE, value)
        assert isolation.use_cache() == os.environ[isolation.INDUCTOR_CACHE] == str(tmp_path / isolation.FOLDER)
    monkeypatch.setenv(isolation.INDUCTOR_CACHE, str(tmp_path / "chosen"))
    assert isolation.use_cache() == str(tmp_path / "chosen")


@pytest.mark.parametrize("fault", ["linked", "others may write", "above it others may write"])
def test_a_cache_that_is_not_private_is_not_used_and_a_warning_names_it(fault, monkeypatch, tmp_path):
    isolation._temporary.cache_clear()
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / isolation.FOLDER
    folder.mkdir(parents=True)
    if fault == "linked":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder if fault == "others may write" else folder.parent).chmod(0o777)
    with pytest.warns(UserWarning, match=rf"compiled steps in {folder} \(.*FASTDP_CACHE_DIR"):
        used = isolation.cache()
    assert used.parent == Path(tempfile.gettempdir())
    assert used.stat().st_mode & 0o777 == 0o700
    isolation._remove(used, os.getpid())
    isolation._temporary.cache_clear()


def test_a_graph_that_another_could_have_written_is_not_read(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "graph").write_bytes(b"anything")
    (tmp_path / "graph").chmod(0o666)
    with pytest.raises(PermissionError, match="must be a file of this user's own"):
        compile_worker._compiled(str(tmp_path / "graph"), {})


@pytest.mark.skipif(compiler.missing_compiler() is not None, reason="no C++ compiler")
def test_a_worker_tries_no_instructions_that_this_process_has_tried(tmp_path, monkeypatch):
    """Each try is a process that loads a compiled test: six of them for a CPU with AVX-512."""
    notes = f"""
import sys
note = open({str(tmp_path / "started")!r}, "a")
sys.addaudithook(lambda event, about: event == "subprocess.Popen" and print(about[1], file=note, flush=True))
import atexit
def end():
    import torch._inductor.cpu_vec_isa as one
    print("PICKED", one.pick_vec_isa(), [*map(str, one.valid_vec_isa_list())], file=note, flush=True)
atexit.register(end)
"""
    program = isolation._PROGRAM
    monkeypatch.setattr(isolation, "_PROGRAM", notes.replace("{", "{{").replace("}", "}}") + program)
    background = compiler.BackgroundCompiler()
    background.prepare()
    compiler._readying().join(WAIT)
    module = make_fx(lambda a: [torch.tanh(a) + time.time()], tracing_mode="fake")(torch.ones(64))  # in no cache
    job = background.submit(module, 1)
    began = time.monotonic()
    while not background.done(job) and time.monotonic() - began < WAIT:
        background.set_niceness(0)
        time.sleep(0.05)
    background.result(job)
    said = (tmp_path / "started").read_text()
    assert ".cpp" in said  # it has compiled
    assert "LoadLibrary" not in said
    picked = f"PICKED {cpu_vec_isa.pick_vec_isa()} {[str(one) for one in cpu_vec_isa.valid_vec_isa_list()]}"
    assert picked in said


def test_instructions_whose_names_say_too_little_are_tried_in_each_process(monkeypatch):
    tries = cpu_vec_isa.valid_vec_isa_list
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", tries)
    for names in (None, ["asimd"], ["those of a later torch"]):
        isolation.keep_instruction_sets(names)
        assert cpu_vec_isa.valid_vec_isa_list is tries
    isolation.keep_instruction_sets([])
    assert cpu_vec_isa.valid_vec_isa_list() == []
