"""Hooks of mkdocs: pages and notebooks of the repository that lie outside of docs/ become pages of the site."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
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
    if name.endswith(".ipynb"):
        return name.removesuffix("ipynb") + "md" + mark + anchor
    return PAGES.get(name, name.removeprefix("docs/")) + mark + anchor


def _rewrite(text: str, folder: str) -> str:
    found = r"\]\((?![a-z]+:|#)([^)\s]+)\)"
    return re.sub(found, lambda match: f"]({_link(match[1], folder)})", text)


def _text(value: str | list[str]) -> str:
    return "".join(value).rstrip("\n")


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as markdown, and its images by name. Settings of the machine that has run it are left out."""
    pictures: dict[str, bytes] = {}

    def parts() -> Iterator[str]:
        yield f"[This notebook]({path.name}) runs on two CPU cores in less than five minutes."
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                yield _text(cell["source"])
                continue
            yield f"```python\n{_text(cell['source'])}\n```"
            for output in cell["outputs"]:
                if "text" in output:
                    yield f"```text\n{_text(output['text'])}\n```"
                elif "image/png" in output.get("data", {}):
                    name = f"{path.stem}-{len(pictures)}.png"
                    pictures[name] = base64.b64decode(_text(output["data"]["image/png"]))
                    yield f"![What the cell above shows]({name})"

    first, title, *rest = parts()  # the title is the beginning of the first cell
    return "\n\n".join([title, first, *rest]), pictures


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        path = ROOT / source
        folder = path.parent.relative_to(ROOT).as_posix()
        files.append(File.generated(config, page, content=_rewrite(path.read_text(), folder)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = _notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_text()))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def _keep_together(line: str) -> str:
    """A row of a table in which no line breaks between a number and its sign: "99.4 %", "x 1.08"."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bx) (?=\d)", "\u00a0", line) if line.startswith("|") else line


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    source = page.file.src_uri
    markdown = "\n".join(map(_keep_together, markdown.split("\n")))
    return markdown if source in PAGES.values() or source.startswith("notebooks/") else _rewrite(markdown, "docs")
