"""tests/shared/warm_python.py: a copy of a process is what a process of its own would be."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest
import warm_python
from warm_python import WarmPython


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    made = WarmPython(["decimal"], os.environ, tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


def test_a_program_has_its_arguments_environment_outputs_and_the_libraries(warm) -> None:
    program = "import os, sys\nprint(sys.argv, __name__, os.environ['A'], 'decimal' in sys.modules)"
    done = warm.run(["-c", program + "\nprint('e', file=sys.stderr)\nsys.exit(3)", "x"], {**os.environ, "A": "b"}, 60.0)
    assert (done.returncode, done.stderr) == (3, "e\n")
    assert done.stdout == "['-c', 'x'] __main__ b True\n"
    again = warm.run(["-c", "import os\nprint('A' in os.environ, 'x' in globals())\nx = 1"], os.environ, 60.0)
    assert (again.returncode, again.stdout, again.stderr) == (0, "False False\n", "")


def test_a_program_ends_as_any_does_after_its_threads_and_with_its_error(warm) -> None:
    program = "import atexit, threading, time\natexit.register(print, 'end')\n"
    program += "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n1 / 0"
    done = warm.run(["-c", program], os.environ, 60.0)
    assert (done.returncode, done.stdout) == (1, "thread\nend\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert warm.run(["-c", "import os; os.abort()"], os.environ, 60.0).returncode == -6


def test_a_module_runs_by_its_name(warm) -> None:
    done = warm.run(["-m", "calendar", "2024", "2"], os.environ, 60.0)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["February", "2024"])


def test_a_script_runs_by_its_path_from_a_folder_of_its_own(warm, tmp_path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").write_text("word = 'found'")
    text = "import os, sys, neighbour\nprint(neighbour.word, sys.argv, __name__, __file__, os.getcwd())\n"
    (tmp_path / "scripts" / "show.py").write_text(text + "print(sys.modules['__main__'].neighbour.word)\n1 / 0")
    done = warm.run(["scripts/show.py", "-m"], os.environ, 60.0, folder=tmp_path)
    assert done.stdout == f"found ['scripts/show.py', '-m'] __main__ scripts/show.py {tmp_path}\nfound\n"
    assert 'scripts/show.py", line 4, in <module>\n    1 / 0\n' in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert warm.run(["-c", "import os; print(os.getcwd())"], os.environ, 60.0).stdout != f"{tmp_path}\n"


def test_a_program_that_is_late_is_killed_and_what_it_said_is_told(warm) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as late:
        warm.run(["-c", "import time; print('x', flush=True); time.sleep(600)"], os.environ, 2.0)
    assert late.value.stdout == b"x\n"
    assert warm.run(["-c", "print('next')"], os.environ, 60.0).stdout == "next\n"


def test_the_status_of_a_program_that_ended_before_anybody_asked_is_not_waited_for(warm, monkeypatch) -> None:
    answer = WarmPython._answer

    def late(self: WarmPython, seconds: float) -> int:
        time.sleep(3.0)  # both answers have come by now
        return answer(self, seconds)

    monkeypatch.setattr(WarmPython, "_answer", late)
    assert warm.run(["-c", "print('quick')"], os.environ, 5.0).stdout == "quick\n"


def test_a_process_that_loads_for_too_long_is_begun_anew(monkeypatch, tmp_path) -> None:
    (tmp_path / "slow.py").write_text("import os, time\ntime.sleep(0 if os.path.exists('quick') else 600)")
    made = WarmPython(["slow"], {**os.environ, "PYTHONPATH": str(tmp_path)}, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(warm_python, "LOAD_SECONDS", 0.2)
        with pytest.raises(subprocess.TimeoutExpired):
            made.run(["-c", "print('x')"], os.environ, 60.0)
    (tmp_path / "quick").touch()
    assert made.run(["-c", "print('next')"], os.environ, 60.0).stdout == "next\n"
    made.close()


def test_where_other_programs_use_the_cores_one_is_waited_for_longer(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, seconds in ((0.5, 10.0), (4.0, 20.0), (40.0, 30.0)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert warm_python.patient(10.0) == seconds
