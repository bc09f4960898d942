"""Hooks of mkdocs: pages of the repository that lie outside of docs/ become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/carry.md": "carry.md",
}


def _link(target: str, folder: str) -> str:
    """Where a link of a page in `folder` leads on the site."""
    path, mark, anchor = target.partition("#")
    resolved = (ROOT / folder / path).resolve()
    name = resolved.relative_to(ROOT).as_posix()
    return PAGES.get(name, name.removeprefix("docs/")) + mark + anchor


def _rewrite(text: str, folder: str) -> str:
    found = r"\]\((?![a-z]+:|#)([^)\s]+)\)"
    return re.sub(found, lambda match: f"]({_link(match[1], folder)})", text)


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        path = ROOT / source
        folder = path.parent.relative_to(ROOT).as_posix()
        files.append(File.generated(config, page, content=_rewrite(path.read_text(), folder)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    return markdown if page.file.src_uri in PAGES.values() else _rewrite(markdown, "docs")
