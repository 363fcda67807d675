"""Random integers: make a language model draw them uniformly (Hu et al. 2024, section 2).

X asks for an integer between 0 and 100, Z is the digits that follow, up to the end of text; there
is no Y. The reward is no language model's: 1 for every integer of the range in plain digits, and
less by a factor for each token of anything else, such as '007', '101' or '3 7'.
"""

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.spelling import spell, spell_after
from reward.request import ScoreItem
from tasks.config import RandomNumberConfig
from tasks.custom import PlainTask
from tasks.stop_rule import end_of_text
from tasks.task import Tokenizer

_DIGITS = re.compile(r" ?[0-9]+")


@dataclass(frozen=True, kw_only=True)
class RandomNumber(PlainTask):
    """See tasks.task.Task and tasks.posterior.ceiling.BoundedReward."""

    numbers: dict[tuple[int, ...], int]  # token ids of each valid Z -> the integer it spells
    penalty_nats: float
    log_reward: Callable[[ScoreItem], NDArray[np.float32]]

    def verdict(self, prompt: Prompt, completion: Sequence[int]) -> bool:
        return self.valid(completion)

    def valid(self, completion: Sequence[int]) -> bool:
        """Whether it is an integer of the range, in plain digits and nothing else."""
        return tuple(completion) in self.numbers

    def log_reward_ceiling(self, prefix: Sequence[int], length: int) -> float:
        """Largest log R in nats of a Z of `length` tokens that begins with `prefix`."""
        reachable = (tuple(prefix), length) in self._beginnings
        return 0.0 if reachable else -self.penalty_nats * max(length, 1)

    @cached_property
    def _beginnings(self) -> set[tuple[tuple[int, ...], int]]:
        """Of every valid Z, with its length."""
        return {(z[:end], len(z)) for z in self.numbers for end in range(len(z) + 1)}


def log_reward(
    item: ScoreItem, *, numbers: Container[tuple[int, ...]], penalty_nats: float
) -> NDArray[np.float32]:
    """[S] nats: 0 for a valid integer, else -penalty for each token (and one for none).

    The price grows with the length because the number of texts does, by a factor for each token.
    """
    prefixes = (tuple(item.completion[:stop].tolist()) for stop in item.stops)
    log_r_S = [0.0 if z in numbers else -penalty_nats * max(len(z), 1) for z in prefixes]
    return np.array(log_r_S, dtype=np.float32)


def build_random_number(config: RandomNumberConfig, tokenizer: Tokenizer) -> RandomNumber:
    """The task in the tokens of `tokenizer`; raises TokenizerUnfit where it has no end of text."""
    stop = end_of_text(tokenizer)
    numbers = {
        spell_after(tokenizer, config.question, f" {number}"): number
        for number in range(config.low, config.high + 1)
    }
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    digits = {i for i, text in enumerate(texts) if _DIGITS.fullmatch(text)}
    # Some tokenizers (Llama, Gemma) spell the space in front of a number as a token of its own.
    legal = digits.union(*numbers)
    return RandomNumber(
        name="random_number",
        actions=ActionSpace(
            stop_token=stop,
            legal_tokens=tuple(sorted(legal)),
            min_len=1,
            # One more than any valid integer needs: where to stop is for the policy to learn.
            max_len=max(len(tokens) for tokens in numbers) + 1,
        ),
        prompts=(
            Prompt(
                key=f"{config.low} to {config.high}",
                text=config.question,
                prompt=spell(tokenizer, config.question),
                answer=(),
            ),
        ),
        numbers=numbers,
        penalty_nats=config.penalty_nats,
        log_reward=partial(log_reward, numbers=numbers, penalty_nats=config.penalty_nats),
        reward_query=RewardQuery(kind="function", stop_token=stop),
    )
