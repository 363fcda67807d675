"""Measuring policies that give reasons for labels, and language models that give labels alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lm.model import CausalLM
from lm.next_action import next_logits
from tasks.custom import PlainTask
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Example, Metric
from tasks.evaluation.few_shot import worked_examples
from tasks.held_out import Split
from tasks.subjectivity.data import LABELS, Label, LabelledReview
from tasks.task import TestItem

Tokens = tuple[int, ...]
_TEXTS = 64  # whose answers are scored together: each has logits of the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewItem(TestItem):
    """A review to evaluate on, with its true label."""

    review: LabelledReview


@dataclass(frozen=True, kw_only=True)
class Subjectivity(PlainTask):
    """See tasks.task.Task. Nobody gives reasons, and many are right."""

    held_out: Mapping[Split, Sequence[Sequence[ReviewItem]]]
    answers: Mapping[Label, Tokens]  # Y behind a reason
    bare_answers: Mapping[Label, Tokens]  # ... and without one

    def evaluate_held_out(self, context: EvaluationContext) -> Evaluation:
        """Labels of held-out reviews, against the true ones.

        For each review `evaluation.samples` reasons Z are drawn of the policy; the frozen LM, or
        the one that an M-step left, says how likely either label is behind each, and the label of
        the greater mean counts (Bayesian model average). Behind worked examples
        (`evaluation.shots`), and of an adapter that supervised fine-tuning made, the label without
        a reason counts.

        Raises FileNotFoundError, AdapterMismatch, TooFewDemonstrations.
        """
        items = context.items(self.held_out)
        answering = context.answering or context.language_model
        tokenizer, count = answering.tokenizer, context.shots
        shots = worked_examples(self, tokenizer, count=count, seed=context.seed)
        context.progress(f"labelling {len(items)} reviews without a reason")
        texts: list[tuple[Tokens, Tokens]] = [((*shots, *item.prompt.prompt), ()) for item in items]
        with answering.with_adapter(context.adapter if context.imitates else None) as model:
            bare_N = objective_probability(model, texts, self.bare_answers)
        if shots or context.imitates:
            reasons, probability_NK = None, bare_N[:, None]
        else:
            reasons, probability_NK = _reasoned(self, context, items)
        found = [likelier_label(probability) for probability in probability_NK.mean(axis=1)]
        return Evaluation(
            task=self.name,
            temperature=context.temperature,
            metrics=_metrics(items, bare_N, probability_NK, reasons),
            examples=tuple(
                Example(
                    question=item.review.text,
                    rationale="" if reasons is None else reasons[number][0],
                    answer=found[number] or "",
                    truth=item.review.label,
                    right=found[number] == item.review.label,
                )
                for number, item in enumerate(items[: context.settings.examples])
            ),
        )


def _metrics(
    items: Sequence[ReviewItem],
    bare_N: NDArray[np.float64],
    probability_NK: NDArray[np.float64],
    reasons: Sequence[Sequence[str]] | None,
) -> dict[str, Metric]:
    """Shares of right labels, and how different the reasons are."""
    mean = partial(Metric.mean, items=len(items), samples=probability_NK.shape[1])
    by = "" if reasons is not None else ", without a reason"
    right = _right(items, probability_NK.mean(axis=1))
    accuracy = mean(f"reviews labelled right{by}", right, ".1%")
    bare = mean("... without a reason", _right(items, bare_N), ".1%")
    if reasons is None:
        return {"accuracy": accuracy, "bare": bare}
    single = [right for one_N in probability_NK.T for right in _right(items, one_N)]
    return {
        "accuracy": accuracy,
        "single": mean("... by one reason alone", single, ".1%"),
        "bare": bare,
        "distinct": mean("different reasons of a review", [len(set(z)) for z in reasons], ".2f"),
    }


def _reasoned(
    task: Subjectivity, context: EvaluationContext, items: Sequence[ReviewItem]
) -> tuple[list[list[str]], NDArray[np.float64]]:
    """Reasons of each review, and p(objective) behind each of them: [N, K]."""
    shared, number = context.language_model, context.settings.samples
    context.progress(f"drawing {number} reasons for each of {len(items)} reviews")
    asked, temperature = [item.prompt.prompt for item in items], context.settings.temperature
    drawn = context.draw(task.actions, asked, number, tool=task.tool, temperature=temperature)
    reasons = [[tuple(z.tokens.tolist()) for z in same] for same in drawn]
    texts = [(x, z) for x, same in zip(asked, reasons, strict=True) for z in same]
    context.progress(f"labelling behind {len(set(texts))} different reasons")
    answering = context.answering or shared
    objective_M = objective_probability(answering.base.model, texts, task.answers)
    decode = shared.tokenizer.decode
    written = [[decode(list(z)).strip() for z in same] for same in reasons]
    return written, objective_M.reshape(len(items), number)


def objective_probability(
    model: CausalLM, texts: Sequence[tuple[Tokens, Tokens]], answers: Mapping[Label, Tokens]
) -> NDArray[np.float64]:
    """p(objective) among the two labels behind each text X, Z: [N].

    Texts run through the model together with all that begins as they do, and only the tokens from
    which the two answers differ are scored.
    """
    first, second = (answers[label] for label in LABELS)
    same = [one == other for one, other in zip(first, second, strict=False)]
    apart = [*same, False].index(False)
    distinct = sorted({(*x, *z) for x, z in texts})
    known: dict[Tokens, float] = {}
    for at in range(0, len(distinct), _TEXTS):
        chunk = distinct[at : at + _TEXTS]
        edges = [
            ((*text, *answer[:length]), answer[length])
            for text in chunk
            for answer in (first, second)
            for length in range(apart, len(answer))
        ]
        place = {prefix: row for row, prefix in enumerate(dict.fromkeys(x for x, _ in edges))}
        log_p_PV = next_logits(model, list(place)).log_softmax(dim=-1)
        log_p_E = log_p_PV[[place[prefix] for prefix, _ in edges], [token for _, token in edges]]
        log_p_NE = log_p_E.double().cpu().numpy().reshape(len(chunk), -1)
        log_first_NE, log_second_NE = np.split(log_p_NE, [len(first) - apart], axis=1)
        odds_N = log_first_NE.sum(axis=1) - log_second_NE.sum(axis=1)
        known.update(zip(chunk, expit(odds_N).tolist(), strict=True))
    return np.array([known[(*x, *z)] for x, z in texts])


def _right(items: Sequence[ReviewItem], objective_N: NDArray[np.float64]) -> list[bool]:
    pairs = zip(items, objective_N, strict=True)
    return [likelier_label(objective) == item.review.label for item, objective in pairs]


def likelier_label(objective: float) -> Label | None:
    """The likelier label; None, which is never right, where neither is."""
    if objective == 0.5 or np.isnan(objective):
        return None
    return "objective" if objective > 0.5 else "subjective"
