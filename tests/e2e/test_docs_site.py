"""The documentation builds as a site: every page is in its navigation, and no link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hf_veomni
from tests.e2e.launching import ROOT, python

pytest.importorskip("mkdocs", reason="needs the extra `docs`")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    config = str(ROOT / "mkdocs.yml")
    python("-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", str(folder), cwd=ROOT)
    return folder


@pytest.mark.everyday
def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    built = {path.stem for path in site.glob("*.html")}
    assert pages | {"index", "benchmarks", "changelog", "contributing"} <= built


@pytest.mark.everyday
def test_the_reference_has_every_public_name(site: Path) -> None:
    anchors = set(re.findall(r'id="(hf_veomni\.\w+)"', (site / "api.html").read_text()))
    assert {f"hf_veomni.{name}" for name in hf_veomni.__all__} <= anchors


@pytest.mark.everyday
def test_pictures_are_there(site: Path) -> None:
    for page in site.glob("*.html"):
        for source in re.findall(r'<img[^>]+src="(?!https?:|data:)([^"]+)"', page.read_text()):
            assert (site / source).exists(), (page.name, source)
