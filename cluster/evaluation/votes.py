"""Counting right answers: the base LM, or the base with an adapter on it, on test questions."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from actors.policy import SamplingPolicy
from cluster.config.schema import RunConfig
from cluster.evaluation.evaluated_policy import evaluated_policy
from cluster.evaluation.measurement import Example, Spread, Votes
from lm.model import load_base
from tasks.evaluation.few_shot import worked_examples
from tasks.evaluation.votes import Voted, scores, spreads, vote
from tasks.registry import build_task
from tasks.task import QuestionTask, TestItem


class NoQuestions(ValueError):
    """Answers were to be counted for a task that asks no questions."""


def measure_votes(config: RunConfig, *, adapter: Path | None) -> Votes:
    """Vote on the items of the task's test files, and count.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        DataError: a test file is missing or malformed.
        NoQuestions: the task has none.
    """
    settings = config.evaluation
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer)
    if not isinstance(task, QuestionTask):
        raise NoQuestions(
            f"task {task.name!r} has no test questions; `amortize posterior` measures its policy"
        )
    items = [task.test_items(path)[: settings.max_items] for path in config.task.tests]
    policy = evaluated_policy(config, base, task, adapter)
    answerer = SamplingPolicy(
        load_base(config.lm),
        task.answer_actions,
        None,
        lora=config.lora,
        max_rows=settings.max_rows,
        seed=settings.seed,
    )
    shots: tuple[int, ...] = ()
    if adapter is None and settings.shots:
        shots = worked_examples(task, base.tokenizer, count=settings.shots, seed=config.seed)

    def ask(asked: Sequence[TestItem], temperature: float) -> list[Voted]:
        return vote(
            asked,
            policy=policy,
            answerer=answerer,
            decode=base.tokenizer.decode,
            parse=task.parse_answer,
            answer_context=() if shots else task.reward_query.context,
            samples=settings.samples,
            temperature=temperature,
            shots=shots,
        )

    voted = ask([item for same in items for item in same], settings.temperature)
    drawn = ask([item for same in items for item in same[: settings.diversity_items]], 1.0)
    return summarise(voted, drawn, num_examples=settings.examples)


def summarise(voted: Sequence[Voted], drawn: Sequence[Voted], *, num_examples: int) -> Votes:
    """Counts by number of operands, with some examples of each.

    Args:
        drawn: what the policy draws at temperature 1.
    """
    by_group = {str(operands): score for operands, score in scores(voted).items()}
    return Votes(
        accuracy={group: score.accuracy for group, score in by_group.items()},
        unseen={group: score.unseen for group, score in by_group.items()},
        items={group: score.items for group, score in by_group.items()},
        unseen_items={group: score.unseen_items for group, score in by_group.items()},
        unparsable={group: score.unparsable for group, score in by_group.items()},
        distinct_right={group: score.distinct_right for group, score in by_group.items()},
        spread={str(n): Spread(**asdict(spread)) for n, spread in spreads(drawn).items()},
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
