"""Exact samples of the posterior at T = 1: what the frozen LM writes by itself, where it fits.

The LM continues [context] X freely, every token of its vocabulary open. A text counts wherever it
reads as a legal completion Z followed by exactly Y. It begins so with probability p_LM(Z Y | X),
which is R(Z); so what is read is distributed as p(Z | X, Y), and

    E[number of Z read from a text] = sum over legal Z of R(Z) = Z(X)

A text in which Y occurs again is read in several ways: each counts, and such samples depend on one
another (`PosteriorSamples.draw_M`). Where the policy may not choose the first token of Y, as in
arithmetic, there is one way at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import NO_TOKEN, ActionSpace
from lm.model import CausalLM, context_limit
from lm.sampling import Request, Sampler
from lm.tools import Tool
from tasks.posterior.bounds import Interval
from tasks.posterior.weights import Completed

# Tokens that are drawn before texts which can no longer fit are given up.
CHUNK = 16


class NoRejectionSampling(ValueError):
    """A reward that is no probability of a text, so that no text is a sample of its posterior."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PosteriorSamples:
    """M samples of p_LM(Z | X, Y), in the order of the texts that they were read from."""

    completions: tuple[Completed, ...]
    draw_M: NDArray[np.int64]  # the text of each; samples of different texts are independent
    draws: int  # texts drawn
    log_z: Interval | None  # log of samples per text; None where there are no samples


def posterior_samples(
    model: CausalLM,
    prompt: Prompt,
    *,
    actions: ActionSpace,
    tool: Tool | None,
    query: RewardQuery,
    draws: int,
    max_rows: int,
    generator: torch.Generator,
) -> PosteriorSamples:
    """Read the posterior from `draws` free texts of the frozen LM `model`.

    Their number is fixed beforehand, because stopping at a wanted number of samples would bias
    `log_z`. Where no text fits, Z(X) is below about 3 / draws (95 %), and nothing else is known.
    Where `tool` speaks, a text must hold exactly what it would say.

    Raises NoRejectionSampling (the reward is a function of the task's own) and ValueError (an empty
    Y, or a text that outgrows the model).
    """
    if query.kind == "function":
        raise NoRejectionSampling(
            "the reward is a function, not a probability under the LM: the LM's texts are no "
            "samples of its posterior"
        )
    item = query.item(prompt, (), np.zeros(1, dtype=np.int32))
    context, answer = tuple(item.context.tolist()), tuple(item.answer.tolist())
    readings = [Reading(actions, tool, answer) for _ in range(draws)]
    # The token that ends the sampler is drawn like any other, and texts go on behind it.
    free = ActionSpace(
        stop_token=actions.stop_token,
        legal_tokens=None,
        min_len=0,
        max_len=min(CHUNK, actions.max_len + len(answer)),
    )
    while unsettled := [reading for reading in readings if reading.open]:
        requests = [Request(prompt=(*context, *reading.tokens)) for reading in unsettled]
        continued = _continue(model, requests, free, max_rows, generator)
        for reading, tokens in zip(unsettled, continued, strict=True):
            reading.feed(tokens)
    return PosteriorSamples(
        completions=tuple(found for reading in readings for found in reading.found),
        draw_M=np.repeat(np.arange(draws), [len(reading.found) for reading in readings]),
        draws=draws,
        log_z=log_mean([len(reading.found) for reading in readings]),
    )


class Reading:
    """Reads a growing text as Z Y in every possible way.

    Z is read as the policy would have produced it, so which tokens are the tool's follows from the
    text alone. Raises ValueError for an empty answer, which every text would fit.
    """

    def __init__(self, actions: ActionSpace, tool: Tool | None, answer: Sequence[int]) -> None:
        if not answer:
            raise ValueError("the answer Y is empty: no text can be told from one that ends in Y")
        self.tokens: list[int] = []
        self.found: list[Completed] = []
        self._actions = actions
        self._legal = None if actions.legal_tokens is None else frozenset(actions.legal_tokens)
        self._tool = tool
        self._answer = tuple(answer)
        self._from_tool: list[bool] = []  # of the text as far as it is a beginning of some Z
        self._pending: list[int] = []  # what the tool is about to say
        self._grows = True  # the whole text so far is a beginning of some Z
        self._ends: list[int] = []  # where Z may have ended and Y has followed so far
        self._note_end()

    @property
    def open(self) -> bool:
        """Whether a longer text could be read in one more way."""
        return self._grows or bool(self._ends)

    def feed(self, tokens: Sequence[int]) -> None:
        """Read on, as far as anything is open."""
        for token in tokens:
            if not self.open:
                return
            self.tokens.append(token)
            self._follow_answers(token)
            self._grows = self._grows and self._extend(token)
            self._note_end()

    def _follow_answers(self, token: int) -> None:
        place = len(self.tokens) - 1
        self._ends = [end for end in self._ends if self._answer[place - end] == token]
        if self._ends and len(self.tokens) - self._ends[0] == len(self._answer):
            end = self._ends.pop(0)
            marks = tuple(self._from_tool[:end])
            self._actions.check(self.tokens[:end], marks)
            self.found.append(Completed(tokens=tuple(self.tokens[:end]), from_tool=marks))

    def _extend(self, token: int) -> bool:
        """Take `token` as the next of Z; whether it can be."""
        if self._pending:
            self._from_tool.append(True)
            return token == self._pending.pop(0)
        if self._actions.must_stop(len(self._from_tool)) or token == self._actions.stop_token:
            return False
        if self._legal is not None and token not in self._legal:
            return False
        self._from_tool.append(False)
        if self._tool is not None and token in self._tool.triggers:
            self._pending = list(self._tool.output(tuple(self.tokens)))
        return True

    def _note_end(self) -> None:
        """Z may end here if the policy may stop here."""
        if not self._grows or self._pending:
            return
        newest = self.tokens[-1] if self.tokens else NO_TOKEN
        after_tool = bool(self._from_tool) and self._from_tool[-1]
        if self._actions.may_stop(len(self.tokens), newest, after_tool):
            self._ends.append(len(self.tokens))


def _continue(
    model: CausalLM,
    requests: Sequence[Request],
    free: ActionSpace,
    max_rows: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Further tokens of each text, one at least, drawn from the LM's whole vocabulary."""
    room = context_limit(model) - max(len(request.prompt) for request in requests)
    free = replace(free, max_len=max(1, min(free.max_len, room)))
    sampler = Sampler(model, free, None, max_rows=max_rows)
    drawn = [completion.tokens.tolist() for completion in sampler.sample(requests, generator)]
    return [
        tokens if len(tokens) == free.max_len else [*tokens, free.stop_token] for tokens in drawn
    ]


def log_mean(count_D: Sequence[int]) -> Interval | None:
    """Log of the mean number of samples per text; normal on the log scale (delta method)."""
    count = np.array(count_D, dtype=np.float64)
    mean = count.mean() if len(count) else 0.0
    if mean == 0.0:
        return None
    half = float(norm.ppf(0.975)) * float(count.std() / mean) / math.sqrt(len(count))
    value = math.log(mean)
    return Interval(value, value - half, value + half)
