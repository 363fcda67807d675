"""Measuring policies that write sentences: missing ones of stories, and next ones of prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.prompts import Prompt
from cluster.config.schema import RunConfig
from cluster.evaluation.evaluated_policy import likeness_of
from cluster.evaluation.measurement import Continuations, Example, Infills
from cluster.evaluation.written import Sentence, write_sentences
from learner.quality import ess_share
from lm.hub import load_tokenizer
from tasks.config import ContinuationConfig, InfillingConfig
from tasks.sentences.continuation import Continuation, build_continuation
from tasks.sentences.infilling import Infilling, build_infilling
from tasks.sentences.metrics import bleu4, diversity, gleu4, self_bleu4


class NothingToMeasure(ValueError):
    """A test file that leaves nothing to measure on."""


def measure_infills(config: RunConfig, task: InfillingConfig, *, adapter: Path | None) -> Infills:
    """Middles of the test stories against the true ones. Raises as `measure`."""
    built = build_infilling(task, load_tokenizer(config.lm))
    items = built.tests[: config.evaluation.max_items]
    _require(items, built.name)
    prompts = [item.prompt for item in items]
    written = write_sentences(config, built, prompts, adapter)
    texts = [[sentence.text for sentence in group] for group in written]
    pairs = [(z, item.middle) for item, group in zip(items, texts, strict=True) for z in group]
    likeness = likeness_of(task.embedder)
    alike = None if likeness is None else likeness(*map(list, zip(*pairs, strict=True)))
    return Infills(
        stories=len(items),
        samples=config.evaluation.samples,
        bleu4=float(np.mean([bleu4(z, true) for z, true in pairs])),
        gleu4=float(np.mean([gleu4(z, true) for z, true in pairs])),
        exact=float(np.mean([z == true for z, true in pairs])),
        similarity=None if alike is None else float(np.mean(alike)),
        log_reward=float(np.mean([one.log_reward for group in written for one in group])),
        distinct=float(np.mean([len(set(group)) for group in texts])),
        diversity=float(np.mean([diversity(group, likeness) for group in texts])),
        seen=_num_seen(built, prompts),
        self_bleu4=_self_bleu4(texts),
        **_posterior_quality(config, built, prompts, adapter, written),
        examples=tuple(
            Example(
                group="stories",
                question=item.prompt.text,
                rationale=group[0],
                answer=item.ending,
                truth=item.middle,
                right=group[0] == item.middle,
            )
            for item, group in zip(items[: config.evaluation.examples], texts, strict=False)
        ),
    )


def measure_continuations(
    config: RunConfig, task: ContinuationConfig, *, adapter: Path | None
) -> Continuations:
    """Next sentences of the test prompts: how likely, and how different. Raises as `measure`."""
    built = build_continuation(task, load_tokenizer(config.lm))
    prompts = built.tests[: config.evaluation.max_items]
    _require(prompts, built.name)
    written = write_sentences(config, built, prompts, adapter)
    texts = [[sentence.text for sentence in group] for group in written]
    log_r = [[sentence.log_reward for sentence in group] for group in written]
    likeness = likeness_of(task.embedder)
    return Continuations(
        prompts=len(prompts),
        samples=config.evaluation.samples,
        max_log_likelihood=float(np.mean([max(group) for group in log_r])),
        mean_log_likelihood=float(np.mean([value for group in log_r for value in group])),
        diversity=float(np.mean([diversity(group, likeness) for group in texts])),
        diversity_by="words" if likeness is None else "embeddings",
        seen=_num_seen(built, prompts),
        self_bleu4=_self_bleu4(texts),
        **_posterior_quality(config, built, prompts, adapter, written),
    )


def _num_seen(task: Infilling | Continuation, prompts: Sequence[Prompt]) -> int:
    trained = {prompt.key for prompt in task.prompts}
    return sum(prompt.key in trained for prompt in prompts)


def _self_bleu4(texts: Sequence[Sequence[str]]) -> float | None:
    known = [value for group in texts if (value := self_bleu4(group)) is not None]
    return float(np.mean(known)) if known else None


def _posterior_quality(
    config: RunConfig,
    task: Infilling | Continuation,
    prompts: Sequence[Prompt],
    adapter: Path | None,
    written: Sequence[Sequence[Sentence]],
) -> dict[str, float]:
    """ELBO and effective share of samples, of the policy itself: drawn anew where `written` was
    not drawn at temperature 1, and nothing where it is no draw at all."""
    asked = config.evaluation
    if asked.decoding != "sample" or asked.top_p != 1 or asked.candidates != 1:
        return {}
    if asked.temperature != 1:
        own = config.model_copy(
            update={"evaluation": asked.model_copy(update={"temperature": 1.0})}
        )
        written = write_sentences(own, task, prompts, adapter)
    temperature = config.learner.reward_temperature.end
    log_weight_PK = np.array(
        [[one.log_reward / temperature - one.log_q for one in group] for group in written]
    )
    found = {"elbo": float(log_weight_PK.mean())}
    if asked.samples > 1:
        found["ess_share"] = float(np.mean([ess_share(row_K) for row_K in log_weight_PK]))
    return found


def _require(items: Sequence[object], task: str) -> None:
    if not items:
        raise NothingToMeasure(f"task {task!r}: the test files hold nothing")
