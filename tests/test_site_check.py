"""What is checked of the pages without a browser: faults of the built site are found, all code on a page is tested."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest
import site_check

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / "docs").rglob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
# The pages with code, how many pieces, and the file whose tests run all of them. ```py is code of other libraries.
TESTED = {
    "README.md": (2, "test_readme"),
    "guide.md": (15, "test_guide"),
    "index.md": (1, "test_site"),
    "install.md": (1, "test_site"),
    "migration.md": (6, "test_site"),
    "mixed_precision.md": (2, "test_site"),
    "step.md": (1, "test_site"),
    "torch.md": (11, "test_torch_page"),
}
HEAD = '<html><head><script src="a.js"></script></head><body><h1 id="top">Title</h1>'
GOOD = f'{HEAD}<p>a | b</p><table><tr><td data-label="x">1</td></tr></table><img src="a.png" alt="A">'
FAULTS = {
    '<a href="none.html">x</a>': "none.html is not there",
    '<a href="other.html#none">x</a>': "no such place",
    '<a href="#none">x</a>': "no such place",
    '<a href="">x</a>': "without a target",
    '<img src="a.png">': "no words for the picture",
    '<img src="b.png" alt="B">': "b.png is not there",
    '<script src="//cdn.example/x.js"></script>': "from the network",
    '<link rel="stylesheet" href="https://fonts.example/a.css">': "from the network",
    "<style>@import 'https://fonts.example/a.css';</style>": "from the network",
    "<h1>Again</h1>": "2 headings of the first level",
    '<p id="top">x</p>': "two elements with the id 'top'",
    "<table><tr><td>1</td></tr></table>": "scrolls sideways",
    "<p>| a row | of a table |</p>": "outside of it",
    '<table><tr><td data-label="x"><code>a \\| b</code></td></tr></table>': "backslash",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    for name in ("a.js", "a.png", "a.css"):
        (tmp_path / name).write_text("p { color: red }", encoding="utf-8")
    (tmp_path / "other.html").write_text(f'{GOOD}<a href="part/page.html#top">x</a>', encoding="utf-8")
    page = f'{HEAD.replace("a.js", "../a.js")}<a href="../other.html#top">x</a><a href="https://example.com">y</a>'
    (tmp_path / "part" / "page.html").write_text(page, encoding="utf-8")
    return tmp_path


def test_a_good_site_has_no_problems(site: Path) -> None:
    assert list(site_check.problems(site)) == []


@pytest.mark.parametrize(("fault", "words"), FAULTS.items())
def test_a_fault_of_a_page_is_named(site: Path, fault: str, words: str) -> None:
    (site / "bad.html").write_text(GOOD + fault, encoding="utf-8")
    (found,) = site_check.problems(site)
    assert found.startswith("bad.html: ")
    assert words in found


def test_a_style_sheet_that_loads_from_the_network_is_named(site: Path) -> None:
    (site / "a.css").write_text("p { background: url('https://example.com/a.png') }", encoding="utf-8")
    assert list(site_check.problems(site)) == ["a.css: loads from the network"]


def test_a_folder_without_pages_is_a_problem(tmp_path: Path) -> None:
    assert len(list(site_check.problems(tmp_path))) == 1


def test_each_page_with_code_has_tests_that_run_all_of_it() -> None:
    found = {}
    for path in PAGES:
        if pieces := re.findall(r"^```python", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[path.name] = len(pieces)
    assert found == {name: count for name, (count, _) in TESTED.items()}
    for name, (_, file) in TESTED.items():
        assert name in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_python_hides_in_an_indented_block_where_no_test_runs_it(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^\n|\A)((?:^ {4}.*\n|^\n(?= {4}))+)", text, re.MULTILINE):
        try:
            tree = ast.parse(textwrap.dedent(block))
        except SyntaxError:  # a command, a tree of files, a picture
            continue
        code = (ast.Call, ast.Import, ast.ImportFrom, ast.Assign)
        assert not any(isinstance(node, code) for node in ast.walk(tree)), f"fence it as ```python: {block}"
