"""Reward terms that add up, nats, at every stop state t of a completion Z:

    log R(z_1:t ⊤) = sum over the terms of  weight x value(z_1:t)

    likelihood  log p_LM(z_1:t Y | X), or of ⊤ in place of Y: what R is without terms
    verifier    a score in [0, 1] of the text of z_1:t, tool text included, ⊤ excluded
    length      t, in tokens, those of tools included

Each value follows from the prefix, so R is one function of completions, and the posterior is
p(Z | X, Y) ∝ R(Z ⊤)^(1/T). Only a verifier `where = "end"` is asked about whole completions alone:
at the other stop states its value is left out, and R is not known there.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lm.config import LMConfig
from lm.hub import load_tokenizer
from reward.config import RewardConfig
from reward.request import ScoreItem
from reward.verifiers import Call, CheckFailed, CheckPool, Failure

_PATIENCE_S = 3600.0  # with a batch of checks: each has a deadline of its own

LogRewards = list[NDArray[np.float32]]


class _Pending(Protocol):
    def done(self) -> bool: ...
    def result(self, timeout_s: float, /) -> LogRewards: ...


class _Scorer(Protocol):
    def submit(self, items: Sequence[ScoreItem], /) -> _Pending: ...


class RewardTerms:
    """The terms of a run; `decode` makes text of token ids."""

    def __init__(self, config: RewardConfig, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self.verifiers = [term for term in config.terms if term.kind == "verifier"]
        self._per_token = sum(term.weight for term in config.terms if term.kind == "length")
        self.likelihood_weight = next(t.weight for t in config.terms if t.kind == "likelihood")
        self._pool = CheckPool(
            [(str(term.check), term.pattern) for term in self.verifiers],
            as_score,
            processes=config.verifier_processes,
            deadline_s=config.verifier_deadline_s,
        )

    @property
    def failures(self) -> int:
        """Calls of verifiers that raised, hung or gave no score, each attempt counted."""
        return self._pool.failures

    def check(self) -> None:
        """Raise UnusableCheck where a verifier cannot be imported."""
        if self.verifiers:
            self._pool.start()

    def most(self, *, min_len: int, max_len: int | None) -> float:
        """Nats that verifiers and length can add at most to the likelihood's part.

        Args:
            max_len: None where there is none; inf then where tokens are rewarded.
        """
        longest = np.inf if max_len is None else max_len
        tokens = longest if self._per_token > 0 else min_len
        length = self._per_token * tokens if self._per_token else 0.0
        return float(length + sum(max(term.weight, 0.0) for term in self.verifiers))

    def scores(self, items: Sequence[ScoreItem]) -> list[list[float | None]]:
        """Of each item's last stop state by each verifier; None where a check failed."""
        verdicts = self.judge(items)
        verdicts.wait(_PATIENCE_S, strict=False, last=True)
        found: list[list[float | None]] = [[None] * len(self.verifiers) for _ in items]
        for place, number, _, score in verdicts.scores():  # stop states in their order
            found[place][number] = None if isinstance(score, Failure) else score
        return found

    def judge(self, items: Sequence[ScoreItem]) -> "Verdicts":
        """Start to verify the items; returns at once."""
        calls: dict[Call, int] = {}
        where: list[tuple[int, int, int, int]] = []
        for place, item in enumerate(items):
            for number, stop, call in self._calls(item):
                where.append((place, number, stop, calls.setdefault(call, len(calls))))
        return Verdicts(where, self._pool.submit(list(calls)), self._pool)

    def _calls(self, item: ScoreItem) -> Iterator[tuple[int, int, Call]]:
        """Number of a verifier, place of a stop state, and what is asked there."""
        if not self.verifiers:
            return
        record = item.record or json.dumps(
            {
                "question": self._decode(item.context.tolist()),
                "answer": self._decode(item.answer.tolist()).strip(),
            }
        )
        for place, stop in enumerate(item.stops.tolist()):
            text = self._decode(item.completion[:stop].tolist())
            for number, term in enumerate(self.verifiers):
                if term.where == "every" or stop == len(item.completion):
                    yield number, place, (number, text, record)

    def log_rewards(
        self, items: Sequence[ScoreItem], log_p: Sequence[NDArray[np.float32]]
    ) -> LogRewards:
        """As `add`, verified here and now; raises CheckFailed where one check fails."""
        verdicts = self.judge(items)
        verdicts.wait(_PATIENCE_S, strict=True)
        return self.add(items, log_p, verdicts)

    def add(
        self, items: Sequence[ScoreItem], log_p: Sequence[NDArray[np.float32]], verdicts: "Verdicts"
    ) -> LogRewards:
        """[S] nats for each item; [0] for one of which a check failed.

        Args:
            log_p: what the frozen LM says of the items.
            verdicts: which are there.
        """
        weight = self.likelihood_weight
        sums = [
            weight * log_p_S.astype(np.float64) + self._per_token * item.stops
            for item, log_p_S in zip(items, log_p, strict=True)
        ]
        for place, number, stop, score in verdicts.scores():
            if isinstance(score, Failure):
                sums[place] = np.empty(0)
            elif len(sums[place]):
                sums[place][stop] += self.verifiers[number].weight * score
        return [sum_S.astype(np.float32) for sum_S in sums]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Checks under way: of which item, verifier and stop state each is, and its number."""

    where: list[tuple[int, int, int, int]]
    portions: "list[Future[list[Any]]]"
    pool: CheckPool

    def wait(
        self, timeout_s: float, *, strict: bool, last: bool = False, since_s: float | None = None
    ) -> None:
        """Raise TimeoutError where they are not all made in time, and CheckFailed where a verifier
        failed all its checks and is broken (CheckPool.is_broken); if `strict`, where one failed.

        Args:
            last: see CheckPool.is_broken.
            since_s: from when on `timeout_s` counts, by the monotonic clock; None: from now.
        """
        deadline = timeout_s + (monotonic() if since_s is None else since_s)
        late = wait(self.portions, max(deadline - monotonic(), 0.0)).not_done
        if late:
            raise TimeoutError(
                f"verifiers: judging a batch took longer than {timeout_s:g} s: raise "
                "reward.verifier_processes, or lower reward.verifier_deadline_s"
            )
        found = [one for part in self.portions for one in part.result()]
        answers: dict[int, dict[int, Any]] = {}  # of each verifier, by the number of the check
        for _, number, _, at in self.where:
            answers.setdefault(number, {})[at] = found[at]
        broken: list[Any] = []
        for number, its in answers.items():
            failed = all(isinstance(one, Failure) for one in its.values())
            if self.pool.is_broken(number, failed=failed, last=last):
                broken += its.values()
        asked = found if strict else broken
        if failures := [one for one in asked if isinstance(one, Failure)]:
            raise CheckFailed(
                f"reward.terms: {len(failures)} of {len(asked)} checks failed, as often as they "
                f"were made; the first: {failures[0].reason}; mend the verifier, or, where it is "
                "slow, raise reward.verifier_deadline_s"
            )

    def scores(self) -> Iterator[tuple[int, int, int, Any]]:
        """Place of the item, number of the verifier, place of the stop state, score or Failure."""
        found = [one for portion in self.portions for one in portion.result()]
        for place, number, stop, at in self.where:
            yield place, number, stop, found[at]


@dataclass(frozen=True, slots=True)
class TermScorer:
    """A Scorer that adds the terms to what another says of the likelihood."""

    likelihood: _Scorer
    terms: RewardTerms
    strict: bool = False  # no item goes without a reward: see `Verdicts.wait`

    def submit(self, items: Sequence[ScoreItem]) -> "_Sums":
        """Returns at once."""
        return _Sums(self, items, self.likelihood.submit(items), self.terms.judge(items))


@dataclass(frozen=True, slots=True)
class _Sums:
    """A scoring under way."""

    scorer: TermScorer
    items: Sequence[ScoreItem]
    log_p: _Pending
    verdicts: Verdicts

    def done(self) -> bool:
        """Whether `result` would not wait, or is needed to ask again."""
        return self.log_p.done() and all(part.done() for part in self.verdicts.portions)

    def result(self, timeout_s: float, /) -> LogRewards:
        """As RewardTerms.add; raises what the other scorer raises, and what Verdicts.wait does."""
        started_s = monotonic()
        log_p = self.log_p.result(timeout_s)
        self.verdicts.wait(timeout_s, strict=self.scorer.strict, since_s=started_s)
        return self.scorer.terms.add(self.items, log_p, self.verdicts)


def as_score(value: Any) -> float:
    """A verifier's value; raises ValueError for what is no number in [0, 1]."""
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise ValueError(f"a verifier returned {value!r:.60}, which is no number from 0 to 1")
    return float(value)


def build_terms(reward: RewardConfig, lm: LMConfig) -> RewardTerms | None:
    """The terms of a run on the base `lm`; None where the task alone says what R is."""
    if not reward.terms:
        return None
    return RewardTerms(reward, load_tokenizer(lm).decode)
