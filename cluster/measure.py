"""Measuring a policy on a task's test data: the base LM, or the base with an adapter on it."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from actors.policy import SamplingPolicy
from cluster.config import RunConfig
from lm.adapter import adapter_bytes, load_adapter
from lm.model import load_base
from tasks.evaluation import Voted, scores, vote
from tasks.registry import build_task


class Example(BaseModel):
    """One question with a rationale that was sampled for it."""

    model_config = ConfigDict(frozen=True)

    group: str
    question: str
    rationale: str
    answer: str
    truth: str
    right: bool


class Measurement(BaseModel):
    """Results by group of questions (number of operands); shares in [0, 1]."""

    model_config = ConfigDict(frozen=True)

    accuracy: dict[str, float] = Field(description="Right by vote, of all items.")
    unseen: dict[str, float | None] = Field(description="... of those not in the training data.")
    items: dict[str, int]
    unseen_items: dict[str, int]
    unparsable: dict[str, float] = Field(description="Share of sampled answers that are none.")
    distinct_right: dict[str, float] = Field(description="Different right rationales, mean.")
    examples: tuple[Example, ...] = ()


class Scores(BaseModel):
    """`scores.json`: a run's measurements before training and after it, as far as they are made."""

    model_config = ConfigDict(frozen=True)

    before: Measurement | None = None
    after: Measurement | None = None


def measure(config: RunConfig, *, adapter: Path | None, data: Sequence[str] = ()) -> Measurement:
    """Vote on the items of `data`, or of the task's own test files, and count.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        DataError: a test file is missing or malformed.
    """
    settings = config.evaluation
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer)
    items = [
        item
        for path in data or config.task.tests
        for item in itertools.islice(task.test_items(path), settings.max_items)
    ]
    weights = None
    if adapter is not None:
        # Folding it in needs the plain base; peft wraps a second copy, only to read the folder.
        weights = adapter_bytes(load_adapter(load_base(config.lm), adapter))
    policy = SamplingPolicy(
        base,
        task.actions,
        task.tool,
        lora=config.lora,
        max_rows=settings.max_rows,
        seed=settings.seed,
    )
    if weights is not None:
        policy.load(weights)
    answerer = SamplingPolicy(
        load_base(config.lm),
        task.answer_actions,
        None,
        lora=config.lora,
        max_rows=settings.max_rows,
        seed=settings.seed,
    )
    voted = vote(
        items,
        policy=policy,
        answerer=answerer,
        decode=base.tokenizer.decode,
        parse=task.parse_answer,
        answer_context=task.reward_context,
        samples=settings.samples,
        temperature=settings.temperature,
    )
    return summarise(voted, num_examples=settings.examples)


def summarise(voted: Sequence[Voted], *, num_examples: int) -> Measurement:
    """Counts by number of operands, with some examples of each."""
    by_group = {str(operands): score for operands, score in scores(voted).items()}
    return Measurement(
        accuracy={group: score.accuracy for group, score in by_group.items()},
        unseen={group: score.unseen for group, score in by_group.items()},
        items={group: score.items for group, score in by_group.items()},
        unseen_items={group: score.unseen_items for group, score in by_group.items()},
        unparsable={group: score.unparsable for group, score in by_group.items()},
        distinct_right={group: score.distinct_right for group, score in by_group.items()},
        examples=tuple(_examples(voted, list(by_group), num_examples)),
    )


def _examples(voted: Sequence[Voted], groups: Sequence[str], count: int) -> Iterator[Example]:
    """The first questions of each group, `count` in all: the same ones before and after."""
    share = -(-count // max(len(groups), 1))
    for group in groups:
        of_group = [one for one in voted if str(one.item.operands) == group]
        for one in of_group[:share]:
            yield Example(
                group=group,
                question=one.item.text,
                rationale=one.rationales[0],
                answer="" if one.answer is None else str(one.answer),
                truth=str(one.item.answer),
                right=one.right,
            )
