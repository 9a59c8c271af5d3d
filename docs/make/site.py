"""Hooks of mkdocs: add what the pages link to outside of docs/ to the site, and check its links offline.

On a code host a link to ``../examples/sync_script.py`` works. On the site, each example becomes a page of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
_LOADED = {"script": "src", "link": "href", "img": "src", "object": "data", "iframe": "src"}
_FETCHED_BY_CSS = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the changes, the examples, and other files that pages link to."""
    files.append(File.generated(config, "changes.md", content=_text(ROOT / "CHANGELOG.md")))
    examples = sorted((ROOT / "examples").glob("*.py"))
    linked = {ROOT / path for file in files.documentation_pages() for path in _OUTSIDE.findall(file.content_string)}
    for path in {*examples, *(path for path in linked if path.suffix == ".py")}:
        name = _page_of(path.relative_to(ROOT).as_posix())
        page = File.generated(config, name, content=f"# {path.name}\n\n```python\n{_text(path)}```\n")
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    rows = [f"| [`{path.name}`](examples/{path.stem}.md) | {_purpose(path)} |\n" for path in examples]
    content = "# Examples\n\n| program | shows |\n|---|---|\n" + "".join(rows)
    files.append(File.generated(config, "examples.md", content=content))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _purpose(path: Path) -> str:
    return (ast.get_docstring(ast.parse(_text(path))) or "").partition("\n")[0]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links out of docs/ by links to the pages of these files."""
    return _OUTSIDE.sub(lambda match: f"]({_page_of(match[1])}", markdown)


def _page_of(path: str) -> str:
    named = {"CHANGELOG.md": "changes.md", "examples": "examples.md"}
    return named.get(path, path.removesuffix(".py") + ".md")


def on_post_build(*, config: MkDocsConfig) -> None:
    """Fail for broken links inside the built site, and for anything that a browser would fetch from another host."""
    site = Path(config.site_dir)
    pages = {path: _Links(_text(path)) for path in sorted(site.rglob("*.html"))}
    problems = [f"{path.relative_to(site)}: {problem}" for path in pages for problem in _problems(path, pages, site)]
    for path in site.rglob("*.css"):
        fetched = _FETCHED_BY_CSS.findall(_text(path))
        problems += [f"{path.relative_to(site)}: fetches {url}" for url in fetched]
    if problems:
        raise PluginError("\n".join(problems))


class _Links(HTMLParser):
    """The links, the loaded resources and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.linked.append(values["href"])
        elif _LOADED.get(tag) in values:
            self.loaded.append(values[_LOADED[tag]])


def _problems(path: Path, pages: dict[Path, _Links], site: Path) -> Iterator[str]:
    for url in pages[path].loaded:
        if _elsewhere(url):
            yield f"fetches {url}"
    for url in pages[path].loaded + pages[path].linked:
        if _elsewhere(url):
            continue
        address, anchor = urldefrag(unquote(url))
        # The 404 page is shown at any address, so its links begin at the root.
        start = site if address.startswith("/") else path.parent
        target = (start / address.lstrip("/")).resolve() if address else path
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"links to {url}, which does not exist"
        elif anchor and target in pages and anchor not in pages[target].anchors:
            yield f"links to {url}, an anchor that does not exist"


def _elsewhere(url: str) -> bool:
    return bool(re.match(r"(?!data:)[a-z][a-z0-9+.-]*:|//", url))
