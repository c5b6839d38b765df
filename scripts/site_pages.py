"""What mkdocs asks while it builds the site (`make site`): the pages outside docs/, and links that lead from one page to another.

docs/ and the files beside it are read on a forge and on the site. So a link is written as the forge follows it, from file to
file, and becomes the site's own here.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# File of the repository: the page that it is on the site.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/gpu/README.md": "benchmarks/gpu-check.md",
    "src/spunge/data/neutral/README.md": "neutral.md",
}
SOURCES = {page: source for source, page in OUTSIDE.items()}
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    return site_tables(site_links(markdown, page.file.src_uri))


def site_tables(markdown: str) -> str:
    """Without the backslashes that a forge wants before the bars of code in a table, and that the site would show."""
    return "\n".join(
        CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.split("\n")
    )


def site_links(markdown: str, page: str) -> str:
    """A page's Markdown with links as the site has them; one to no page stays as it is, and mkdocs refuses it."""
    folder = posixpath.dirname(SOURCES.get(page, f"docs/{page}"))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target not in OUTSIDE and not target.startswith("docs/"):
            return match[0]
        to = OUTSIDE.get(target) or target.removeprefix("docs/")
        return f"]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return LINK.sub(link, markdown)
