"""What `make docs` adds to MkDocs: the root's pages, guides cut by section, notebooks, figures, tables for phones.

The pages in docs/ stay as they are read on a code host. Links follow what moves here; `strict` finds those that do not.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {name: f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
# Pages that become a page for each `##` section, in a folder of the page's name.
CUT = ("guide.md", "torch.md", "migration.md")

# A page's path, and where its sections went: anchor -> page, with the anchor where a part of the section was meant.
_moved: dict[str, dict[str, str]] = {}
# A made page's path, and the page that its links were written for.
_origin: dict[str, str] = {}


def on_config(config: Any) -> Any:
    """List the sections of cut pages in the navigation, where the pages stand."""
    config.nav = [_with_sections(entry, Path(config.docs_dir)) for entry in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the made pages."""
    for source, text in _made(Path(config.docs_dir)):
        files.append(File.generated(config, source, content=text))
    for page in CUT:
        files.remove(files.get_file_from_path(page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where sections and root pages are in the site."""
    return relinked(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Give each cell the title of its column: on a phone a row becomes a list."""
    return re.sub(r"<table>.*?</table>", lambda found: _labelled(found[0]), html, flags=re.DOTALL)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load the worker for searches in files from the site itself, and not from the network as the theme would."""
    here = posixpath.relpath("site/worker.js", posixpath.dirname(page.file.dest_uri) or ".")
    return re.sub(r'src="https://unpkg.com/iframe-worker[^"]*"', f'src="{here}"', output)


def on_post_template(output: str, **_: Any) -> str:
    """The page for what is not found needs no search in files."""
    return re.sub(r'<script src="https://unpkg.com/iframe-worker[^>]*></script>', "", output)


def anchor(title: str) -> str:
    """The anchor that MkDocs makes of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def sections(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first `##` heading, and title and text of each section. Headings in code do not count."""
    plain = re.sub(r"^```.*?^```", lambda code: re.sub(r"^#", "\0", code[0], flags=re.M), text, flags=re.M | re.DOTALL)
    head, *rest = re.split(r"^## ", plain, flags=re.MULTILINE)
    found = [part.replace("\0", "#").partition("\n") for part in rest]
    return head.replace("\0", "#"), [(title.strip(), body) for title, _, body in found]


def relinked(markdown: str, source: str) -> str:
    """A page's text with each relative link leading from this page to where its target is in the site."""
    origin = _origin.get(source, source)

    def link(found: re.Match[str]) -> str:
        text, path, heading = found[1], found[2], found[3] or ""
        if path.startswith(("http:", "https:", "mailto:")) or (not path and origin == source):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)) if path else origin
        target = _in_site(target)
        if target is None:
            return text.strip("!").strip("[]")
        target = _moved.get(target, {}).get(heading[1:], target + heading)
        page, _, at = target.partition("#")
        if page == source and at and heading:
            return f"{text}(#{at})"
        there = posixpath.relpath(page, posixpath.dirname(source) or ".")
        return f"{text}({there}{'#' + at if at else ''})"

    return re.sub(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\])\(([^)#\s]*)(#[^)\s]*)?\)", link, markdown)


def _in_site(target: str) -> str | None:
    """The place in the site of a path as seen from docs/; None for a file that the site lacks."""
    if not target.startswith("../"):
        return target
    inside = target.removeprefix("../")
    if inside.startswith("docs/"):
        return inside.removeprefix("docs/")
    return ROOT_PAGES.get(inside.removesuffix(".md"))


def _with_sections(entry: Any, folder: Path) -> Any:
    """An entry of the navigation, in which a cut page is followed by its sections."""
    if not isinstance(entry, dict):
        return entry
    ((title, value),) = entry.items()
    if isinstance(value, list):
        return {title: [_with_sections(one, folder) for one in value]}
    if value not in CUT:
        return entry
    _, found = sections((folder / value).read_text("utf-8"))
    return {title: [_page(value, "index"), *({name.replace("`", ""): _page(value, name)} for name, _ in found)]}


def _page(page: str, title: str) -> str:
    return f"{page.removesuffix('.md')}/{anchor(title)}.md"


def _made(folder: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each made page."""
    for name, source in ROOT_PAGES.items():
        _origin[source] = f"../{name}.md"
        yield source, (ROOT / f"{name}.md").read_text("utf-8")
    for page in CUT:
        head, found = sections((folder / page).read_text("utf-8"))
        for title, body in found:
            made = _page(page, title)
            _origin[made] = page
            inner = re.findall(r"^###+ (.*)$", body, re.MULTILINE)
            _moved.setdefault(page, {}).update(
                {anchor(title): made, **{anchor(t): f"{made}#{anchor(t)}" for t in inner}}
            )
            yield made, f"# {title}\n{body}"
        index = _page(page, "index")
        _origin[index] = page
        _moved[page][""] = index
        yield index, head + "\n" + "\n".join(f"- [{title}](#{anchor(title)})" for title, _ in found) + "\n"
    for notebook in sorted((folder / "tutorials").glob("*.ipynb")):
        yield f"tutorials/{notebook.stem}.md", notebook_page(json.loads(notebook.read_text("utf-8")), notebook.name)
    yield "performance.md", performance_page()


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """A notebook as a page: its texts, its code, and what the code printed."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        said = "".join("".join(output.get("text", [])) for output in cell["outputs"])
        if said:
            parts.append(f'<pre class="output">{html.escape(said.rstrip())}</pre>')
    parts.insert(1, f"[Download this page as a notebook]({name})")
    return "\n\n".join(parts) + "\n"


def performance_page() -> str:
    """The figures of README, and the other results of bench/results with the commands that made them."""
    sys.path.insert(0, str(ROOT / "tests" / "shared"))
    import readme_figures  # noqa: PLC0415  it lies beside the tests

    readme = (ROOT / "README.md").read_text("utf-8")
    told = re.search(r"## How fast\n(.*?)\n## ", readme, re.DOTALL)[1]
    lines = ["# Performance", told.strip(), "", "## Each model"]
    for name, result in readme_figures.results().items():
        lines += ["", f"### {readme_figures.COLUMNS[name]}", "", f"    {' '.join(result['command'])}", ""]
        lines += ["| way | samples/s | first to third quartile | step, ms | warm-up, s |", "|---|---:|---:|---:|---:|"]
        for entry in result["entries"]:
            speed, step = entry["samples_per_second"], entry["step_seconds"]["median"]
            spread = f"{speed['q1']:,.0f} to {speed['q3']:,.0f}"
            warm = entry["warm_up"]["seconds"]
            lines.append(f"| {entry['name']} | {speed['median']:,.0f} | {spread} | {step * 1e3:,.1f} | {warm:.1f} |")
    lines += ["", "## All results", "", "Each file in `bench/results/` names its machine, versions and command."]
    lines += ["", *(f"- `{path.name}`" for path in sorted((ROOT / "bench" / "results").glob("*.json")))]
    return "\n".join(lines) + "\n"


def _labelled(table: str) -> str:
    titles = [re.sub(r"<[^>]+>", "", title).strip() for title in re.findall(r"<th[^>]*>(.*?)</th>", table, re.DOTALL)]

    def row(found: re.Match[str]) -> str:
        places = iter(titles)
        return re.sub(r"<td", lambda _: f'<td data-label="{html.escape(next(places, ""))}"', found[0])

    return re.sub(r"<tr>.*?</tr>", row, table, flags=re.DOTALL)
