"""Commands and files of a page of the documentation, for tests that use them as they stand."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commands(page: str) -> list[str]:
    """Lines of the page's shell blocks, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def files(page: str) -> dict[str, str]:
    """Files that the page writes down, each a block under a line with its name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```"
    return dict(re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL))


def command(page: str, *parts: str) -> str:
    """The one command of a page that has all `parts` in it."""
    found = [line for line in commands(page) if all(part in line for part in parts)]
    assert len(found) == 1, f"{page} has {len(found)} commands with {parts}: {found}"
    return found[0]
