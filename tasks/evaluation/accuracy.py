"""Right answers to test questions: a vote among answers that the base LM draws from rationales.

For each question `samples` rationales Z ~ q(Z | X) are drawn, and the base LM, adapter off, says
what follows each: the likeliest Y of p_LM(Y | X Z). The commonest answer counts (Bayesian model
average, Hu et al. 2024, section 3). A text that is no answer is a vote for none.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from rapidfuzz.distance import Levenshtein

from lm.sampling import Completion, Request
from lm.tools import ToolFault
from tasks.evaluation.context import Attempts, Draw, EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Example, Metric, mean_of
from tasks.evaluation.few_shot import worked_examples
from tasks.task import Answer, QuestionTask, TestQuestion

GREEDY_TEMPERATURE = 1e-4  # draws the likeliest token unless the runner-up is as likely
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    """One question with its rationales and their answers."""

    item: TestQuestion
    rationales: tuple[str | None, ...]  # None: a tool ended it
    answers: tuple[Answer | None, ...]  # None: no rationale, or what followed was no answer

    @property
    def written(self) -> list[str]:
        """The rationales that no tool ended."""
        return [text for text in self.rationales if text is not None]

    @property
    def answer(self) -> Answer | None:
        """The commonest answer; of equally common ones, the one that was drawn first."""
        return Counter(self.answers).most_common(1)[0][0]

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer == self.item.answer

    @property
    def share_right(self) -> float:
        """Of the rationales, those that led to the true answer."""
        return self.answers.count(self.item.answer) / len(self.answers)

    @property
    def distinct_right(self) -> int:
        """Different rationales that led to the true answer."""
        pairs = set(zip(self.rationales, self.answers, strict=True))
        return sum(answer == self.item.answer for _, answer in pairs)


def evaluate_answers(
    task: QuestionTask, context: EvaluationContext, *, groups: str = "", lead: Tokens = ()
) -> Evaluation:
    """Vote on the held-out questions of a task, and count by their groups, numbers of `groups`.

    Args:
        lead: what every answer begins with, which the LM need not say.

    Raises FileNotFoundError, AdapterMismatch: no adapter there, or one of another base.
    """
    settings, tokenizer = context.settings, context.language_model.tokenizer
    items = context.items(task.held_out)
    few = context.items(task.held_out, at_most=settings.diversity_items)
    shots = worked_examples(task, tokenizer, count=context.shots, seed=context.seed)
    context.progress(f"drawing {settings.samples} rationales for each of {len(items)} questions")

    def draw(texts: Sequence[Tokens], temperature: float) -> Attempts:
        return context.attempt(
            task.actions, texts, settings.samples, tool=task.tool, temperature=temperature
        )

    asked = [(*shots, *item.prompt.prompt) for item in items]
    asked_few = [(*shots, *item.prompt.prompt) for item in few]
    drawn = [*draw(asked, settings.temperature), *draw(asked_few, 1.0)]
    context.progress(f"answering behind {sum(map(len, drawn))} rationales")
    voted = vote(
        [*items, *few],
        [*asked, *asked_few],
        [
            [tuple(z.tokens.tolist()) if isinstance(z, Completion) else None for z in same]
            for same in drawn
        ],
        answer=context.drawing(context.language_model.base.model, task.answer_actions),
        decode=tokenizer.decode,
        parse=task.parse_answer,
        context=() if shots else task.reward_query.context,
        lead=lead,
    )
    voted, spread = voted[: len(items)], voted[len(items) :]
    return Evaluation(
        task=task.name,
        temperature=context.temperature,
        groups=groups,
        metrics=vote_metrics(voted, settings.samples) | spread_metrics(spread, settings.samples),
        note=lost(drawn),
        examples=tuple(_examples(voted, settings.examples)),
    )


def vote(
    items: Sequence[TestQuestion],
    asked: Sequence[Tokens],
    rationales: Sequence[Sequence[Tokens | None]],
    *,
    answer: Draw,
    decode: Callable[[list[int]], str],
    parse: Callable[[str], Answer | None],
    context: Tokens = (),
    lead: Tokens = (),
) -> list[Voted]:
    """Ask the base LM for the answers that follow the rationales, once for equal ones of a text.

    Args:
        asked: the text that each item's rationales stand behind.
        rationales: None of what has none, which is a vote for no answer.
        answer: draws Y of the base LM.
        context: token ids in front of the text when the base LM answers.
        lead: what every answer begins with, which the LM need not say.
    """
    pairs = [(x, z) for x, same in zip(asked, rationales, strict=True) for z in same]
    distinct = list(dict.fromkeys((x, z) for x, z in pairs if z is not None))
    replies = answer(
        [
            Request(prompt=(*context, *x, *z, *lead), temperature=GREEDY_TEMPERATURE)
            for x, z in distinct
        ]
    )
    answer_of = {
        pair: parse(decode(reply.tokens.tolist()))
        for pair, reply in zip(distinct, replies, strict=True)
    }
    return [
        Voted(
            item=item,
            rationales=tuple(None if z is None else decode(list(z)).strip() for z in same),
            answers=tuple(None if z is None else answer_of[x, z] for z in same),
        )
        for item, x, same in zip(items, asked, rationales, strict=True)
    ]


def lost(drawn: Attempts) -> str:
    """How many rationales tools have ended, for people; "" for none."""
    faults = [one for same in drawn for one in same if isinstance(one, ToolFault)]
    if not faults:
        return ""
    return (
        f"{len(faults)} of {sum(map(len, drawn))} rationales were ended by a tool, and lead to no "
        f"answer: {faults[0].reason}"
    )


def vote_metrics(voted: Sequence[Voted], samples: int) -> dict[str, Metric]:
    """What came of the vote in each group of questions, by names such as '3 unseen'."""
    metrics: dict[str, Metric] = {}
    for group, same in _by_group(voted).items():
        unseen = [one.right for one in same if one.item.unseen]
        none = [answer is None for one in same for answer in one.answers]
        of_group = partial(Metric.mean, group=group, items=len(same))
        figures = {
            "": of_group("all items", [one.right for one in same], ".1%", shown="chart"),
            "unseen": of_group("unseen items only", unseen, ".1%", items=len(unseen)),
            "unparsable": of_group("answers unparsable", none, ".1%", "lower"),
            "distinct_right": of_group(
                "different right rationales of a question",
                [one.distinct_right for one in same],
                ".2f",
                samples=samples,
                shown="comparison",
            ),
        }
        metrics |= {f"{group} {name}".strip() or "accuracy": m for name, m in figures.items()}
    return metrics


def spread_metrics(voted: Sequence[Voted], samples: int) -> dict[str, Metric]:
    """How what the policy itself draws spreads in each group, by names such as '3 spread right'."""
    metrics: dict[str, Metric] = {}
    for group, same in _by_group(voted).items():
        drawn = partial(
            Metric.mean, group=group, items=len(same), samples=samples, shown="comparison"
        )
        right = [one.share_right for one in same]
        distinct = [one.distinct_right for one in same]
        distance = [mean_edit_distance(one.written) for one in same]
        figures = {
            "right": drawn("right rationales at temperature 1", right, ".1%"),
            "distinct_right": drawn("different right ones at temperature 1", distinct, ".2f"),
            "edit_distance": drawn("edit distance of two rationales at temperature 1", distance),
        }
        metrics |= {f"{group} spread {name}".strip(): m for name, m in figures.items()}
    return metrics


def mean_edit_distance(texts: Sequence[str]) -> float | None:
    """Edit distance over the longer one's length, in characters, mean over all pairs: 0 where all
    are equal, 1 where no two share anything. None for fewer than two texts."""
    return mean_of(Levenshtein.normalized_distance(*pair) for pair in combinations(texts, 2))


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
            question=one.item.prompt.text,
            rationale=next(iter(one.written), ""),
            answer="" if one.answer is None else str(one.answer),
            truth=str(one.item.answer),
            right=one.right,
        )
