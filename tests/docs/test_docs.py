"""The documentation: links resolve, files it names exist, the README fits on a screen and its picture moves."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "examples/*.md", "clients/**/*.md")
    for page in ROOT.glob(pattern)
    if "node_modules" not in page.parts
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"`([a-z_]+(?:/[A-Za-z0-9_.-]+)+)`")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name: str) -> None:
    page = ROOT / name
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() and linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    text = re.sub(r"(?s)```.*?```", "", (ROOT / name).read_text())
    for path in FILE.findall(text):
        if path.split("/")[0] in {"server", "engine", "clients", "deploy", "docs", "tests", "architecture"}:
            candidates = [ROOT / folder / (path + suffix) for folder in ("", "tests") for suffix in ("", ".py")]
            assert any(candidate.exists() for candidate in candidates), path


def test_the_readme_fits_on_a_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_picture_of_the_readme_moves() -> None:
    path = ROOT / "docs" / "livereel.webp"
    assert path.stat().st_size <= 2_000_000
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) > 100


def test_decisions_are_numbered_without_gaps() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    for number, page in enumerate(pages, 1):
        assert page.name.startswith(f"{number:04d}-")
        assert page.read_text().startswith(f"# {number}. ")
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text()
    assert all(f"]({page.name})" in listed for page in pages)
