"""`amortize compare`: what is equal, what is counted, and that finished runs are not repeated."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.__main__ import main
from cluster.config.file import load_config, resolved_toml
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments import findings, suite
from cluster.experiments.comparison import (
    Choice,
    Result,
    Trial,
    compute_of,
    figures,
    summarise,
)
from cluster.experiments.methods import member, method_config
from cluster.experiments.suite import Member, Suite, check_same_settings
from cluster.run.assembly import load_task
from cluster.run.directory import RunDirectory
from tasks.evaluation.accuracy import mean_edit_distance
from tasks.evaluation.evaluation import Evaluation, Metric, Scores
from tasks.evaluation.few_shot import TooFewDemonstrations, worked_examples
from tasks.posterior.divergence import coverage

ROOT = Path(__file__).resolve().parent.parent


def test_methods_share_everything_but_what_makes_them_one() -> None:
    path = "tasks/arithmetic.toml"
    shared = load_config(path, ["cluster.time_limit_s=9.0"])
    methods = ("sft", "ppo", "gflownet")
    configs = {m: method_config(shared, title=m, seed=2) for m in methods}
    for config in configs.values():
        assert (config.seed, config.learner.steps, config.cluster.time_limit_s) == (2, 150, None)
        assert config.actors.group_size + config.learner.replayed_per_group == 8
        assert config.learner.groups_per_step == 8
        assert config.lora == configs["gflownet"].lora and config.lm == configs["gflownet"].lm
    assert [c.learner.objective for c in configs.values()] == ["sft", "ppo", "raptb"]
    told = ["compare.overrides.ppo=['learner.learning_rate=0.5']", "compare.shots=4"]
    tuned = load_config(path, told)
    assert method_config(tuned, title="ppo", seed=0).learner.learning_rate == 0.5
    assert method_config(tuned, title="sft", seed=0).learner.learning_rate == 1e-3
    assert method_config(tuned, title="base", seed=0).evaluation.shots == 4


def measured(**values: float | None) -> Evaluation:
    metrics = {
        name: Metric(label=name, value=value, better="higher", items=3)
        for name, value in values.items()
    }
    return Evaluation(task="toy", temperature=0.5, metrics=metrics)


def test_every_metric_that_tells_good_from_bad_becomes_a_figure() -> None:
    seen = Metric(label="trained on too", value=2, better=None, items=3)
    found = measured(accuracy=0.5, unseen=None, elbo=-6.0).with_metrics({"seen": seen})
    assert figures(found) == {"accuracy": 0.5, "elbo": -6.0}


def test_means_and_deviations_are_over_the_seeds() -> None:
    results = [
        Result(method="sft", seed=seed, run="r", metrics={"3": value}, compute={})
        for seed, value in enumerate((0.1, 0.2, 0.6))
    ]
    one = summarise(results, "metrics")["sft"]["3"]
    assert one.mean == pytest.approx(0.3) and one.std == pytest.approx(0.26457513)
    assert summarise(results[:1], "metrics")["sft"]["3"].std is None


def test_edit_distance_is_the_mean_over_pairs() -> None:
    assert mean_edit_distance(["abcd", "abcd", "abxy"]) == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert mean_edit_distance(["abcd"]) is None


def member_of(*told: str) -> Member:
    shared = load_config("tasks/toy.toml", told)
    return member(shared, "gflownet", seed=0, run="c-gflownet-0", gflownet="c-gflownet-0")


def finished_run(folder: Path, config: RunConfig, bind: str) -> RunDirectory:
    """A run that is done, and listened at the address `bind`."""
    buffer = config.buffer.model_copy(update={"bind": bind})
    run = RunDirectory("c-gflownet-0", root=folder)
    run.path.mkdir(parents=True)
    run.config_file.write_text(resolved_toml(config.model_copy(update={"buffer": buffer})))
    return run


def test_a_run_that_a_cluster_finished_is_not_taken_for_another(tmp_path: Path) -> None:
    config = member_of().steps[-1].config
    run = finished_run(tmp_path, config, "10.0.0.7")
    check_same_settings(run, config)
    with pytest.raises(UserError, match="with other settings"):
        check_same_settings(run, config.model_copy(update={"seed": 9}))


def test_what_other_methods_are_told_leaves_a_finished_run_as_it_is(tmp_path: Path) -> None:
    run = finished_run(tmp_path, member_of().steps[-1].config, "auto")
    told = ["compare.overrides.sft=['learner.learning_rate=0.5']", "compare.methods=['base']"]
    check_same_settings(run, member_of(*told).steps[-1].config)
    other = member_of("compare.overrides.gflownet=['learner.learning_rate=0.5']")
    with pytest.raises(UserError, match="with other settings"):
        check_same_settings(run, other.steps[-1].config)


def test_a_finished_run_of_before_a_key_was_made_with_its_default(tmp_path: Path) -> None:
    config = member_of().steps[-1].config
    run = finished_run(tmp_path, config, "auto")
    text = run.config_file.read_text()
    assert "max_unstored = 0\n" in text and "lag_versions = 0\n" in text
    earlier = text.replace("max_unstored = 0", "max_in_flight = 2")
    run.config_file.write_text(earlier.replace("lag_versions = 0\n", ""))
    check_same_settings(run, config)
    elsewhere = {"cluster.address": "auto", "cluster.learner_placement.gpus": 1.0}
    check_same_settings(run, config.changed({**elsewhere, "tracking.trackers": ("wandb",)}))
    with pytest.raises(UserError, match=r"\(actors.lag_versions\): choose another"):
        check_same_settings(run, config.changed({"actors.lag_versions": 1}))


def test_errors_for_people_name_the_run_and_defects_keep_their_traceback() -> None:
    title = member_of().title
    with (
        pytest.raises(UserError, match=r"gflownet, seed 0 \(run c-.*: no such"),
        suite._named(title),
    ):
        raise TooFewDemonstrations("no such")
    with pytest.raises(ValueError, match="shapes") as defect, suite._named(title):
        raise ValueError("shapes")
    assert defect.value.__notes__ == ["in gflownet, seed 0 (run c-gflownet-0)"]


def test_training_time_is_that_of_all_sittings(tmp_path: Path) -> None:
    run = RunDirectory("r", root=tmp_path)
    run.path.mkdir()
    assert compute_of(run, scored_by_lm=True)["training_s"] == 0
    rows = [(1, 2.0), (2, 5.0), (2, 1.0), (3, 4.0)]
    lines = [json.dumps({"step": step, "time/elapsed_s": time_s}) for step, time_s in rows]
    run.metrics_file.write_text("\n".join(lines) + "\n")
    assert compute_of(run, scored_by_lm=True)["training_s"] == 9
    assert compute_of(run, scored_by_lm=True)["steps"] == 3


@pytest.mark.parametrize("seeds", ["0", "-1", "many"])
def test_a_comparison_has_at_least_one_seed(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "tasks/toy.toml", f"--seeds={seeds}"])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_a_comparison_that_there_is_not_is_not_begun_by_resuming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(ROOT / "tasks/toy.toml"), "--resume", "--run", "mistyped"]) == 1
    assert "no run 'mistyped' in" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("task", "methods", "told", "alone"),
    [
        # Without test files each seed has draws of its own.
        ("toy", ["ppo", "gflownet"], [None, 0, None, 2], 0),
        ("continuation", ["ppo", "gflownet"], [None, 0, 0, 0], 0),
        # How far it is from the posterior depends on T.
        ("continuation", ["gflownet", "gflownet_T0.7"], [None, None, 0, 1], 0),
        # Of the method that is the base each seed has draws of its own, the first those of runs.
        ("continuation", ["base", "ppo"], [-1, -1], 2),
        ("continuation", ["ppo", "base"], [None, 0], 1),
    ],
)
def test_the_base_is_measured_once_for_all_runs_that_would_find_the_same(
    task: str,
    methods: list[str],
    told: list[int | None],
    alone: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[float | None] = []
    seeds: list[int] = []

    def evaluate(config: RunConfig, **_: object) -> Evaluation:
        seeds.append(config.evaluation.seed)
        return measured(tv=-len(seeds))

    def train(
        config: RunConfig, directory: RunDirectory, *, before: Evaluation | None, **_: object
    ) -> Scores:
        found = measured(tv=len(given))
        given.append(None if before is None else before.value("tv"))
        scores = Scores(before=before or found, after=found)
        directory.path.mkdir(parents=True)
        directory.scores_file.write_text(scores.model_dump_json())
        return scores

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "train", train)
    monkeypatch.setattr(suite, "evaluate", evaluate)
    monkeypatch.setattr(findings.Findings, "leave", lambda *_: None)
    words = [str(ROOT / f"tasks/{task}.toml"), "compare.search.learning_rates=[]"]
    words += ["--run", "c", "--seeds", "2", "--local"]
    assert main(["compare", *words, "--methods", *methods]) == 0
    assert given == told and len(seeds) == alone


def test_steps_at_equal_tokens_are_as_many_as_gflownets_tokens_pay_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = {"gflownet": 30.0, "ppo": 20.0, "ppo_tokens": 20.0}  # tokens of a step
    taken: list[tuple[str, int, int]] = []

    def result(_: Suite, member: Member, __: str) -> Result:
        config = member.steps[-1].config
        steps, seed = config.learner.steps, config.seed
        taken.append((member.method, seed, steps))
        tokens = steps * (cost[member.method] + 30 * seed * (member.method == "gflownet"))
        compute = {"steps": float(steps), "tokens": tokens}
        own = {"method": member.method, "seed": seed, "run": member.run}
        return Result(**own, metrics={}, compute=compute)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Suite, "result", result)
    monkeypatch.setattr(findings.Findings, "leave", lambda *_: None)
    words = ["compare", str(ROOT / "tasks/toy.toml"), "compare.steps=100", "--seeds", "2"]
    assert main([*words, "--methods", "ppo", "gflownet", "ppo_tokens"]) == 0
    assert [row for row in taken if row[0] == "ppo_tokens"] == [
        ("ppo_tokens", 0, 150),
        ("ppo_tokens", 1, 300),
    ]
    assert {steps for name, _, steps in taken if name != "ppo_tokens"} == {100}
    assert main([*words, "--methods", "ppo", "ppo_tokens", "gflownet"]) == 1
    assert "ppo_tokens takes its number of steps from gflownet" in capsys.readouterr().err


SMALL = [
    "compare.steps=2",
    "actors.groups_per_batch=4",
    "posterior.prompts=1",
    "posterior.samples=10",
    "posterior.draws=0",
]


@pytest.mark.slow
def test_the_command_compares_and_does_not_repeat_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(ROOT / "tasks/toy.toml"), *SMALL]
    words += ["--run", "c", "--local", "--json", "--seeds", "1"]
    methods = ["base", "ppo", "gflownet", "ppo_tokens"]
    first = subprocess.run(
        [sys.executable, "-m", "cluster", *words, "--methods", *methods],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=100,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr[-2000:]
    found = json.loads(first.stdout)
    assert list(found["table"]) == methods
    assert set(found["table"]["ppo"]["tv"]) == {"mean", "std"}
    assert found["table"]["base"]["coverage"]["mean"] <= 1
    equal = {m: found["compute"][m]["trajectories"]["mean"] for m in ("ppo", "gflownet")}
    assert equal == {"ppo": 128, "gflownet": 128}
    assert found["compute"]["ppo"]["tokens_base"]["mean"] > 0
    page = (tmp_path / "runs/c/report.html").read_text()
    assert "gflownet" in page and "data:image/png" in page

    monkeypatch.chdir(tmp_path)
    metrics = tmp_path / "runs/c-ppo-0/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert main([*words, "--methods", *methods, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] == found["table"]
    assert metrics.stat().st_mtime_ns == before

    assert main([*words, "--methods", "sft", "--resume"]) == 1
    refused = capsys.readouterr().err
    assert "sft, seed 0 (run c-sft-0)" in refused and "--methods" in refused


def test_worked_examples_are_whole_demonstrations_chosen_by_the_seed() -> None:
    base, task = load_task(load_config("tasks/arithmetic.toml"))
    shown = worked_examples(task, base.tokenizer, count=2, seed=0)
    lines = base.tokenizer.decode(list(shown)).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Question: ") and "The answer is" in line for line in lines)
    assert shown == worked_examples(task, base.tokenizer, count=2, seed=0)
    assert shown != worked_examples(task, base.tokenizer, count=2, seed=1)
    with pytest.raises(TooFewDemonstrations, match="has 50 demonstrations"):
        worked_examples(task, base.tokenizer, count=51, seed=0)


def test_coverage_is_the_mass_of_the_modes_that_are_not_missed() -> None:
    log_p_N = np.log([0.6, 0.3, 0.1])
    assert coverage(log_p_N, log_p_N) == pytest.approx(1.0)
    assert coverage(np.log([0.979, 0.02, 0.001]), log_p_N) == pytest.approx(0.6)
    assert coverage(np.log([0.02, 0.9, 0.08]), log_p_N) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("held_out", "said"), [(True, "on the validation split"), (False, "toy holds no data out")]
)
def test_what_methods_were_chosen_by_is_said(
    held_out: bool, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(run="t", values={"learner.learning_rate": 1e-3}, figure=0.1)
    chosen = {"metric": "tv", "better": "lower", "seed": 1000, "trials": (trial,), "chosen": trial}
    choice = Choice(method="gflownet", **chosen)
    measured = Result(method="gflownet", seed=0, run="r", metrics={"tv": 0.1}, compute={"steps": 1})
    folder = RunDirectory("compared", root=tmp_path)
    folder.path.mkdir(parents=True)
    found = findings.Findings(folder, "compare", "toy", [measured], [choice], held_out=held_out)
    found.leave()
    found.show("toy", as_json=False, console=Console(width=200))
    page, markdown = folder.report_file.read_text(), (folder.path / "compare.md").read_text()
    assert all(said in text for text in (capsys.readouterr().out, page, markdown))
