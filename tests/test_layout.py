"""The layers of fastdp: who may import whom, which libraries stay where, and how long a file may grow."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import packages
import pytest

# Prefixes of files that may import a named part of a lower folder only: the engine drives any program, so it
# knows their base class and none of the programs.
ONLY_FROM = {
    "engine/": ("program/", ("program/__init__.py", "program/base.py")),
    "program/keras/": ("program/torch/", ()),  # what both need is in tensors/
}

# Where an optional library may be imported. Elsewhere fastdp must work without it.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("benchmark/", "capture/", "keras/", "program/keras/", "program/torch/", "tensors/", "torch/"),
    "keras": ("benchmark/", "keras/", "program/keras/"),
    "cupy": ("runtime/cuda/cupy_api.py", "runtime/cuda/cupy_nccl.py", "runtime/cuda/cupy_timing.py"),
    "cupyx": (),
    "cupy_backends": (),
}

# Files that may name an optional library for type checkers, under `if TYPE_CHECKING:`, where nothing is imported.
TYPES_ONLY: dict[str, tuple[str, ...]] = {
    "replica.py": ("torch",),  # loaded when it is asked for, with the collectives of tensors/
    "api.py": ("torch",),  # what `fastdp.wrap` returns depends on the class of the model
}

# Prefixes of files that may load a part of fastdp later than at import, by importlib.import_module.
LATE_LOADERS: dict[str, str] = {
    "__init__.py": "names of Keras and torch load on first use, so that `import fastdp` works without them",
    "backend.py": "Keras 2's `K.function` keeps its name, and `import fastdp` works without Keras",
    "comm/select.py": "the collectives of GPUs need CuPy, which is there where GPUs are",
    "engine/across.py": "torch.distributed connects processes, and is there where torchrun is",
    "runtime/select.py": "the GPUs' device layer needs CuPy, which is there where GPUs are",
    "placement.py": "places are noted on Keras models only, so Keras is loaded when the first is",
    "api.py": "the model's own library decides which side is loaded",
    "checkpoint/": "tensors are copied where torch is there, and runs of NumPy functions work without it",
    "benchmark/": "a model's own library decides which side is loaded, in the worker processes alone",
    "cli/": "a command loads when it is asked for, so that `devices` and `plan` work without Keras and torch",
}

MODULE_LINES = 400
FUNCTION_LINES = 80  # without the docstring


class Import(NamedTuple):
    """One imported name: dotted, absolute; `inside` where it stands in a function, `typed` under TYPE_CHECKING."""

    name: str
    line: int
    inside: bool
    late: bool
    typed: bool


def _resolve(module: str | None, level: int, file: str) -> str:
    """The absolute name of the module in `from <dots><module> import`, in the file at this path."""
    if not level:
        return module or ""
    folder = ("fastdp", *Path(file).parts[:-1])
    base = folder[: len(folder) - level + 1]
    return ".".join((*base, module) if module else base)


def _imports(tree: ast.AST, file: str, inside: bool = False, typed: bool = False) -> Iterator[Import]:
    """All imports of a module; a `from` import gives one for each name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside, False, typed)
        elif isinstance(node, ast.ImportFrom):
            module = _resolve(node.module, node.level, file)
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, inside, False, typed)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "fastdp"
            yield Import(str(name), node.lineno, inside, True, typed)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imports(ast.Module(node.body, []), file, inside, True)
            yield from _imports(ast.Module(node.orelse, []), file, inside, typed)
            continue
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(node, file, inside or function, typed)


def _target(name: str, files: set[str]) -> str | None:
    """The file inside fastdp/ that a dotted name comes from: a module, or the package that defines it."""
    parts = name.split(".")[1:]
    for end in range(len(parts), -1, -1):
        stem = "/".join(parts[:end])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if candidate in files:
                return candidate
    return None


def _is_shared(index: int) -> bool:
    """Whether files of this layer may import each other."""
    layer = packages.LAYERS[index]
    return len(layer) > 1 or not layer[0].endswith(".py")


def _forbidden(file: str, target: str) -> str | None:
    """Why `file` may not import `target`; None where it may."""
    if target == file:
        return None
    mine, theirs = packages.layer_of(file), packages.layer_of(target)
    if mine is None or theirs is None:
        return None  # reported on its own by the check of every file's layer
    if theirs > mine or (theirs == mine and not _is_shared(mine)):
        return f"imports {target}, which is not in a lower layer"
    for start, (folder, allowed) in ONLY_FROM.items():
        if file.startswith(start) and target.startswith(folder) and target not in allowed:
            known = f"{' and '.join(allowed)} only" if allowed else "nothing"
            return f"imports {target}; of {folder} it may know {known}"
    return None


def _library_problem(file: str, library: str, typed: bool) -> str | None:
    homes = LIBRARIES.get(library)
    if homes is None or file.startswith(homes) or (typed and library in TYPES_ONLY.get(file, ())):
        return None
    return f"imports {library}, which only {', '.join(homes) or 'nobody'} may"


def violations(file: str, source: str, files: set[str]) -> list[str]:
    """What a module's imports break, one line each; empty where all is well.

    Args:
        file: its path inside fastdp/, with forward slashes.
        source: its text.
        files: the paths of all modules inside fastdp/, `file` among them.
    """
    if packages.layer_of(file) is None:
        return [f"fastdp/{file} is in no layer: add it to LAYERS in tests/shared/packages.py"]
    found = []
    for name, line, inside, late, typed in _imports(ast.parse(source), file):
        top = name.split(".")[0]
        problems = [_library_problem(file, top, typed)]
        if top == "fastdp":
            target = _target(name, files)
            if late and not file.startswith(tuple(LATE_LOADERS)):
                problems.append(f"loads {name} by a call: only files in LATE_LOADERS may")
            elif inside and not late:
                problems.append(f"imports {name} inside a function")
            if target is not None and not late:
                problems.append(_forbidden(file, target))
        found += [f"fastdp/{file}:{line} {problem}" for problem in problems if problem]
    return sorted(set(found))


def _long_parts(file: str, source: str) -> list[str]:
    """The module and its functions where they are longer than a reader can hold."""
    found = []
    lines = len(source.splitlines())
    if lines > MODULE_LINES:
        found.append(f"fastdp/{file} has {lines} lines, at most {MODULE_LINES}: split it by notion")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= node.body[0].end_lineno - node.body[0].lineno + 1
        if length > FUNCTION_LINES:
            found.append(f"fastdp/{file}:{node.lineno} {node.name} has {length} lines, at most {FUNCTION_LINES}")
    return found


MODULES = packages.modules()


def test_there_are_modules_to_check():
    assert "_version.py" in MODULES


@pytest.mark.parametrize("file", MODULES)
def test_a_module_imports_only_what_its_layer_may_know(file):
    assert violations(file, MODULES[file], set(MODULES)) == []


@pytest.mark.parametrize("file", MODULES)
def test_modules_and_functions_are_short_enough_to_read(file):
    assert _long_parts(file, MODULES[file]) == []


FILES = {
    "__init__.py",
    "_version.py",
    "errors.py",
    "shard.py",
    "backend.py",
    "runtime/base.py",
    "runtime/cuda/cupy_api.py",
    "runtime/host/device.py",
    "runtime/select.py",
    "launch/args.py",
    "buffers.py",
    "program/__init__.py",
    "program/base.py",
    "program/functions.py",
    "program/torch/program.py",
    "program/keras/program.py",
    "capture/steps.py",
    "engine/replicas.py",
    "engine/data_parallel.py",
    "keras/__init__.py",
    "keras/parallel_model.py",
    "cli/__init__.py",
    "cli/demo/__init__.py",
}


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        (
            "shard.py",
            "import fastdp.engine.data_parallel",
            "imports engine/data_parallel.py, which is not in a lower layer",
        ),
        (
            "shard.py",
            "from fastdp.engine import data_parallel",
            "imports engine/data_parallel.py, which is not in a lower layer",
        ),
        ("shard.py", "from fastdp.engine.data_parallel import Engine", "imports engine/data_parallel.py"),
        ("shard.py", "from .engine import data_parallel", "imports engine/data_parallel.py"),
        ("runtime/host/device.py", "from ..select import resolve", "imports runtime/select.py"),
        ("engine/data_parallel.py", "import fastdp", "imports __init__.py"),
        ("engine/data_parallel.py", "from fastdp.program.torch.program import TorchProgram", "program/base.py only"),
        ("engine/replicas.py", "from fastdp.program import functions", "program/base.py only"),
        (
            "program/keras/program.py",
            "from fastdp.program.torch.program import TorchProgram",
            "of program/torch/ it may know nothing",
        ),
        ("program/base.py", "from .functions import Program", "imports program/functions.py"),
        ("program/__init__.py", "from fastdp.program.torch.program import Program", "imports program/torch/program.py"),
        ("engine/data_parallel.py", "def f():\n    from fastdp import shard", "inside a function"),
        ("engine/data_parallel.py", "class A:\n    def f(self):\n        import fastdp.shard", "inside a function"),
        ("engine/data_parallel.py", "f = lambda: importlib.import_module('fastdp.shard')", "by a call"),
        ("engine/data_parallel.py", "import torch.nn as nn", "imports torch"),
        ("engine/replicas.py", "def f():\n    from keras import ops", "imports keras"),
        ("program/functions.py", "try:\n    import cupy\nexcept ImportError:\n    cupy = None", "imports cupy"),
        ("capture/steps.py", "import keras", "imports keras"),
        ("capture/steps.py", "from fastdp.program.base import Program", "imports program/base.py"),
        ("capture/steps.py", "from fastdp.program.keras.program import KerasProgram", "not in a lower layer"),
        ("launch/nvrtc.py", "import cupy", "imports cupy"),
        ("runtime/cuda/memory.py", "import cupy", "imports cupy"),
        ("runtime/cuda/cupy_api.py", "from cupy_backends.cuda.libs import nvrtc", "imports cupy_backends"),
        ("engine/data_parallel.py", "importlib.import_module('torch')", "imports torch"),
        ("api.py", "import torch", "imports torch"),
        ("api.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "imports torch"),
        ("api.py", "if TYPE_CHECKING:\n    import keras", "imports keras"),
        ("engine/data_parallel.py", "if TYPE_CHECKING:\n    import torch", "imports torch"),
        ("shard.py", "if TYPE_CHECKING:\n    import fastdp.buffers", "imports buffers.py"),
        ("helpers.py", "", "add it to LAYERS"),
    ],
)
def test_a_planted_violation_is_found(file, source, said):
    found = violations(file, source, FILES | {file})
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "engine/data_parallel.py",
            "import torchlike\nfrom fastdp.shard import Rows\nfrom fastdp.program import base",
        ),
        ("runtime/cuda/cupy_api.py", "import cupy\nfrom cupy.cuda import nccl\nfrom ..base import Work"),
        ("capture/steps.py", "import torch\nfrom fastdp.shard import Rows"),
        (
            "keras/parallel_model.py",
            "import keras\nfrom fastdp.engine.data_parallel import DataParallel\nfrom . import utils",
        ),
        (
            "__init__.py",
            "from fastdp import _version\ndef f():\n    import_module('fastdp.keras')",
        ),
        ("cli/demo/__init__.py", "from fastdp.keras.parallel_model import ParallelModel"),
        ("api.py", "if TYPE_CHECKING:\n    import torch\n    from fastdp.keras.parallel_model import ParallelModel"),
    ],
)
def test_an_import_that_the_layers_allow_passes(file, source):
    assert violations(file, source, FILES) == []


@pytest.mark.parametrize("file", MODULES)
def test_the_first_line_of_a_module_says_in_a_sentence_what_it_is_for(file):
    said = packages.sentence_of(MODULES[file])
    assert re.fullmatch(r"[A-Z`].{20,110}\.", said), f"fastdp/{file} begins with {said!r}: write one sentence"


def test_the_lists_of_packages_in_the_pages_are_those_of_the_code():
    for path, name, block in packages.blocks(MODULES):
        text = path.read_text("utf-8")
        assert packages.placed(text, name, block) == text, f"`make modules` writes the list in {path.name}"
    page = packages.ROOT / "docs" / "modules.md"
    assert page.read_text("utf-8") == packages.page(MODULES), "`make modules` writes docs/modules.md"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_the_files_that_a_page_names_exist(page):
    text = (packages.ROOT / page).read_text("utf-8")
    names = set(re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", text))
    assert len(names) >= 3
    missing = [name for name in sorted(names) if not _exists(name)]
    assert missing == [], f"{page} names files that are not there"


def _exists(name):
    """Whether a path is one of the checkout's, or of the package's, whole or from one of its folders on."""
    files = [*MODULES, *(f"{Path(file).parent.as_posix()}/" for file in MODULES)]
    return (packages.ROOT / name).exists() or any(f"/{file}".endswith(f"/{name}") for file in files)


def test_a_page_without_a_place_for_a_list_is_an_error():
    with pytest.raises(ValueError, match="no place for the list 'packages'"):
        packages.placed("<!-- packages -->", "packages", "    api.py")


def test_a_long_module_and_a_long_function_are_found():
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert _long_parts("a.py", f"def f():\n{body}\n") == ["fastdp/a.py:1 f has 81 lines, at most 80"]
    assert _long_parts("a.py", f'def f():\n    """One\n    two."""\n{body[10:]}\n') == []
    assert _long_parts("a.py", "x = 1\n" * 401) == ["fastdp/a.py has 401 lines, at most 400: split it by notion"]
