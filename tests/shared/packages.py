"""The packages of fastdp in their import order: the one list that the layout test, CONTRIBUTING, docs/design.md
and docs/modules.md go by. Run as a program it writes the lists in those pages (`make modules`).
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastdp"

# From the lowest layer to the highest, as path prefixes inside fastdp/. A file belongs to the layer of the longest
# prefix that fits. A file imports only from lower layers, or from its own layer where that is a folder or has several
# prefixes.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version.py",),
    ("errors.py", "warn.py", "options.py", "patching.py", "settings.py", "private_files.py"),
    ("shard.py",),
    ("bfloat16.py",),
    ("buffers.py",),
    ("rendering/",),
    ("launch/",),
    ("launch/reference.py",),
    ("tracing/__init__.py", "tracing/protocols.py", "tracing/spans.py"),
    ("tracing/",),
    ("runtime/",),
    ("runtime/host/",),
    ("runtime/topology.py",),
    ("runtime/select.py",),
    ("runtime/cuda/",),
    ("runtime/shards.py",),
    ("runtime/roster.py",),
    ("comm/",),
    ("comm/host/",),
    ("comm/cuda/",),
    ("comm/select.py",),
    ("tensors/",),
    ("replica.py",),
    ("capture/",),
    ("data/",),
    ("checkpoint/",),
    ("program/__init__.py",),  # runs before any module of its folder: alone, so that it cannot pull torch in
    ("program/base.py",),
    ("program/functions.py",),
    ("program/torch/",),
    ("program/keras/",),
    ("engine/interrupts.py", "engine/timing.py", "engine/home.py", "engine/step_lock.py"),
    ("engine/replicas.py",),
    ("engine/across.py",),
    ("engine/accumulation.py", "engine/rollback.py", "engine/fingerprint.py"),
    ("engine/step.py",),
    ("engine/replica_work.py",),
    ("engine/nonfinite.py",),
    ("engine/reductions.py", "engine/updates.py", "engine/state.py"),
    ("engine/recovery.py",),
    ("engine/step_scope.py", "engine/host_launch.py"),
    ("engine/waiting_gradients.py", "engine/inspection.py", "engine/survival.py"),
    ("engine/report.py",),
    ("engine/make_report.py",),
    ("engine/data_parallel.py",),
    ("engine/__init__.py",),
    ("monitoring/",),
    ("keras/",),
    ("torch/",),
    ("placement.py",),
    ("api.py",),
    ("utils.py",),
    ("callbacks.py",),
    ("backend.py",),
    ("benchmark/",),
    ("cli/",),
    ("__init__.py",),
    ("__main__.py",),  # `python -m fastdp`: above everything, nothing imports it
)

_WIDTH = 120


def modules() -> dict[str, str]:
    """Path inside fastdp/ and text of every module, sorted by path."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(file: str) -> int | None:
    """The number of the layer whose longest prefix fits a path inside fastdp/; None where no prefix does."""
    fits = [(len(prefix), number) for number, layer in enumerate(LAYERS) for prefix in layer if file.startswith(prefix)]
    return max(fits)[1] if fits else None


def sentence_of(source: str) -> str:
    """The first line of a module's docstring: what the module is for."""
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def entries(sources: dict[str, str]) -> list[str]:
    """Packages (with a slash at the end) and top-level modules in import order, each package before those inside it."""
    folders = {f"{file.rpartition('/')[0]}/" for file in sources if "/" in file}
    tops = dict.fromkeys(prefix.split("/")[0] for layer in LAYERS for prefix in layer)
    found: list[str] = []
    for top in tops:
        inside = [folder for folder in folders if folder.startswith(f"{top}/")]
        found += sorted(inside, key=_place) or [top]
    return found


def _place(folder: str) -> list[tuple[int, str]]:
    """What orders packages inside a package: the layers of all that they are inside of, and their names."""
    parts = folder.rstrip("/").split("/")
    outer = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    return [(layer_of(f"{one}/") or 0, one) for one in outer]


def purpose(entry: str, sources: dict[str, str]) -> str:
    """What a package or a top-level module is for: the first sentence of its docstring."""
    return sentence_of(sources[f"{entry}__init__.py" if entry.endswith("/") else entry])


def tree(sources: dict[str, str], *, deep: bool = True) -> str:
    """The packages as an indented list; not `deep`: the top level alone."""
    lines = []
    for entry in entries(sources):
        depth = entry.rstrip("/").count("/")
        if entry.startswith("_") or (depth and not deep):
            continue
        label = "  " * depth + entry.rstrip("/").split("/")[-1] + ("/" if entry.endswith("/") else "")
        lines.append(_line(label, purpose(entry, sources), 18))
    return "\n".join(lines)


def _line(label: str, text: str, column: int) -> str:
    """`label`, and `text` from a column on, over several lines if need be."""
    head = f"    {label}".ljust(column + 4)
    head = head if head.endswith(" ") else head + "  "
    rest = " " * (column + 4)
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)


def page(sources: dict[str, str]) -> str:
    """docs/modules.md: every module with its first sentence."""
    lines = [
        "# Where to find what",
        "",
        "Every module with its first sentence. A file imports only from packages above its own in this list.",
        "`make modules` writes this page; `tests/test_layout.py` holds the order.",
    ]
    for entry in entries(sources):
        if not entry.endswith("/"):
            lines += ["", f"`{entry}`: {purpose(entry, sources)}"]
            continue
        lines += ["", f"{'###' if entry.count('/') > 1 else '##'} `{entry}`", "", purpose(entry, sources), ""]
        inside = [file for file in sources if file.startswith(entry) and "/" not in file[len(entry) :]]
        ordered = sorted(inside, key=lambda file: (layer_of(file) or 0, file))
        ordered = [file for file in ordered if not file.endswith("__init__.py")]
        lines += [f"- `{file[len(entry) :]}`: {sentence_of(sources[file])}" for file in ordered]
    return "\n".join([*lines, ""])


def blocks(sources: dict[str, str]) -> Iterator[tuple[Path, str, str]]:
    """Each list that stands in a page: the page, the name of its place, and the list."""
    yield ROOT / "CONTRIBUTING.md", "packages", tree(sources)
    yield ROOT / "docs" / "design.md", "packages", tree(sources, deep=False)


def placed(text: str, name: str, block: str) -> str:
    """A page's text with a list at its place, between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: the page has no such place.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no place for the list {name!r}: write <!-- {name} --> and <!-- end of {name} -->")
    return pattern.sub(lambda found: f"{found[1]}\n{block}\n\n{found[2]}", text)


def main() -> None:
    """Write the lists in CONTRIBUTING.md and docs/design.md, and docs/modules.md."""
    sources = modules()
    for path, name, block in blocks(sources):
        path.write_text(placed(path.read_text("utf-8"), name, block), "utf-8")
    (ROOT / "docs" / "modules.md").write_text(page(sources), "utf-8")


if __name__ == "__main__":
    main()
