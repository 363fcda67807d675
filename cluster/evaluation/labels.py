"""Measuring policies that give reasons for labels, and language models that give labels alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.config.schema import RunConfig
from cluster.evaluation.evaluated_policy import evaluated_policy
from cluster.evaluation.measurement import Example, Labels
from cluster.evaluation.sentences import NothingToMeasure
from lm.adapter import read_adapter
from lm.config import LMConfig
from lm.merged import MergedModel
from lm.model import CausalLM, LanguageModel, load_base
from lm.sampling import Request
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from tasks.config import SubjectivityConfig
from tasks.evaluation.few_shot import answered_examples
from tasks.subjectivity.data import LABELS, Label
from tasks.subjectivity.task import ReviewItem, Subjectivity, build_subjectivity

Tokens = tuple[int, ...]


def measure_labels(
    config: RunConfig, task: SubjectivityConfig, *, adapter: Path | None, answering: LMConfig
) -> Labels:
    """Labels of the test reviews, against the true ones.

    For each review `evaluation.samples` reasons Z are drawn of the policy; the frozen LM says how
    likely either label is behind each, and the label of the greater mean counts (Bayesian model
    average). Behind worked examples (`evaluation.shots`), and of an adapter that supervised
    fine-tuning made, the label without a reason counts.

    Args:
        answering: the LM that answers, where it is not the policy's: behind an M-step.

    Raises as `cluster.evaluation.measure.measure`.
    """
    frozen = load_base(answering)
    built = build_subjectivity(task, frozen.tokenizer)
    items = built.tests[: config.evaluation.max_items]
    if not items:
        raise NothingToMeasure(f"task {built.name!r}: the test files hold no review")
    shots: Tokens = ()
    if adapter is None and config.evaluation.shots:
        shots = answered_examples(
            built, frozen.tokenizer, count=config.evaluation.shots, seed=config.seed
        )
    supervised = adapter is not None and config.learner.objective == "sft"
    bare_N = _bare(config, frozen, built, items, shots, adapter if supervised else None)
    by_label = bool(shots) or supervised
    if by_label:
        reasons, probability_NK = [[""] for _ in items], bare_N[:, None]
    else:
        reasons, probability_NK = _reasoned(config, frozen, built, items, adapter)
    right_N = _right(items, probability_NK.mean(axis=1))
    single = [_right(items, probability_N).mean() for probability_N in probability_NK.T]
    return Labels(
        items=len(items),
        samples=probability_NK.shape[1],
        answered_by="label" if by_label else "reasons",
        accuracy=float(right_N.mean()),
        single=None if by_label else float(np.mean(single)),
        bare=float(_right(items, bare_N).mean()),
        distinct=None if by_label else float(np.mean([len(set(same)) for same in reasons])),
        examples=tuple(
            Example(
                group="reviews",
                question=item.review.text,
                rationale=same[0],
                answer=_label(probability) or "",
                truth=item.review.label,
                right=bool(right),
            )
            for item, same, probability, right in zip(
                items[: config.evaluation.examples],
                reasons,
                probability_NK.mean(axis=1),
                right_N,
                strict=False,
            )
        ),
    )


def objective_probability(
    model: CausalLM,
    texts: Sequence[tuple[Tokens, Tokens]],
    answers: Mapping[Label, Tokens],
    token_budget: int,
) -> NDArray[np.float64]:
    """p(objective) among the two labels behind each text X, Z: [N]. Equal texts are scored once."""
    distinct = list(dict.fromkeys(texts))
    log_p_LD = [
        np.array(
            [
                float(score[-1])
                for score in suffix_log_rewards(
                    model, [_item(x, z, answers[label]) for x, z in distinct], token_budget
                )
            ]
        )
        for label in LABELS
    ]
    objective_D = 1 / (1 + np.exp(log_p_LD[1] - log_p_LD[0]))
    known = dict(zip(distinct, objective_D.tolist(), strict=True))
    return np.array([known[text] for text in texts])


def _item(context: Tokens, completion: Tokens, answer: Tokens) -> ScoreItem:
    """log p(Z Y | X); what two answers differ by is log p(Y | X Z)."""
    return ScoreItem(
        context=np.array(context, dtype=np.int32),
        completion=np.array(completion, dtype=np.int32),
        stops=np.array([len(completion)], dtype=np.int32),
        answer=np.array(answer, dtype=np.int32),
    )


def _bare(
    config: RunConfig,
    frozen: LanguageModel,
    task: Subjectivity,
    items: Sequence[ReviewItem],
    shots: Tokens,
    adapter: Path | None,
) -> NDArray[np.float64]:
    """p(objective) without a reason, of the LM or of the LM with an adapter: [N]."""
    model = frozen.model
    if adapter is not None:
        tuned = load_base(config.lm)
        MergedModel(tuned).load(read_adapter(adapter, tuned.fingerprint))
        model = tuned.model
    texts: list[tuple[Tokens, Tokens]] = [((*shots, *item.prompt.prompt), ()) for item in items]
    return objective_probability(model, texts, task.bare_answers, config.reward.token_budget)


def _reasoned(
    config: RunConfig,
    frozen: LanguageModel,
    task: Subjectivity,
    items: Sequence[ReviewItem],
    adapter: Path | None,
) -> tuple[list[list[str]], NDArray[np.float64]]:
    """Reasons of each review, and p(objective) behind each of them: [N, K]."""
    policy = evaluated_policy(config, load_base(config.lm), task, adapter)
    number = config.evaluation.samples
    requests = [
        Request(prompt=item.prompt.prompt, temperature=config.evaluation.temperature)
        for item in items
        for _ in range(number)
    ]
    drawn = [tuple(completion.tokens.tolist()) for completion in policy.sample(requests)]
    texts = [(request.prompt, z) for request, z in zip(requests, drawn, strict=True)]
    objective = objective_probability(frozen.model, texts, task.answers, config.reward.token_budget)
    written = [frozen.tokenizer.decode(list(z)).strip() for z in drawn]
    groups = [written[at : at + number] for at in range(0, len(written), number)]
    return groups, objective.reshape(len(items), number)


def _right(items: Sequence[ReviewItem], objective_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    truths = [item.review.label for item in items]
    return np.array([_label(p) == truth for p, truth in zip(objective_N, truths, strict=True)])


def _label(objective: float) -> Label | None:
    """The likelier label; None, which is never right, where neither is."""
    if objective == 0.5 or np.isnan(objective):
        return None
    return "objective" if objective > 0.5 else "subjective"
