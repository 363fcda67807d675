"""What belongs to the project: its folder, its packages, and the errors that it writes for people.

Imports nothing heavy: an error is told before anything else is loaded.
"""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("actors", "buffer", "cluster", "learner", "lm", "reward", "seed_lm", "tasks")


class UserError(Exception):
    """Something that the user asked for cannot be done; the text says what, where and the remedy.

    Rooms that no room of `cluster` may be imported by have error classes of their own, and so has
    what somebody catches by its class.
    """


def told(error: BaseException) -> str | None:
    """What a person is told of an error instead of a traceback; None of a defect."""
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return str(error)
    return None


def locate(path: str) -> Path:
    """`path` where it exists: from the working directory, else from the project's root."""
    given = Path(path).expanduser()
    if given.exists() or not (PROJECT_ROOT / given).exists():
        return given
    return PROJECT_ROOT / given
