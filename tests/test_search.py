"""`[compare.search]`: equal trials on validation data, the best taken, and test data left alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.config.file import load_config, resolved_toml
from cluster.config.schema import RunConfig
from cluster.experiments import suite
from cluster.experiments.search import headline, tried_values
from cluster.run import evaluation
from cluster.run.directory import RunDirectory
from cluster.run.evaluation import evaluate
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Metric, Scores

TOY = str(Path(__file__).resolve().parent.parent / "tasks/toy.toml")
SEARCH = "compare.search={learning_rates=[0.001, 0.01, 0.1], kl=[0.5, 2.0]}"


class HeldOut(Mapping[Any, Sequence[Sequence[str]]]):
    """Data of both splits, which notes when either is read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __getitem__(self, split: str) -> Sequence[Sequence[str]]:
        self.read.append(split)
        return [[split]]

    def __iter__(self) -> Iterator[str]:
        return iter(("validation", "test"))

    def __len__(self) -> int:
        return 2


class Trained:
    """Stands for `train`: measures as a run does, and finds 0.01 the best rate but for ppo."""

    def __init__(self) -> None:
        self.held_out = HeldOut()
        self.configs: dict[str, RunConfig] = {}  # of what was trained, by run
        self.read_by: dict[str, list[str]] = {}
        self._config: RunConfig

    def __call__(
        self, config: RunConfig, directory: RunDirectory, *, before: Evaluation | None, **_: object
    ) -> Scores:
        assert directory.name not in self.configs
        self.held_out.read = []
        before = before or self.measure(config, adapter=None)
        scores = Scores(before=before, after=self.measure(config, adapter=None))
        directory.path.mkdir(parents=True)
        directory.config_file.write_text(resolved_toml(config))
        directory.scores_file.write_text(scores.model_dump_json())
        self.configs[directory.name], self.read_by[directory.name] = config, [*self.held_out.read]
        return scores

    def measure(self, config: RunConfig, **told: Any) -> Evaluation:
        """Of the base LM too, in this process."""
        self._config = config
        return evaluate(config, **told)

    def build_task(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(evaluate=self._evaluate)

    def _evaluate(self, context: EvaluationContext) -> Evaluation:
        [split] = context.items(self.held_out)
        learner = self._config.learner
        best = 0.1 if learner.objective == "ppo" else 0.01
        value = abs(learner.learning_rate - best) + (split == "test")
        metric = Metric(label="", value=value, better="lower", items=1)
        return Evaluation(task="toy", temperature=1.0, metrics={"tv": metric}, note="Met before.")


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    monkeypatch.chdir(tmp_path)
    stand_in = Trained()
    monkeypatch.setattr(suite, "train", stand_in)
    monkeypatch.setattr(suite, "evaluate", stand_in.measure)
    monkeypatch.setattr(evaluation, "build_task", stand_in.build_task)
    return stand_in


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    command = ["compare", TOY, SEARCH, "--run", "c", "--seeds", "2", "--json", "--local", *words]
    assert main([*command, "--methods", "base", "ppo", "gflownet_em", "gflownet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_on_validation_is_taken_and_trials_read_no_test_data(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys)
    trials = [run for run in trained.configs if "-trial" in run]
    assert list(trained.configs)[: len(trials)] == trials  # all of them before anything is tested
    assert {split for run in trials for split in trained.read_by[run]} == {"validation"}
    assert {trained.configs[run].seed for run in trials} == {1000}
    final = {run: config for run, config in trained.configs.items() if run not in trials}
    assert len(final) == 6
    assert {split for run in final for split in trained.read_by[run]} == {"test"}

    chosen = {title: choice["chosen"]["values"] for title, choice in found["search"].items()}
    assert chosen["gflownet"] == chosen["gflownet_em"] == {"learner.learning_rate": 0.01}
    assert chosen["ppo"]["learner.learning_rate"] == 0.1
    for run, config in final.items():
        values = chosen[run.split("-")[1]]
        assert config.learner.learning_rate == values["learner.learning_rate"]
        assert config.learner.ppo_kl == values.get("learner.ppo_kl", config.learner.ppo_kl)
    # An M-step is tried on what gflownet's best trial has learned.
    tried = trained.configs["c-gflownet_em-trial1"]
    assert str(tried.em.policy).endswith("runs/c-gflownet-trial2/adapter")

    assert found["notes"] == ["Met before."]
    page, table = (Path("runs/c", name).read_text() for name in ("report.html", "compare.md"))
    for told in ("Met before.", "learning_rate 0.001: 0.009; learning_rate 0.01: 0; "):
        assert told in page and told in table


def test_every_method_has_as_many_trials(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys)
    assert {len(choice["trials"]) for choice in found["search"].values()} == {3}
    ppo = [trial["values"] for trial in found["search"]["ppo"]["trials"]]
    assert [values["learner.learning_rate"] for values in ppo] == [0.001, 0.01, 0.1]
    assert {values["learner.ppo_kl"] for values in ppo} == {0.5, 2.0}
    search = load_config(TOY, [SEARCH]).compare.search
    assert tried_values(search, "ppo") == ppo


def test_trials_that_are_done_are_not_repeated(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys)
    for run in ("c-ppo-trial2", "c-gflownet-1"):  # interrupted: trained again
        RunDirectory(run).scores_file.unlink()
        RunDirectory(run).path.rename(f"{run}-away")
    trained.configs.clear()
    again = compared(capsys, "--resume")
    assert list(trained.configs) == ["c-ppo-trial2", "c-gflownet-1"]
    assert again == found


def evaluated(**values: tuple[float | None, Any, Any]) -> Evaluation:
    metrics = {
        name: Metric(label=name, value=value, better=better, items=1, shown=shown)
        for name, (value, better, shown) in values.items()
    }
    return Evaluation(task="toy", temperature=1.0, metrics=metrics)


def test_a_task_is_judged_by_its_charted_figures_or_its_first() -> None:
    seen, tv = (3.0, None, "table"), (0.2, "lower", "table")
    assert headline(evaluated(seen=seen, tv=tv, elbo=(1.0, "higher", "table"))) == (
        "tv",
        "lower",
        0.2,
    )
    three, four = (0.5, "higher", "chart"), (0.25, "higher", "chart")
    assert headline(evaluated(tv=tv, three=three, four=four)) == (
        "mean of three, four",
        "higher",
        0.375,
    )
    for value in (None, float("nan"), float("inf")):
        assert headline(evaluated(tv=(value, "lower", "table")))[2] is None
