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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.model import CausalLM, context_limit
from lm.sampling import Request, Sampler
from lm.tools import Tool, insertion
from tasks.posterior.bounds import Interval
from tasks.posterior.weights import Completed

Tokens = tuple[int, ...]

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
    reader = Reader(actions, tool, answer)
    readings = [reader.read(())] * draws
    # The token that ends the sampler is drawn like any other, and texts go on behind it.
    free = ActionSpace(
        stop_token=actions.stop_token,
        legal_tokens=None,
        min_len=0,
        max_len=min(CHUNK, actions.max_len + len(answer)),
    )
    while unsettled := [at for at, reading in enumerate(readings) if reading.open]:
        requests = [Request(prompt=(*context, *readings[at].text)) for at in unsettled]
        continued = _continue(model, requests, free, max_rows, generator)
        for at, tokens in zip(unsettled, continued, strict=True):
            readings[at] = reader.read((*readings[at].text, *tokens))
    return PosteriorSamples(
        completions=tuple(found for reading in readings for found in reading.found),
        draw_M=np.repeat(np.arange(draws), [len(reading.found) for reading in readings]),
        draws=draws,
        log_z=log_mean([len(reading.found) for reading in readings]),
    )


class Reading(NamedTuple):
    """A text, read as Z Y in every way that there is so far."""

    text: Tokens
    found: tuple[Completed, ...]
    open: bool  # whether a longer text could be read in one more way


class Reader:
    """Reads Z as the policy would have produced it: a text alone tells which tokens are the tool's.

    Raises ValueError for an empty answer, which every text would fit.
    """

    def __init__(self, actions: ActionSpace, tool: Tool | None, answer: Tokens) -> None:
        if not answer:
            raise ValueError("the answer Y is empty: no text can be told from one that ends in Y")
        self._actions, self._tool, self._answer = actions, tool, answer
        self._legal = None if actions.legal_tokens is None else frozenset(actions.legal_tokens)
        self._said: dict[tuple[int, ...], Sequence[int]] = {}  # by the tool, behind a beginning

    def read(self, text: Tokens) -> Reading:
        from_tool, pending = self._beginning(text)
        stops_S = self._actions.stop_states(text[: len(from_tool)], from_tool)
        stops_S[-1] &= not pending
        ends = [end for end in np.flatnonzero(stops_S) if _agree(text[end:], self._answer)]
        whole = [end for end in ends if end + len(self._answer) <= len(text)]
        return Reading(
            text,
            tuple(Completed(tokens=text[:end], from_tool=tuple(from_tool[:end])) for end in whole),
            open=len(from_tool) == len(text) or len(whole) < len(ends),
        )

    def _beginning(self, text: Tokens) -> tuple[list[bool], Sequence[int]]:
        """Marks of the longest beginning of some Z, and what the tool has yet to say behind it."""
        from_tool: list[bool] = []
        pending: Sequence[int] = ()
        for token in text:
            if pending:
                if token != pending[0]:
                    break
                pending = pending[1:]
                from_tool.append(True)
                continue
            illegal = self._legal is not None and token not in self._legal
            ends = token == self._actions.stop_token or self._actions.must_stop(len(from_tool))
            if illegal or ends:
                break
            from_tool.append(False)
            pending = self._insertion(tuple(text[: len(from_tool)]), from_tool)
        return from_tool, pending

    def _insertion(self, beginning: tuple[int, ...], from_tool: Sequence[bool]) -> Sequence[int]:
        """What the tool says behind it, asked once: a text is read anew whenever it has grown."""
        if self._tool is None:
            return ()
        if beginning not in self._said:
            self._said[beginning] = insertion(self._tool, beginning, from_tool)
        return self._said[beginning]


def _agree(one: Tokens, other: Tokens) -> bool:
    """Whether one is a beginning of the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


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
    half = float(ndtri(0.975)) * float(count.std() / mean) / math.sqrt(len(count))
    value = math.log(mean)
    return Interval(value, value - half, value + half)
