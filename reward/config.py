"""Configuration of the reward replicas; imports no torch."""

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lm.config import Frozen
from reward.checks import BUILT_IN, FUNCTION


class RewardTerm(Frozen):
    """One of `[[reward.terms]]`, which add up: log R is the sum of weight times value."""

    kind: Literal["likelihood", "verifier", "length"]
    """What the frozen LM says of Z and Y, nats; a score of Z's text in [0, 1]; or the tokens of
    Z."""
    weight: float = Field(1.0, allow_inf_nan=False, description="By which the value is multiplied.")
    check: str | None = None
    """Of a verifier: "exact", "numeric", "regex", or "module:function" of your own."""
    pattern: str | None = None
    """Regular expression: what regex looks for; its first group is what exact and numeric look at
    instead of the whole text."""
    where: Literal["every", "end"] = "every"
    """A verifier judges every stop state, or whole completions alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "likelihood" and self.weight <= 0:
            raise ValueError(f"weight ({self.weight}) of the likelihood must be positive")
        if self.kind != "verifier":
            if self.check or self.pattern or self.where != "every":
                raise ValueError(f'check, pattern and where mean nothing to kind "{self.kind}"')
            return self
        if self.check not in BUILT_IN and not FUNCTION.fullmatch(self.check or ""):
            raise ValueError(
                f"a verifier needs a check, {', '.join(BUILT_IN)} or 'module:function', not "
                f"{self.check!r}"
            )
        if (self.check == "regex") > (self.pattern is not None):
            raise ValueError('check = "regex" needs a pattern')
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is no regular expression: {error}"
            ) from None
        return self


class RewardConfig(Frozen):
    """How the frozen LM that scores rationales is run."""

    replicas: PositiveInt = 1
    """Independent copies of the frozen LM; callers spread over them."""
    ranks: PositiveInt = 1
    """Processes over which one replica shards its weights (ZeRO-3)."""
    token_budget: PositiveInt = 2048
    """Tokens of one padded micro-batch on one rank."""
    deadline_s: PositiveFloat = 60.0
    """Seconds that a request waits while its replica scores nothing at all; also how long a rank
    waits for another of its replica, from that one's last sign of progress on."""
    verifier_processes: PositiveInt = Field(1, description="In which an actor's verifiers run.")
    verifier_deadline_s: PositiveFloat = 5.0
    """Longest call of a verifier; one that takes longer is ended."""
    cache_items: NonNegativeInt = 20_000
    """Scores remembered by content, oldest use forgotten; 0: none."""
    terms: tuple[RewardTerm, ...] = ()
    """What log R is the sum of; none: what the task says (docs/questions.md)."""

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        likelihoods = sum(term.kind == "likelihood" for term in self.terms)
        if self.terms and likelihoods != 1:
            raise ValueError(
                f'terms hold {likelihoods} of kind = "likelihood", and need one: without it every '
                "text is as likely as any other"
            )
        return self
