"""Measuring policies that write sentences: missing ones of stories, and next ones of prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.config import RunConfig
from cluster.evaluated_policy import likeness_of
from cluster.measurement import Continuations, Example, Infills
from cluster.written import write_sentences
from lm.model import load_base
from tasks.config import ContinuationConfig, InfillingConfig
from tasks.continuation import build_continuation
from tasks.infilling import build_infilling
from tasks.sentence_metrics import bleu4, diversity, gleu4


class NothingToMeasure(ValueError):
    """A test file that leaves nothing to measure on."""


def measure_infills(config: RunConfig, task: InfillingConfig, *, adapter: Path | None) -> Infills:
    """Middles of the test stories against the true ones. Raises as `measure`."""
    built = build_infilling(task, load_base(config.lm).tokenizer)
    items = built.tests[: config.evaluation.max_items]
    _require(items, built.name)
    written = write_sentences(config, built, [item.prompt for item in items], adapter)
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
    _require(prompts, built.name)
    written = write_sentences(config, built, prompts, adapter)
    log_r = [[sentence.log_reward for sentence in group] for group in written]
    likeness = likeness_of(task.embedder)
    return Continuations(
        prompts=len(prompts),
        samples=config.evaluation.samples,
        max_log_likelihood=float(np.mean([max(group) for group in log_r])),
        mean_log_likelihood=float(np.mean([value for group in log_r for value in group])),
        diversity=float(
            np.mean([diversity([one.text for one in group], likeness) for group in written])
        ),
        diversity_by="words" if likeness is None else "embeddings",
    )


def _require(items: Sequence[object], task: str) -> None:
    if not items:
        raise NothingToMeasure(f"task {task!r}: the test files hold nothing")
