"""Entry point: parses, then imports the verb, so that --help stays fast."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from cluster.cli import module_of, parse
from cluster.config.project import told


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status.

    Errors of our own classes are written for people and are shown as they are. Any other is a
    defect, and shows its traceback.
    """
    verb, arguments = parse(sys.argv[1:] if argv is None else argv)
    _silence_notices()
    try:
        # Libraries greet on stdout, which belongs to what the verb prints.
        with redirect_stdout(sys.stderr):
            _check_words(arguments)
            imported = importlib.import_module(module_of(verb))
        return int(imported.run(arguments))
    except KeyboardInterrupt:
        print(f"amortize {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (text := told(error)) is None:
            raise
        print(f"amortize {verb}: {text}", file=sys.stderr)
        return 1


def _check_words(arguments: argparse.Namespace) -> None:
    """Tell what is wrong with the words alone within a second: torch takes many to import.

    Raises UserError: the configuration or a file that it names cannot be used, there is no such
    run, or the name of a new one is taken.
    """
    words = vars(arguments)
    if not words.keys() & {"config", "run"}:
        return
    from cluster.config.file import load_config
    from cluster.run.directory import BUCKET_VARIABLE, RunDirectory, find_run
    from tasks.config import QuestionsConfig
    from tasks.questions.data import check_rows

    if "config" in words:
        # Test files that the command line names are read instead of those of the configuration.
        config = load_config(words["config"], words["overrides"], files=not words.get("data"))
        if isinstance(config.task, QuestionsConfig) and not words.get("data"):
            check_rows(config.task)
    new = words.get("resume") is False
    if words.get("run") and new:
        RunDirectory(words["run"]).check(resume=False)
    elsewhere = words.get("resume") and os.environ.get(BUCKET_VARIABLE)
    for name in (words.get("of"), None if new or elsewhere else words.get("run")):
        if name:
            find_run(name)


def _silence_notices() -> None:
    """Keep what libraries tell their own users off the terminal; only before they are imported."""
    # Deprecations are for who calls the function, which no user of a verb does.
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # That a machine without a GPU computes on its CPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.funcName != "get_accelerator")


if __name__ == "__main__":
    sys.exit(main())
