"""The pages of the documentation: their links lead somewhere, and the map is of this tree."""

import re
from pathlib import Path

import pytest

from tests import map_page

ROOT = map_page.ROOT
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_map_names_every_file() -> None:
    text = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    named = set()
    for room in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        folder = room.partition("\n")[0]
        named |= {folder + name for name in re.findall(r"^- `([^`]+)`", room, flags=re.MULTILINE)}
    there = {str(path.relative_to(ROOT)) for path in map_page.modules()}
    assert named == there, "python -m tests.map_page > docs/map.md"


def test_the_readme_fits_a_terminal() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 100]
