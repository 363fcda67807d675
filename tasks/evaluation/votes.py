"""Right answers on test questions: a vote among answers that the base LM draws from rationales.

For each question `samples` rationales Z ~ q(Z | X) are drawn from the policy, and the base LM, its
adapter off, says what follows each: the likeliest Y of p_LM(Y | X Z). The commonest answer counts
(Bayesian model average, Hu et al. 2024, section 3). A text that is no answer is a vote for none,
and never a number.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.protocols import Policy
from lm.sampling import Request
from tasks.evaluation.diversity import mean_edit_distance
from tasks.task import TestItem

# Low enough that the likeliest token is drawn unless the runner-up is as likely.
GREEDY_TEMPERATURE = 1e-4


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
        return self.answer is not None and self.answer == self.item.answer

    @property
    def distinct_right(self) -> int:
        """Different rationales that led to the true answer."""
        pairs = set(zip(self.rationales, self.answers, strict=True))
        return sum(answer == self.item.answer for _, answer in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Results on the questions of one number of operands; shares in [0, 1]."""

    items: int
    accuracy: float
    unseen_items: int  # not in the training data
    unseen: float | None  # accuracy on them; None where there are none
    unparsable: float  # share of answers that are none
    distinct_right: float  # different right rationales, mean over questions


def vote(
    items: Sequence[TestItem],
    *,
    policy: Policy,
    answerer: Policy,
    decode: Callable[[list[int]], str],
    parse: Callable[[str], int | None],
    answer_context: Sequence[int],
    samples: int,
    temperature: float,
    shots: Sequence[int] = (),
) -> list[Voted]:
    """Ask the policy for rationales and the base LM for the answers that follow them.

    Args:
        policy: samples Z from X.
        answerer: samples Y, of the base LM; asked once for each distinct pair of X and Z.
        answer_context: token ids in front of X when the base LM answers; empty for none.
        shots: token ids in front of X always, of worked examples; empty for none.
    """
    requests = [
        Request(prompt=(*shots, *item.prompt), temperature=temperature)
        for item in items
        for _ in range(samples)
    ]
    rationales = [tuple(z.tokens.tolist()) for z in policy.sample(requests)]
    asked = [(request.prompt, z) for request, z in zip(requests, rationales, strict=True)]
    distinct = list(dict.fromkeys(asked))
    replies = answerer.sample(
        [
            Request(prompt=(*answer_context, *x, *z), temperature=GREEDY_TEMPERATURE)
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
            rationales=tuple(decode(list(z)).strip() for _, z in asked[at : at + samples]),
            answers=tuple(answer_of[pair] for pair in asked[at : at + samples]),
        )
        for item, at in zip(items, range(0, len(asked), samples), strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What was drawn for the questions of one number of operands, drawn again and again."""

    items: int
    right: float  # share of rationales that led to the true answer
    distinct_right: float  # different right rationales, mean over questions
    edit_distance: float | None  # see tasks.evaluation.diversity, mean over questions


def spreads(voted: Sequence[Voted]) -> dict[int, Spread]:
    """Number of operands -> spread, ascending."""
    return {operands: _spread(same) for operands, same in _by_operands(voted).items()}


def _spread(voted: Sequence[Voted]) -> Spread:
    right = [answer == one.item.answer for one in voted for answer in one.answers]
    distances = [mean_edit_distance(one.rationales) for one in voted]
    known = [distance for distance in distances if distance is not None]
    return Spread(
        items=len(voted),
        right=float(np.mean(right)),
        distinct_right=float(np.mean([one.distinct_right for one in voted])),
        edit_distance=float(np.mean(known)) if known else None,
    )


def scores(voted: Sequence[Voted]) -> dict[int, Score]:
    """Number of operands -> score, ascending."""
    return {operands: _score(same) for operands, same in _by_operands(voted).items()}


def _by_operands(voted: Sequence[Voted]) -> dict[int, list[Voted]]:
    groups: dict[int, list[Voted]] = {}
    for one in voted:
        groups.setdefault(one.item.operands, []).append(one)
    return dict(sorted(groups.items()))


def _score(voted: Sequence[Voted]) -> Score:
    unseen = [one.right for one in voted if one.item.unseen]
    return Score(
        items=len(voted),
        accuracy=float(np.mean([one.right for one in voted])),
        unseen_items=len(unseen),
        unseen=float(np.mean(unseen)) if unseen else None,
        unparsable=float(np.mean([answer is None for one in voted for answer in one.answers])),
        distinct_right=float(np.mean([one.distinct_right for one in voted])),
    )
