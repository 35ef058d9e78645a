"""What the site has beside the pages of docs/, and what it must not have.

Pages link to files of the repository, as they have to where they are read on their own. Such a file
goes into the site under `source/`, and links lead there; one in Markdown becomes a page. Figures
and the reference of messages were written to out/docs by `make docs`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
MADE = ROOT / "out/docs"
SOURCE = "source"
PAGES = ("examples/README.md", "examples/papers/README.md")
_LINK = re.compile(r"(\]\()([^)\s#:]+)([)#])")
_FOREIGN = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc="?https?:|<link[^>]*stylesheet[^>]*https?:"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what was made, and what pages link to."""
    for made in sorted(MADE.rglob("*")):
        if made.is_file():
            uri = made.relative_to(MADE).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(made)))
    todo = [(f.src_uri, ROOT / "docs" / f.src_uri) for f in files.documentation_pages()]
    todo += [(posixpath.join(SOURCE, page), ROOT / page) for page in PAGES]
    seen: set[str] = set()
    while todo:
        uri, path = todo.pop()
        if uri not in seen and uri.startswith(SOURCE):
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if uri not in seen and path.is_file() and uri.endswith(".md"):
            todo += [
                (posixpath.join(SOURCE, found), ROOT / found)
                for _, link, _ in _LINK.findall(path.read_text())
                if (found := outside(uri, link))
            ]
        seen.add(uri)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their copies."""

    def turned(match: re.Match[str]) -> str:
        found = outside(page.file.src_uri, match[2])
        if found:
            target = posixpath.join(SOURCE, found)
        elif page.file.src_uri.startswith(SOURCE):
            target = posixpath.relpath(original(page.file.src_uri, match[2]), "docs")
        else:
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{match[1]}{posixpath.relpath(target, start)}{match[3]}"

    return _LINK.sub(turned, markdown)


def original(uri: str, link: str) -> str:
    """The path in the repository that a link of a page means."""
    inside = uri.startswith(SOURCE + "/")
    page = uri.removeprefix(SOURCE + "/") if inside else posixpath.join("docs", uri)
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def outside(uri: str, link: str) -> str | None:
    """The path in the repository of a file that is no page of docs/; else None."""
    found = original(uri, link)
    return found if not found.startswith("docs/") and (ROOT / found).is_file() else None


def on_post_build(config: MkDocsConfig) -> None:
    """Refuses a site that loads anything from elsewhere."""
    for page in Path(config.site_dir).rglob("*.html"):
        found = _FOREIGN.search(page.read_text())
        if found:
            raise PluginError(f"{page} loads what is not in the site: {found[0]}")
