"""What belongs to the project: its folder, its packages, and the errors that it writes for people.

Imports nothing heavy: an error is told before anything else is loaded.
"""

import errno
import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
_NOT_THERE = ": choose a place that you may write to (AMORTIZE_RUNS, HOME, TMPDIR)"
_FULL = ": free some space there; a run goes on with --resume"
_REMEDIES = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NOT_THERE)
_REMEDIES |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL)
PACKAGES = ("actors", "buffer", "cluster", "learner", "lm", "reward", "seed_lm", "tasks")


class UserError(Exception):
    """Something that the user asked for cannot be done; the text says what, where and the remedy.

    Rooms that may not import `cluster` have error classes of their own.
    """


def told(error: BaseException) -> str | None:
    """What a person is told of an error instead of a traceback; None of a defect."""
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return str(error)
    if not isinstance(error, OSError):
        return None
    if "AF_UNIX path" in str(error):
        return f"{error}: set TMPDIR to a folder with a shorter path, such as /tmp"
    if error.filename is None and error.errno not in _REMEDIES:
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}{_REMEDIES.get(error.errno or 0, '')}"


def locate(path: str) -> Path:
    """`path` where it exists: from the working directory, else from the project's root."""
    given = Path(os.path.expanduser(path))
    # os.path: a text that is no path, or too long for one, does not exist.
    if os.path.exists(given) or not os.path.exists(PROJECT_ROOT / given):
        return given
    return PROJECT_ROOT / given
