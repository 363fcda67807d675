"""Entry point: parses, then imports the verb, so that --help stays fast."""

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from cluster.cli import parse

_ROOMS = {
    "compare": "experiments",
    "em": "experiments",
    "throughput": "experiments",
}
# A module called inspect would shadow the standard library's where this folder is on the path.
_ELSEWHERE = {"inspect": "cluster.inspector.command"}
_OUR_PACKAGES = ("actors", "buffer", "cluster", "learner", "lm", "reward", "seed_lm", "tasks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status.

    Errors of our own classes are written for people and are shown as they are. Any other is a
    defect, and shows its traceback.
    """
    verb, arguments = parse(sys.argv[1:] if argv is None else argv)
    _silence_notices()
    module = _ELSEWHERE.get(verb, f"cluster.{_ROOMS.get(verb, 'commands')}.{verb}")
    try:
        # Libraries greet on stdout, which belongs to what the verb prints.
        with redirect_stdout(sys.stderr):
            imported = importlib.import_module(module)
        return int(imported.run(arguments))
    except KeyboardInterrupt:
        print(f"amortize {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _OUR_PACKAGES:
            raise
        print(f"amortize {verb}: {error}", file=sys.stderr)
        return 1


def _silence_notices() -> None:
    """Keep what libraries tell their own users off the terminal; only before they are imported."""
    # Deprecations are for who calls the function, which no user of a verb does.
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # That a machine without a GPU computes on its CPU.
    logging.getLogger("DeepSpeed").addFilter(_is_no_greeting)


def _is_no_greeting(record: logging.LogRecord) -> bool:
    return record.funcName != "get_accelerator"


if __name__ == "__main__":
    sys.exit(main())
