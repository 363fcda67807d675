"""The verb `init`: a folder of one's own to begin with, in which everything runs as it stands.

Imports nothing heavy: the files are copied, and the language model is the one that ships.
"""

import argparse
import shutil
from pathlib import Path

from cluster.config.project import PROJECT_ROOT, UserError

_TEMPLATES = Path(__file__).with_name("templates")
_QUESTIONS = PROJECT_ROOT / "tasks/data/questions"
# Name in the new folder -> what it is a copy of.
QUESTIONS = {
    "run.toml": _TEMPLATES / "questions/run.toml",
    "questions.jsonl": _QUESTIONS / "train.jsonl",
    "test.jsonl": _QUESTIONS / "test.jsonl",
}
OWN_TASK = {
    "run.toml": _TEMPLATES / "task/run.toml",
    "beginnings.jsonl": _TEMPLATES / "task/beginnings.jsonl",
    "my_task.py": _TEMPLATES / "task/my_task.py.txt",  # no module of this package
}


def run(arguments: argparse.Namespace) -> int:
    """Write the folder, and say what it holds and what comes next."""
    folder = Path(arguments.name).expanduser()
    files = OWN_TASK if arguments.task else QUESTIONS
    write(folder, files)
    for name in files:
        print(f"wrote {folder / name}")
    print(f"next: cd {folder} && amortize train run.toml --dry-run")
    return 0


def write(folder: Path, files: dict[str, Path]) -> None:
    """Copy the files into a new folder; raises UserError where there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and nothing is overwritten: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, template in files.items():
        shutil.copyfile(template, folder / name)
