"""The first five minutes: folders that `init` writes, and the page that leads to a served model."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.commands.init import OWN_TASK, QUESTIONS
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT
from cluster.run.directory import RUNS
from lm.hub import load_tokenizer
from tasks.evaluation.evaluation import Scores
from tasks.registry import build_task
from tests.page import ROOT, commands

PAGE = "docs/start.md"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(("words", "files"), [([], QUESTIONS), (["--task"], OWN_TASK)])
def test_a_new_folder_holds_what_its_configuration_needs(
    words: list[str],
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["init", "mine", *words]) == 0
    assert "next: cd mine && amortize train run.toml --dry-run" in capsys.readouterr().out
    assert {path.name for path in Path("mine").iterdir()} == set(files)
    monkeypatch.chdir("mine")
    try:
        config = load_config("run.toml", files=True)
        task = build_task(config.task, load_tokenizer(config.lm), seed=config.seed)
    finally:
        sys.modules.pop("my_task", None)
    assert len(task.prompts) >= 4
    modules = [name for name in files if name.endswith(".py")]
    check = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    assert not modules or subprocess.run([*check, *modules]).returncode == 0


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mine"]) == 0
    Path("mine/run.toml").write_text("precious")
    assert main(["init", "mine", "--task"]) == 1
    assert "mine is there already" in capsys.readouterr().err
    assert Path("mine/run.toml").read_text() == "precious"
    Path("file").write_text("precious")
    assert main(["init", "file"]) == 1 and Path("file").read_text() == "precious"


def test_the_templates_are_in_the_wheel() -> None:
    """Every file that `init` copies lies in a package that is shipped, and is no build leftover."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for template in {*QUESTIONS.values(), *OWN_TASK.values()}:
        assert str(template.relative_to(PROJECT_ROOT)) in tracked
        assert template.relative_to(PROJECT_ROOT).parts[0] in ("cluster", "tasks")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in commands(PAGE):
        program, *words = shlex.split(line)
        if program == "cd":
            monkeypatch.chdir(words[0])
        else:
            assert program == "amortize" and main(words) == 0, line
    scores = Scores.model_validate_json((RUNS / "first/scores.json").read_text())
    before, after = scores.before, scores.after
    assert before is not None and after is not None
    (name,) = [key for key, metric in after.metrics.items() if metric.shown == "chart"]
    right, was_right = after.value(name), before.value(name)
    assert right is not None and was_right is not None and right > was_right + 0.2
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / PAGE).read_text(), re.M | re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    merged, adapted = printed.getvalue().strip().splitlines()
    for written in (merged, adapted):
        assert written.startswith("Question: 7 - 2 + 4 = ? Answer: "), written


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_with_a_task_of_its_own_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["init", "mine", "--task"]) == 0
    monkeypatch.chdir("mine")
    try:
        few = ["learner.steps=5", "posterior.samples=20", "posterior.draws=20"]
        assert main(["train", "run.toml", "--run", "first", "--local", *few]) == 0
    finally:
        sys.modules.pop("my_task", None)
    assert (RUNS / "first/report.html").exists()
