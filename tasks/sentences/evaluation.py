"""Measuring sentences that a policy writes, whatever they are for: how likely, how different."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from actors.prompts import Prompt
from learner.step_metrics import ess_share
from lm.decoding import BeamSearch, Hypothesis
from lm.embedding import SentenceEmbedder
from tasks.custom import PlainTask
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Metric
from tasks.evaluation.few_shot import worked_examples
from tasks.held_out import Split
from tasks.posterior.weights import log_reward_of, log_rewards
from tasks.sentences.metrics import Likeness, diversity, self_bleu4
from tasks.task import Task

_Tokens = tuple[int, ...]


class Sentence(NamedTuple):
    """One that was written for a prompt; nats."""

    text: str
    log_reward: float  # under the frozen LM, untempered
    log_q: float  # under the policy at temperature 1, stop included, however it was decoded


def likeness_of(embedder: str | None) -> Likeness | None:
    """Cosine of sentence vectors; None where no encoder is named. Raises ModelNotFound."""
    if embedder is None:
        return None
    encoder = SentenceEmbedder(embedder)

    def likeness(ones: Sequence[str], others: Sequence[str]) -> list[float]:
        cosine_N = (encoder.embed(ones) * encoder.embed(others)).sum(dim=-1)
        return [float(cosine) for cosine in cosine_N]

    return likeness


@dataclass(frozen=True, kw_only=True)
class SentenceTask(PlainTask):
    """A task of one sentence, measured on held-out prompts by what is written."""

    embedder: str | None = None  # of sentences that are compared; None: by words

    def check_evaluation(self, split: Split = "test") -> None:
        """Raises ModelNotFound, too, where the encoder of sentences is not there."""
        super().check_evaluation(split)
        if self.held_out[split]:
            likeness_of(self.embedder)


def write_sentences(
    task: Task,
    context: EvaluationContext,
    prompts: Sequence[Prompt],
    *,
    temperature: float | None = None,
) -> list[list[Sentence]]:
    """For each prompt `evaluation.samples` sentences, fewer where beams find no more.

    Of more `candidates`, the likeliest that differ. The base LM (no adapter) reads
    `evaluation.shots` worked examples first.

    Args:
        temperature: at which they are drawn; None: that of the settings.

    Raises TooFewDemonstrations, FileNotFoundError, AdapterMismatch, CheckFailed.
    """
    settings, shared = context.settings, context.language_model
    shots = worked_examples(task, shared.tokenizer, count=context.shots, seed=context.seed)
    shown = [(*shots, *prompt.prompt) for prompt in prompts]
    context.progress(f"writing {settings.samples} sentences for each of {len(prompts)} prompts")
    groups = _decode(task, context, shown, temperature or settings.temperature)
    several = settings.candidates > 1
    if several:
        groups = [list({draft.tokens: draft for draft in group}.values()) for group in groups]
    context.progress(f"scoring {sum(map(len, groups))} sentences")
    log_r = log_rewards(
        [draft.tokens for group in groups for draft in group],
        [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group],
        task.reward_query,
        log_reward_of(task, shared.base.model, context.token_budget, context.terms),
    )
    scored = iter(log_r.tolist())

    def scored_sentence(draft: Hypothesis) -> Sentence:
        text = shared.tokenizer.decode(list(draft.tokens)).strip()
        return Sentence(text, next(scored), draft.log_q)

    written = [[scored_sentence(draft) for draft in group] for group in groups]
    if several:
        written = [sorted(group, key=lambda sentence: -sentence.log_reward) for group in written]
    return [group[: settings.samples] for group in written]


def _decode(
    task: Task, context: EvaluationContext, texts: Sequence[_Tokens], temperature: float
) -> list[list[Hypothesis]]:
    """`samples` x `candidates` completions of each text."""
    settings = context.settings
    number = settings.samples * settings.candidates
    if settings.decoding == "sample":
        draw = partial(context.draw, temperature=temperature, top_p=settings.top_p)
        drawn = draw(task.actions, texts, number, tool=task.tool)
        return [
            [Hypothesis(tokens=tuple(z.tokens.tolist()), log_q=z.log_q) for z in same]
            for same in drawn
        ]
    with context.language_model.with_adapter(context.adapter) as model:
        search = BeamSearch(
            model,
            task.actions,
            beams=number,
            groups=number if settings.decoding == "diverse_beam" else 1,
            penalty=settings.diversity_penalty,
            max_rows=settings.max_rows,
        )
        return search.search(texts)


def sentence_metrics(
    task: Task,
    context: EvaluationContext,
    prompts: Sequence[Prompt],
    written: Sequence[Sequence[Sentence]],
    likeness: Likeness | None,
) -> dict[str, Metric]:
    """Diversity, nearness to the posterior, and how many of the prompts were trained on."""
    texts = [[sentence.text for sentence in group] for group in written]
    mean = partial(Metric.mean, items=len(prompts), samples=context.settings.samples)
    unlike = "words" if likeness is None else "embeddings"
    metrics = {
        "diversity": mean(f"diversity, by {unlike}", [diversity(t, likeness) for t in texts]),
        "self_bleu4": mean("self-BLEU-4", [self_bleu4(group) for group in texts], better="lower"),
        **_posterior_metrics(task, context, prompts, written),
    }
    trained = {prompt.key for prompt in task.prompts}
    metrics["seen"] = Metric(
        label="of the prompts, trained on too",
        value=sum(prompt.key in trained for prompt in prompts),
        format=".0f",
        better=None,
        items=len(prompts),
    )
    return {name: metric for name, metric in metrics.items() if metric.value is not None}


def _posterior_metrics(
    task: Task,
    context: EvaluationContext,
    prompts: Sequence[Prompt],
    written: Sequence[Sequence[Sentence]],
) -> dict[str, Metric]:
    """ELBO and effective share of samples, of the policy itself: drawn anew where `written` was
    not drawn at temperature 1, and nothing where it is no draw at all."""
    settings, temperature = context.settings, context.temperature
    if settings.decoding != "sample" or settings.top_p != 1 or settings.candidates != 1:
        return {}
    if settings.temperature != 1:
        written = write_sentences(task, context, prompts, temperature=1.0)
    log_weight_PK = np.array(
        [[one.log_reward / temperature - one.log_q for one in group] for group in written]
    )
    mean = partial(Metric.mean, items=len(prompts), samples=settings.samples)
    log_weights = log_weight_PK.flatten().tolist()
    metrics = {f"elbo_T{temperature:g}": mean("ELBO of log Z, nats", log_weights, ".2f")}
    if settings.samples > 1:
        shares = [ess_share(row_K) for row_K in log_weight_PK]
        metrics["ess_share"] = mean("effective share of samples", shares, ".1%")
    return metrics
