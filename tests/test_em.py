"""`amortize em` and `mstep`: steps are ordinary runs, each from the LM of the last, none twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT
from cluster.config.validation import ConfigError
from cluster.experiments.methods import em_method_steps, method_config
from cluster.run.directory import RunDirectory
from lm.config import LMConfig
from lm.model import load_base

SMALL = [
    "learner.steps=2",
    "task.max_len=2",
    "actors.groups_per_batch=4",
    "posterior.prompts=1",
    "posterior.samples=10",
    "posterior.draws=0",
    "em.rationales=8",
]


def test_the_first_e_step_of_gflownet_em_is_gflownet() -> None:
    path = "tasks/subjectivity.toml"
    shared = [
        "cluster.time_limit_s=9.0",
        "em.rounds=2",
        "compare.overrides.gflownet_em=['learner.learning_rate=0.5']",
    ]
    gflownet = method_config(load_config(path, shared), title="gflownet", seed=3)
    steps = em_method_steps(
        load_config(path, shared), seed=3, first="c-gflownet-3", own="c-gflownet_em-3"
    )
    assert [step.run for step in steps] == [
        "c-gflownet-3", "c-gflownet_em-3-m1", "c-gflownet_em-3-e2", "c-gflownet_em-3"
    ]  # fmt: skip
    assert steps[0].config == gflownet
    assert steps[1].config.learner.learning_rate == 0.5
    assert steps[2].config.learner == gflownet.learner
    assert {step.config.seed for step in steps} == {3}
    assert {step.config.cluster.time_limit_s for step in steps} == {None}


def test_only_tasks_with_em_are_compared_with_it() -> None:
    assert load_config("tasks/subjectivity.toml").compare.methods[-1] == "gflownet_em"
    with pytest.raises(ConfigError, match='task "arithmetic" has none'):
        em_method_steps(load_config("tasks/arithmetic.toml"), seed=0, first="c", own="d")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main([*words, "--local", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_em_and_its_comparison_run_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "tasks/toy.toml"
    first = printed(capsys, "em", path, *SMALL, "--run", "a", "--rounds", "1")
    assert list(first["table"]) == ["E-step 1", "M-step 1"]
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/a-*/metrics.jsonl")}
    assert len(done) == 2
    second = printed(capsys, "em", path, *SMALL, "--run", "a", "--rounds", "2", "--resume")
    assert list(second["table"]) == ["E-step 1", "M-step 1", "E-step 2", "M-step 2"]
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())
    assert second["table"]["M-step 1"] == first["table"]["M-step 1"]
    prints = [
        load_base(LMConfig(model=str(RunDirectory(f"a-m{n}").model))).fingerprint for n in (1, 2)
    ]
    assert len({*prints, load_base(load_config(path).lm).fingerprint}) == 3
    bases = [
        (tmp_path / f"runs/a-{step}/adapter/base_fingerprint.txt").read_text().strip()
        for step in ("m1", "e2", "m2")
    ]
    assert bases[1:] == [prints[0]] * 2 and bases[0] != prints[0]

    table = printed(capsys, "compare", path, "--run", "c", "--seeds", "1", *SMALL,
                    "--methods", "gflownet_em", "gflownet")  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("runs/c-*")) == ["c-gflownet-0", "c-gflownet_em-0"]
    steps = {method: row["steps"]["mean"] for method, row in table["compute"].items()}
    assert steps == {"gflownet_em": 4, "gflownet": 2}
    assert main(["em", path, *SMALL, "seed=9", "--run", "a", "--resume", "--local"]) == 1
    assert "a-e1 was made with other settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_em_runs_on_ray(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster", "em", "tasks/toy.toml", *SMALL, "--run", "r",
               "--rounds", "1", "--json", "cluster.actors=1"]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(json.loads(done.stdout)["table"]) == ["E-step 1", "M-step 1"]
    begun = (tmp_path / "runs/r-m1/adapter/base_fingerprint.txt").read_text().strip()
    left = load_base(LMConfig(model=str(tmp_path / "runs/r-m1/model"))).fingerprint
    assert begun == load_base(load_config("tasks/toy.toml").lm).fingerprint != left
