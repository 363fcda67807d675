"""How much reward can be left in completions that nobody looked at: upper bounds on the sum of
R^(1/T), as logarithms, over the completions that begin with a prefix of an enumeration's frontier.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from actors.prompts import Prompt
from lm.actions import ActionSpace
from lm.next_action import NextLogits, Prefix
from reward.terms import RewardTerms
from tasks.task import Task

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
_NEXT_TO_NOTHING = -25.0  # nats below the bound on everything


@dataclass(eq=False)
class PriorCeiling:
    """For rewards p_LM(Z Y | X)^(1/T) with T <= 1: the frozen LM's own mass below a prefix.

    When the first token of Y is none that the policy may choose, the events "the text behind X
    begins with Z Y" are disjoint, so sum_Z p_LM(Z Y | X) <= p_LM(prefix | X) over the Z that begin
    with the prefix. Else one text may read as Z Y in as many ways as there are places to stop, from
    min_len to max_len, and the bound grows by that number. And sum R^(1/T) <= (sum R)^(1/T) for
    T <= 1, whatever R; for T > 1 no such bound holds. What other terms add to log R / T, at most
    `more` nats, is added.

    Raises ValueError for T > 1.
    """

    model: NextLogits
    actions: ActionSpace
    _: KW_ONLY
    context: Prefix
    first_scored: int
    temperature: float
    more: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature > 1:
            raise ValueError(
                f"temperature {self.temperature}: the prior bounds rewards for T <= 1 only"
            )
        legal, first = self.actions.legal_tokens, self.first_scored
        chosen = first != self.actions.stop_token and (legal is None or first in legal)
        places = self.actions.max_len - self.actions.min_len + 1 if chosen else 1
        self.of_everything = math.log(places) / self.temperature + self.more

    def of_children(
        self, prefixes: Sequence[Prefix], log_bound_N: Floats, token_NC: Tokens
    ) -> Floats:
        """[N, C] over the completions that begin with a prefix and one of C next tokens; one pass.

        Args:
            prefixes: tokens of completions, tool text included; without the prompt.
            log_bound_N: what this ceiling said of each prefix itself.
            token_NC: the next tokens of each.
        """
        texts = [(*self.context, *prefix) for prefix in prefixes]
        log_p_NC = self.model.token_log_probs(texts, token_NC).cpu().numpy().astype(np.float64)
        return log_bound_N[:, None] + log_p_NC / self.temperature


@runtime_checkable
class BoundedReward(Protocol):
    """A task whose own reward function says how large it can become."""

    def log_reward_ceiling(self, prefix: Sequence[int], length: int) -> float:
        """No completion of `length` tokens that begins with `prefix` has a larger log R, nats."""
        ...


@dataclass(eq=False)
class FunctionCeiling:
    """For a task's own reward, without a tool: the best reward of each length, times the number
    of completions of that length."""

    task: BoundedReward
    actions: ActionSpace
    _: KW_ONLY
    vocab_size: int
    temperature: float

    def __post_init__(self) -> None:
        choices = set(self.actions.columns(self.vocab_size).tolist()) - {self.actions.stop_token}
        self._log_choices = math.log(len(choices))
        self.of_everything = self._below((), length=0)

    def of_children(
        self, prefixes: Sequence[Prefix], log_bound_N: Floats, token_NC: Tokens
    ) -> Floats:
        """As PriorCeiling, of next tokens that the policy may choose."""
        bound_NC = np.empty(token_NC.shape)
        for bound_C, prefix, token_C in zip(bound_NC, prefixes, token_NC.tolist(), strict=True):
            length = len(prefix) + 1
            # What bounds the prefix bounds its children: next to nothing is not worth the asking.
            every = self._below(prefix, length=length)
            if every + self._log_choices < self.of_everything + _NEXT_TO_NOTHING:
                bound_C[:] = every
            else:
                bound_C[:] = [self._below((*prefix, token), length=length) for token in token_C]
        return bound_NC

    def _below(self, prefix: Prefix, *, length: int) -> float:
        """Over the completions that begin with some `length` tokens that begin with `prefix`."""
        log_sums = [
            (longer - length) * self._log_choices
            + self.task.log_reward_ceiling(prefix, longer) / self.temperature
            for longer in range(max(length, self.actions.min_len), self.actions.max_len + 1)
        ]
        return float(np.logaddexp.reduce([-np.inf, *log_sums]))


Ceiling = PriorCeiling | FunctionCeiling


def ceiling_of(
    task: Task,
    prompt: Prompt,
    model: NextLogits,
    *,
    vocab_size: int,
    temperature: float,
    terms: RewardTerms | None = None,
) -> Ceiling | None:
    """The ceiling for a prompt of `task` under the frozen LM `model`; None where none is known."""
    query = task.reward_query
    if query.kind == "function":
        if task.tool is not None or not isinstance(task, BoundedReward):
            return None
        return FunctionCeiling(task, task.actions, vocab_size=vocab_size, temperature=temperature)
    more = 0.0
    if terms is not None:
        actions = task.actions
        most = actions.max_len if task.tool is None else None  # a tool speaks beyond it
        more = terms.most(min_len=actions.min_len, max_len=most) / temperature
        temperature /= terms.likelihood_weight  # of what the LM says: its weight over T
    if temperature > 1 or more == math.inf:
        return None
    return PriorCeiling(
        model,
        task.actions,
        context=(*query.context, *prompt.scored_prompt),
        first_scored=query.stop_token if query.kind == "stop" else prompt.answer[0],
        temperature=temperature,
        more=more,
    )
