"""A task that is not shipped: the page that builds one, and what is said of one that is wrong."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.config.file import load_config, resolved_toml
from cluster.config.validation import ConfigError
from cluster.distributed.ray_cluster import source_for_workers
from cluster.experiments.comparison import figures
from cluster.reports.score_table import rows
from cluster.run.evaluation import evaluate
from cluster.run.identity import own_sources
from lm.hub import load_tokenizer
from tasks.config import ArithmeticConfig
from tasks.custom import PlainTask, UnfitTask
from tasks.custom_config import CustomTaskConfig
from tasks.evaluation.evaluation import Scores
from tasks.registry import build_task
from tests.page import ROOT, commands, files

PAGE = "docs/own_task.md"
MOST_LINES = 60


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files, and nothing of it left in the interpreter afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    for name, text in files(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for module in set(sys.modules) - modules:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


def mistakes(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("last_word.toml", overrides)
    return str(caught.value)


def test_the_page_needs_fewer_lines_than_it_promises() -> None:
    written = files(PAGE)
    assert set(written) == {"last_word.py", "last_word.toml"}
    assert sum(len(text.splitlines()) for text in written.values()) < MOST_LINES


@pytest.mark.slow
def test_the_page_runs_as_it_stands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands(PAGE)
    assert [line.split()[1] for line in lines] == [
        *("train", "evaluate", "posterior", "compare", "status"),
    ]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    said = capsys.readouterr().out
    assert "boats" in said and "gflownet" in said
    scores = Scores.model_validate_json((project / "runs/boats/scores.json").read_text())
    before, after = scores.before, scores.after
    assert before is not None and after is not None and (before.step, after.step) == (0, 60)
    elbos = before.value("elbo_T1"), after.value("elbo_T1")
    assert elbos[0] is not None and elbos[1] is not None and elbos[1] > elbos[0] + 1
    assert "different of 50" in said  # the page's own metric, in the tables ...
    assert "different of 50" in (project / "runs/boats/report.html").read_text()
    table = json.loads((project / "runs/boats-compared/compare.json").read_text())["table"]
    assert table["gflownet"]["elbo_T1"]["mean"] > table["base"]["elbo_T1"]["mean"] + 1
    assert table["gflownet"]["different"]["mean"] == after.value("different")  # ... and compared


def test_a_metric_of_its_own_stands_beside_those_of_every_task(project: Path) -> None:
    small = ["posterior.max_nodes=0", "posterior.samples=10", "posterior.draws=0"]
    found = evaluate(load_config("last_word.toml", small), adapter=None)
    assert list(found.metrics) == ["elbo_T1", "different"]
    [told] = [row for row in rows(None, found) if row.label == "different of 50"]
    assert told.items == "2" and 1 <= float(told.after) <= 50
    assert figures(found)["different"] == found.value("different")


def test_settings_are_those_of_the_class_and_read_back(project: Path) -> None:
    config = load_config("last_word.toml", ["task.max_len=9"])
    assert isinstance(config.task, CustomTaskConfig)
    assert config.task.model_dump()["max_len"] == 9
    assert config.task_name == "LastWord"
    (project / "resolved.toml").write_text(resolved_toml(config))
    assert load_config("resolved.toml") == config


def test_mistakes_are_told_with_file_line_and_remedy(project: Path) -> None:
    text = Path("last_word.toml").read_text().replace('word = "boat"', 'word = 7\nwrod = "boat"')
    Path("last_word.toml").write_text(text)
    line = text.splitlines().index("word = 7") + 1
    told = mistakes("task.max_len=0")
    assert f"last_word.toml:{line}: task.word = 7: must be a text, in quotes" in told
    assert f'last_word.toml:{line + 1}: task.wrod = "boat": unknown key; last_word:LastWord' in told
    assert "has tests, validation, validation_share, name, beginnings, word, max_len" in told
    assert "command line: task.max_len = 0: must be at least 1" in told
    assert told.endswith("3 mistakes")


def test_a_key_that_the_class_wants_is_missed(project: Path) -> None:
    Path("last_word.toml").write_text(Path("last_word.toml").read_text().replace("word =", "#"))
    assert "last_word.toml:1: task.word: missing" in mistakes()


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("nowhere:Task", None, "no module nowhere, neither in"),
        ("last_word:Nothing", None, "last_word.py) has no class Nothing"),
        ("last_word:spell", None, "is no subclass of tasks.custom.CustomTask with a build()"),
        (
            "unbuilt:Task",
            "from tasks.custom import CustomTask as T\nclass Task(T): pass\n",
            "a build()",
        ),
        (":Task", None, "write it as 'my_module:MyTask'"),
        ("a b:Task", None, "write it as 'my_module:MyTask'"),
        ("needy:Task", "\nimport not_there\n", "needy.py:2: ModuleNotFoundError"),
        ("broken:Task", "x = 1\nclass Task(\n", "broken.py:2: SyntaxError"),
        ("failing:Task", "\n\n1 / 0\n", "failing.py:3: ZeroDivisionError: division by zero"),
    ],
)
def test_a_name_that_leads_to_no_task_is_told_before_anything_starts(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    module: str | None,
    expected: str,
) -> None:
    if module is not None:
        (project / f"{name.partition(':')[0]}.py").write_text(module)
    assert main(["train", "last_word.toml", f"task.name={name}"]) == 1
    said = capsys.readouterr().err
    assert f'command line: task.name = "{name}": ' in said and expected in said
    assert not (project / "runs").exists()


def test_a_shipped_name_that_is_misspelt_is_told_of_both_kinds() -> None:
    with pytest.raises(ConfigError, match=r"'arithmetic', .* own is 'module:Class'"):
        load_config("tasks/toy.toml", ["task.name=arithmetics"])


def test_a_task_that_no_run_could_work_on_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("last_word.toml").write_text(
        Path("last_word.toml").read_text().replace('"boat"', '"0"')  # a token of any seed LM
    )
    config = load_config("last_word.toml")
    tokenizer = load_tokenizer(config.lm)
    task = build_task(config.task, tokenizer, seed=config.seed)
    assert isinstance(task, PlainTask)
    first, second = task.prompts
    query = task.reward_query
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "no Task: make a tasks.custom.PlainTask"),
        ({"reward_query": replace(query, kind="stop")}, "set the class's reward_kind to that"),
        ({"log_reward": lambda item: item}, "a log_reward goes with reward_kind 'function'"),
        ({"prompts": ()}, "it has no prompts"),
        ({"prompts": (first, replace(second, key=first.key))}, "keys must differ"),
        ({"prompts": (replace(first, prompt=()),)}, "has no tokens"),
        ({"prompts": (replace(first, answer=()),)}, "has no answer"),
        (
            {"tool": SimpleNamespace(triggers=(), output=lambda: [])},
            r"tool\.output: it takes \(\), and it is called with completion: too many",
        ),
    )
    for changes, expected in cases:
        made = replace(task, **changes) if changes else object()
        with monkeypatch.context() as patched:
            patched.setattr(type(config.task), "build", lambda *_, made=made: made)
            with pytest.raises(UnfitTask, match=expected) as refusal:
                build_task(config.task, tokenizer, seed=config.seed)
        assert "task last_word:LastWord: " in str(refusal.value)
    with monkeypatch.context() as patched:
        patched.setattr(type(config.task), "build", lambda self, tokenizer, seed: task)
        with pytest.raises(UnfitTask, match=r"build: it takes .*, and .* missing .*'seed'"):
            build_task(config.task, tokenizer, seed=config.seed)
    config = load_config("last_word.toml", ["task.tests=['x.json']"])
    with pytest.raises(UnfitTask, match=r"leave task.tests and --data out"):
        build_task(config.task, tokenizer, seed=config.seed)


def test_only_what_is_not_installed_travels_to_the_workers(project: Path) -> None:
    assert own_sources(load_config("tasks/toy.toml")) == []
    assert own_sources(load_config("last_word.toml")) == [project / "last_word.py"]
    as_package(project)
    config = load_config("last_word.toml", ["task.name=mine.words:LastWord"])
    assert own_sources(config) == [project / "mine"]
    environment = source_for_workers(config)
    assert environment["py_modules"] == [str(project / "mine")]
    assert {"!/words.py", "!/__init__.py", "!/tasks"} <= set(environment["excludes"])
    judged = [{"kind": "likelihood"}, {"kind": "verifier", "check": "mine.words:check"}]
    verified = load_config("tasks/toy.toml").changed({"reward.terms": judged})
    assert own_sources(verified) == [project / "mine"]
    installed = type("Installed", (CustomTaskConfig,), {"__module__": "pytest"})
    own = config.model_copy(update={"task": installed(name="pytest:Installed")})
    assert own_sources(own) == [] and "py_modules" not in source_for_workers(own)


def as_package(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "__init__.py").write_text("")
    (folder / "last_word.py").rename(folder / "mine" / "words.py")
    (folder / "last_word.py").write_text("from mine.words import LastWord as LastWord\n")


ON_RAY = """
import ray
from ray._private.worker import global_worker
from cluster.config.file import load_config
from cluster.distributed.ray_cluster import connect_ray
from lm.hub import load_tokenizer
from tasks.registry import build_task

def prompts(config):
    task = build_task(config.task, load_tokenizer(config.lm), seed=0)
    return [prompt.text for prompt in task.prompts]

names = ("last_word:LastWord", "mine.words:LastWord")  # a file, and a module of a package
of_file, of_package = (load_config("last_word.toml", [f"task.name={name}"]) for name in names)
terms = ({"kind": "likelihood"}, {"kind": "verifier", "check": names[0]})
config = of_package.changed({"cluster.cpus": 1, "reward.terms": terms})  # needs both modules
connect_ray(config, None, "amortize-own")
(job,) = global_worker.gcs_client.get_all_job_info().values()
assert job.config.metadata["inspector"] == "http://127.0.0.1:8000/inspect/own/"
for config in (of_file, of_package):
    found = ray.get(ray.remote(prompts).options(num_cpus=0).remote(config), timeout=100)
    assert found == list(config.task.beginnings), found
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_on_ray_import_the_module_though_they_work_elsewhere(project: Path) -> None:
    text = (project / "last_word.py").read_text()
    as_package(project)
    (project / "last_word.py").write_text(text)
    subprocess.run(
        [sys.executable, "-c", ON_RAY],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )


def test_shipped_tasks_are_what_they_were() -> None:
    assert isinstance(load_config("tasks/arithmetic.toml").task, ArithmeticConfig)
