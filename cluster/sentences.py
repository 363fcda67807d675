"""Measuring policies that write sentences: missing ones of stories, and next ones of prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.prompts import Prompt
from cluster.config import RunConfig
from cluster.evaluated_policy import evaluated_policy, likeness_of
from cluster.measurement import Continuations, Example, Infills
from lm.model import load_base
from lm.sampling import Request
from tasks.config import ContinuationConfig, InfillingConfig
from tasks.continuation import Continuation, build_continuation
from tasks.infilling import Infilling, build_infilling
from tasks.log_reward import log_reward_of
from tasks.posterior.weights import log_rewards
from tasks.sentence_metrics import bleu4, diversity, gleu4


class NothingToMeasure(ValueError):
    """A test file that leaves nothing to measure on."""


def measure_infills(config: RunConfig, task: InfillingConfig, *, adapter: Path | None) -> Infills:
    """Middles of the test stories against the true ones. Raises as `measure`."""
    built = build_infilling(task, load_base(config.lm).tokenizer)
    items = built.tests[: config.evaluation.max_items]
    texts, log_r = _write(config, built, [item.prompt for item in items], adapter)
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
        log_reward=float(np.mean(log_r)),
        distinct=float(np.mean([len(set(group)) for group in texts])),
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
    built = build_continuation(task, load_base(config.lm).tokenizer)
    prompts = built.tests[: config.evaluation.max_items]
    texts, log_r = _write(config, built, prompts, adapter)
    likeness = likeness_of(task.embedder)
    return Continuations(
        prompts=len(prompts),
        samples=config.evaluation.samples,
        max_log_likelihood=float(np.mean([max(group) for group in log_r])),
        mean_log_likelihood=float(np.mean(log_r)),
        diversity=float(np.mean([diversity(group, likeness) for group in texts])),
        diversity_by="words" if likeness is None else "embeddings",
    )


def _write(
    config: RunConfig,
    task: Infilling | Continuation,
    prompts: Sequence[Prompt],
    adapter: Path | None,
) -> tuple[list[list[str]], list[list[float]]]:
    """Sentences for each prompt, and log R of each under the frozen LM, nats."""
    if not prompts:
        raise NothingToMeasure(f"task {task.name!r}: the test files hold nothing")
    frozen = load_base(config.lm)
    policy = evaluated_policy(config, load_base(config.lm), task, adapter)
    settings = config.evaluation
    drawn = policy.sample(
        [
            Request(prompt=prompt.prompt, temperature=settings.temperature)
            for prompt in prompts
            for _ in range(settings.samples)
        ]
    )
    sentences = [tuple(completion.tokens.tolist()) for completion in drawn]
    size = settings.samples
    groups = [sentences[at : at + size] for at in range(0, len(sentences), size)]
    log_reward = log_reward_of(task, frozen.model, config.reward.token_budget)
    log_r = [
        log_rewards(group, prompt, task.reward_query, log_reward).tolist()
        for group, prompt in zip(groups, prompts, strict=True)
    ]
    decode = frozen.tokenizer.decode
    return [[decode(list(z)).strip() for z in group] for group in groups], log_r
