"""Sentence continuation (Hu et al. 2024, section 4.1): likely next sentences, and many of them.

X is a prompt of one to three sentences, Z the next sentence, ⊤ its full stop; there is no Y. The
reward is p_LM(Z ⊤ | X)^(1/T) with T below 1. At max_len the stop is forced: the policy's log q(⊤)
is 0 there, while the reward still asks the LM how likely the full stop is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.demonstrations import Demonstration
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from tasks.config import ContinuationConfig
from tasks.sentences.actions import demonstrate, encode, sentence_actions
from tasks.sentences.prompt_files import load_continued, load_prompts
from tasks.task import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """See tasks.task.Task."""

    actions: ActionSpace
    prompts: tuple[Prompt, ...]
    tests: tuple[Prompt, ...]
    reward_query: RewardQuery
    tool: None = None
    log_reward: None = None
    demonstrations: tuple[Demonstration, ...] = field(default=())
    name: str = "continuation"

    @property
    def test_prompts(self) -> tuple[Prompt, ...]:
        """See tasks.task.MeasuredTask."""
        return self.tests

    def verdict(self, prompt: Prompt, completion: Sequence[int]) -> None:
        """No continuation is right or wrong."""
        return None

    def valid(self, completion: Sequence[int]) -> bool:
        """All that can be sampled is one sentence."""
        return True


def build_continuation(config: ContinuationConfig, tokenizer: Tokenizer) -> Continuation:
    """Load the prompts and encode them; raises DataError, TokenizerUnfit."""
    actions = sentence_actions(tokenizer, min_len=config.min_len, max_len=config.max_len)
    pairs = () if config.demonstrations is None else load_continued(config.demonstrations)
    return Continuation(
        actions=actions,
        prompts=_distinct(load_prompts(config.data), tokenizer),
        tests=_distinct([text for path in config.tests for text in load_prompts(path)], tokenizer),
        demonstrations=tuple(
            demonstration
            for text, sentence in dict.fromkeys(pairs)
            if (
                demonstration := demonstrate(_prompt(text, tokenizer), sentence, actions, tokenizer)
            )
        ),
        reward_query=RewardQuery(kind="stop", stop_token=actions.stop_token),
    )


def _distinct(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    return tuple(_prompt(text, tokenizer) for text in dict.fromkeys(texts))


def _prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    return Prompt(
        key=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        text=text,
        prompt=encode(tokenizer, text),
        answer=(),
    )
