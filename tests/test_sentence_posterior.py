"""Policies of the sentence tasks against the posterior of every sentence that there is."""

from pathlib import Path

import numpy as np
import pytest

from cluster.commands.train import train
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory
from cluster.run.evaluation import evaluate, evaluation_context
from tasks.posterior.assessment import assess
from tasks.posterior.records import PromptReport
from tasks.registry import build_task
from tests.sentence_toy import ByHand, sentence_config

both_tasks = pytest.mark.parametrize(
    ("kind", "temperature"), [("continuation", 0.8), ("infilling", 1.0)]
)


def assessed(config: RunConfig, adapter: Path | None) -> PromptReport:
    context = evaluation_context(config, adapter)
    task = build_task(config.task, context.language_model.tokenizer, seed=config.seed)
    [found] = assess(task, context).prompts
    return found


@both_tasks
def test_the_posterior_is_that_of_the_text_as_it_is_read(
    kind: str, temperature: float, tmp_path: Path
) -> None:
    config = sentence_config(kind, tmp_path, f"learner.reward_temperature.end={temperature}")
    found = assessed(config, None)
    by_hand = ByHand(config, kind)
    assert by_hand.q_N.sum() == pytest.approx(1.0, abs=1e-6)
    assert found.enumerable and found.completions == len(by_hand.completions) == 399
    assert found.log_z == pytest.approx(by_hand.log_z, abs=1e-4)
    assert found.tv == pytest.approx(by_hand.tv, abs=1e-4)
    assert by_hand.tv > 0.3


@both_tasks
def test_a_trained_policy_samples_sentences_in_proportion_to_their_rewards(
    kind: str, temperature: float, tmp_path: Path
) -> None:
    config = sentence_config(
        kind,
        tmp_path,
        "learner.steps=60",
        f"learner.reward_temperature={{start={temperature}, end={temperature}, steps=1}}",
    )
    directory = RunDirectory("run", root=tmp_path)
    train(config, directory, resume=False, address=None, local=True)
    found = assessed(config, directory.adapter)
    assert found.base.tv is not None and found.tv is not None
    assert found.base.tv > 0.6 and found.tv < 0.2  # 0.07 and 0.14


@both_tasks
@pytest.mark.parametrize("evaluated_at", [1.0, 0.3])
def test_test_prompts_tell_how_near_the_policy_is_whatever_they_are_measured_at(
    kind: str, temperature: float, evaluated_at: float, tmp_path: Path
) -> None:
    """The ELBO, against the sum over every sentence that there is."""
    config = sentence_config(
        kind,
        tmp_path,
        f"learner.reward_temperature.end={temperature}",
        f"evaluation.temperature={evaluated_at}",
        "evaluation.samples=300",
    )
    data = next(tmp_path.glob("stories.jsonl" if kind == "infilling" else "prompts.txt"))
    tested = config.task.model_copy(update={"tests": (str(data),)})
    found = evaluate(config.model_copy(update={"task": tested}), adapter=None)
    measured, ess_share = found.value(f"elbo_T{temperature:g}"), found.value("ess_share")
    assert found.value("seen") == 1 and measured is not None and ess_share is not None
    by_hand = ByHand(config, kind)
    log_w_N = np.log(by_hand.p_N) + by_hand.log_z - np.log(by_hand.q_N)
    elbo = float(by_hand.q_N @ log_w_N)
    error = float(np.sqrt(by_hand.q_N @ (log_w_N - elbo) ** 2 / 300))
    assert measured == pytest.approx(elbo, abs=5 * error)
    assert elbo + 10 * error < by_hand.log_z  # the gap, KL(q || p), is far more than noise
    assert 1 / 300 < ess_share < 1


def test_what_is_measured_is_the_reward_that_was_trained_on(tmp_path: Path) -> None:
    config = sentence_config("continuation", tmp_path, "evaluation.samples=20")
    tested = config.task.model_copy(update={"tests": (str(tmp_path / "prompts.txt"),)})
    plain = config.model_copy(update={"task": tested})
    always = {"kind": "verifier", "check": "regex", "pattern": "", "weight": 5.0}
    judged = plain.changed({"reward.terms": ({"kind": "likelihood"}, always)})
    (name,) = (name for name in evaluate(plain, adapter=None).metrics if name.startswith("elbo"))
    before, after = (evaluate(each, adapter=None).value(name) for each in (plain, judged))
    assert before is not None and after is not None
    assert after - before == pytest.approx(5.0 / float(name.partition("_T")[2]), abs=1e-3)
