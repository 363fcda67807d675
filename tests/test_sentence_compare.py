"""`amortize compare` of the sentence tasks, whole, over a tiny LM."""

import json
from pathlib import Path

import pytest

from cluster.__main__ import main
from tests.sentence_toy import sentence_overrides

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "compare.steps=2",
    "compare.search.learning_rates=[1e-3]",
    "compare.shots=1",
    "evaluation.samples=4",
    "actors.group_size=4",
    "learner.replayed_per_group=1",
    "learner.checkpoint_every_steps=9",
)
METHODS = {
    "continuation": ["base", "sft", "ppo", "gflownet_T0.9", "greedy", "beam_2x"],
    "infilling": ["base", "sft", "gflownet", "diverse_beam"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_all_methods_stand_in_one_table_and_one_figure(
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = sentence_overrides(kind, tmp_path)
    data = next(word for word in overrides if word.startswith(("task.data", "task.stories")))
    tested = f"task.tests=['{data.partition('=')[2]}']"
    monkeypatch.chdir(tmp_path)
    command = ["compare", str(ROOT / "tasks" / f"{kind}.toml"), *overrides, *SMALL, tested]
    options = ["--methods", *METHODS[kind], "--seeds", "1", "--local", "--json", "--run", "c"]
    assert main([*command, *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])  # behind what imports say
    likelihood = "max_log_likelihood" if kind == "continuation" else "log_reward"
    assert list(found["table"]) == METHODS[kind]
    for method, row in found["table"].items():
        assert row[likelihood].keys() == {"mean", "std"}
        assert row[likelihood]["mean"] < 0 <= row["diversity"]["mean"] <= 1
        trained = method.startswith(("sft", "ppo", "gflownet"))
        assert found["compute"][method]["steps"]["mean"] == (2 if trained else 0)
    assert {path.name for path in (tmp_path / "runs/c").glob("*.png")} == {
        "compare.png",
        "frontier.png",
    }
    assert (tmp_path / "runs/c/report.html").read_text().count("data:image/png") == 2
