"""Writes docs/map.md: a line for every file, from its docstring.

python -m tests.map_page > docs/map.md
"""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the top floor down; none imports from one above it.
FOLDERS = ("cluster", "tasks", "actors", "learner", "reward", "lm", "buffer", "seed_lm", "bench")
_HEAD = """# Where things are

A line for every file, the first of its docstring, from the top floor down.
`python -m tests.map_page > docs/map.md` writes this page.
"""


def modules() -> list[Path]:
    """Every module that the page names, rooms of a folder behind its own files."""
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    named = [path for path in found if path.name != "__init__.py"]
    return sorted(named, key=lambda path: (FOLDERS.index(_folder(path)), path.parent, path.name))


def page() -> str:
    lines = [_HEAD]
    room = None
    for path in modules():
        if path.parent != room:
            room = path.parent
            lines.append(f"\n## {room.relative_to(ROOT)}/\n")
        entry = f"- `{path.name}`: {_phrase(path)}"
        lines += textwrap.wrap(entry, 98, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _folder(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def _phrase(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".:")


if __name__ == "__main__":
    print(page(), end="")
