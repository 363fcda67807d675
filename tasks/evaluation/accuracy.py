"""Right answers to test questions: a vote among answers that the base LM draws from rationales.

For each question `samples` rationales Z ~ q(Z | X) are drawn from the policy, and the base LM, its
adapter off, says what follows each: the likeliest Y of p_LM(Y | X Z). The commonest answer counts
(Bayesian model average, Hu et al. 2024, section 3). A text that is no answer is a vote for none,
and never a number.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm.sampling import Request
from tasks.evaluation.context import Draw, EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Example, Metric
from tasks.evaluation.few_shot import worked_examples
from tasks.task import QuestionTask, TestItem

# Low enough that the likeliest token is drawn unless the runner-up is as likely.
GREEDY_TEMPERATURE = 1e-4
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    """One question with its rationales and their answers."""

    item: TestItem
    rationales: tuple[str, ...]
    answers: tuple[int | None, ...]  # None: the text after the rationale was no answer

    @property
    def answer(self) -> int | None:
        """The commonest answer; of equally common ones, the one that was drawn first."""
        return Counter(self.answers).most_common(1)[0][0]

    @property
    def right(self) -> bool:
        """By vote."""
        return self.answer is not None and self.answer == self.item.answer

    @property
    def share_right(self) -> float:
        """Share of the rationales that led to the true answer."""
        return float(np.mean([answer == self.item.answer for answer in self.answers]))

    @property
    def distinct_right(self) -> int:
        """Different rationales that led to the true answer."""
        pairs = set(zip(self.rationales, self.answers, strict=True))
        return sum(answer == self.item.answer for _, answer in pairs)


def evaluate_answers(
    task: QuestionTask, context: EvaluationContext, *, groups: str = ""
) -> Evaluation:
    """Vote on the items of the task's test files, and count by their groups.

    Args:
        groups: what the items' groups are numbers of.

    Raises:
        FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
        DataError: a test file is malformed.
        NothingToMeasure: the files hold no question.
    """
    settings, tokenizer = context.settings, context.language_model.tokenizer
    files = [task.test_items(path)[: settings.max_items] for path in context.tests]
    items = [item for file in files for item in file]
    context.require(items, task.name)
    few = [item for file in files for item in file[: settings.diversity_items]]
    shots: Tokens = ()
    if context.shots:
        shots = worked_examples(task, tokenizer, count=context.shots, seed=context.seed)

    context.progress(f"drawing {settings.samples} rationales for each of {len(items)} questions")
    with context.language_model.with_adapter(context.adapter) as model:
        draw = context.drawing(model, task.actions, task.tool)
        count = settings.samples
        drawn = draw_rationales(items, draw, count, settings.temperature, shots)
        own = draw_rationales(few, draw, count, 1.0, shots)  # as the policy itself draws

    context.progress(f"answering behind {len(set(drawn + own))} different rationales")
    voted = vote(
        [*items, *few],
        [*drawn, *own],
        answer=context.drawing(context.language_model.base.model, task.answer_actions),
        decode=tokenizer.decode,
        parse=task.parse_answer,
        context=() if shots else task.reward_query.context,
    )
    voted, spread = voted[: len(items)], voted[len(items) :]
    metrics = {**vote_metrics(voted, settings.samples), **spread_metrics(spread, settings.samples)}
    return Evaluation(
        task=task.name,
        temperature=context.temperature,
        groups=groups,
        metrics=metrics,
        examples=tuple(_examples(voted, settings.examples)),
    )


def draw_rationales(
    items: Sequence[TestItem], draw: Draw, count: int, temperature: float, shots: Tokens = ()
) -> list[tuple[Tokens, Tokens]]:
    """Text before Z, and Z: `count` for each item, those of one item side by side.

    Args:
        shots: token ids of worked examples in front of X; empty for none.
    """
    requests = [
        Request(prompt=(*shots, *item.prompt), temperature=temperature)
        for item in items
        for _ in range(count)
    ]
    drawn = draw(requests)
    return [(r.prompt, tuple(z.tokens.tolist())) for r, z in zip(requests, drawn, strict=True)]


def vote(
    items: Sequence[TestItem],
    rationales: Sequence[tuple[Tokens, Tokens]],
    *,
    answer: Draw,
    decode: Callable[[list[int]], str],
    parse: Callable[[str], int | None],
    context: Tokens = (),
) -> list[Voted]:
    """Ask the base LM for the answers that follow the rationales.

    Args:
        rationales: from draw_rationales, as many for each item.
        answer: draws Y of the base LM; asked once for each distinct pair of X and Z.
        context: token ids in front of X when the base LM answers; empty for none.
    """
    distinct = list(dict.fromkeys(rationales))
    replies = answer(
        [Request(prompt=(*context, *x, *z), temperature=GREEDY_TEMPERATURE) for x, z in distinct]
    )
    answer_of = {
        pair: parse(decode(reply.tokens.tolist()))
        for pair, reply in zip(distinct, replies, strict=True)
    }
    count = len(rationales) // max(len(items), 1)
    groups = [rationales[at : at + count] for at in range(0, len(rationales), count)]
    return [
        Voted(
            item=item,
            rationales=tuple(decode(list(z)).strip() for _, z in group),
            answers=tuple(answer_of[pair] for pair in group),
        )
        for item, group in zip(items, groups, strict=True)
    ]


def vote_metrics(voted: Sequence[Voted], samples: int) -> dict[str, Metric]:
    """What came of the vote in each group of questions, by names such as '3 unseen'."""
    metrics = {}
    for group, same in _by_group(voted).items():
        unseen = [one.right for one in same if one.item.unseen]

        def share(
            label: str,
            values: Iterable[float],
            better: Literal["higher", "lower"] = "higher",
            *,
            count: int = len(same),
            group: str = group,
        ) -> Metric:
            return Metric(
                label=label,
                value=_mean(values),
                format=".1%",
                better=better,
                items=count,
                group=group,
            )

        right = share("all items", [one.right for one in same])
        metrics[group or "accuracy"] = right.model_copy(update={"shown": "chart"})
        metrics[f"{group} unseen".strip()] = share("unseen items only", unseen, count=len(unseen))
        wrong = [answer is None for one in same for answer in one.answers]
        metrics[f"{group} unparsable".strip()] = share("answers unparsable", wrong, "lower")
        metrics[f"{group} distinct_right".strip()] = Metric(
            label="different right rationales of a question",
            value=_mean(one.distinct_right for one in same),
            format=".2f",
            better="higher",
            items=len(same),
            samples=samples,
            group=group,
            shown="comparison",
        )
    return metrics


def spread_metrics(voted: Sequence[Voted], samples: int) -> dict[str, Metric]:
    """How what the policy itself draws spreads in each group, by names such as '3 spread right'."""
    figures: tuple[tuple[str, str, str, Callable[[Voted], float | None]], ...] = (
        ("right", "rationales that lead to the right answer", ".1%", lambda one: one.share_right),
        ("distinct_right", "different right rationales", ".2f", lambda one: one.distinct_right),
        (
            "edit_distance",
            "edit distance of two rationales over the longer one's length",
            ".3f",
            lambda one: mean_edit_distance(one.rationales),
        ),
    )
    return {
        f"{group} spread {name}".strip(): Metric(
            label=f"at temperature 1, {label}",
            value=_mean(figure(one) for one in same),
            format=read_as,
            better="higher",
            items=len(same),
            samples=samples,
            group=group,
            shown="comparison",
        )
        for group, same in _by_group(voted).items()
        for name, label, read_as, figure in figures
    }


def mean_edit_distance(texts: Sequence[str]) -> float | None:
    """Edit distance over the longer one's length, in characters, mean over all pairs: 0 where all
    are equal, 1 where no two share anything. None for fewer than two texts."""
    return _mean(Levenshtein.normalized_distance(*pair) for pair in combinations(texts, 2))


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _by_group(voted: Sequence[Voted]) -> dict[str, list[Voted]]:
    groups: dict[str, list[Voted]] = {}
    for one in voted:
        groups.setdefault(one.item.group, []).append(one)
    return dict(sorted(groups.items()))


def _examples(voted: Sequence[Voted], count: int) -> Iterator[Example]:
    """The first questions of each group, `count` in all: the same ones before and after."""
    groups = _by_group(voted)
    share = -(-count // max(len(groups), 1))
    for one in (one for same in groups.values() for one in same[:share]):
        yield Example(
            question=one.item.text,
            rationale=one.rationales[0],
            answer="" if one.answer is None else str(one.answer),
            truth=str(one.item.answer),
            right=one.right,
        )
