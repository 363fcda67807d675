"""What the policy may do in a state: the legal tokens, the stop action and where it is open.

A state is a prefix of t tokens of a completion Z. The policy is ONE softmax over the legal tokens
and the stop action ⊤, which is spelled by a token id of the model's vocabulary:

    t < min_len             ⊤ is impossible (-inf)
    min_len <= t < max_len  ⊤ competes with the legal tokens
    t >= max_len            ⊤ is forced, log q(⊤) = 0

A task may narrow this further, so that a rationale ends with a finished step, or to have fewer
states to score (`stop_after_tool`, `stop_behind`, `stop_every`): elsewhere ⊤ then has probability
zero below max_len. Nothing is approximated: it is another, smaller set of completions.

Text that a tool inserts is always inserted whole, so a completion may be longer than max_len.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Tokens = Sequence[int] | NDArray[np.integer]
_Marks = Sequence[bool] | NDArray[np.bool_]
# Stands for the last token of the empty completion.
NO_TOKEN = -1


class IllegalCompletion(ValueError):
    """A completion that the policy gives probability zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpace:
    """The actions open to the policy, and the lengths between which it stops.

    Raises ValueError for negative or crossed lengths and for an empty set of actions.
    """

    stop_token: int  # token id that spells ⊤; never a token of Z chosen by the policy
    legal_tokens: tuple[int, ...] | None  # token ids the policy may choose; None: the vocabulary
    min_len: int  # tokens, of tools too, before ⊤ opens
    max_len: int  # tokens, of tools too, at which ⊤ is forced
    stop_after_tool: bool = False  # ⊤ opens only right after text that a tool inserted
    stop_behind: frozenset[int] | None = None  # ... after one of these tokens; None: after any
    stop_every: int = 1  # ... where the length is min_len and a multiple of this more

    def __post_init__(self) -> None:
        if not 0 <= self.min_len <= self.max_len:
            raise ValueError(
                f"min_len={self.min_len}, max_len={self.max_len}: need 0 <= min_len <= max_len"
            )
        if self.stop_every < 1:
            raise ValueError(f"stop_every={self.stop_every}: need at least 1")
        legal = None if self.legal_tokens is None else set(self.legal_tokens) - {self.stop_token}
        if self.max_len > 0 and legal is not None and not legal:
            raise ValueError("legal_tokens holds no token but the stop token: Z cannot grow")

    def columns(self, vocab_size: int) -> NDArray[np.int64]:
        """Token ids of legal tokens and ⊤, ascending, distinct: the support of the softmax.

        Raises ValueError when one of them is not in the vocabulary.
        """
        if self.legal_tokens is None:
            ids = np.arange(vocab_size, dtype=np.int64)
        else:
            ids = np.unique(np.array([*self.legal_tokens, self.stop_token], dtype=np.int64))
        outside = [i for i in (*ids.tolist(), self.stop_token) if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(
                f"token ids {outside[:8]} of the action space are outside the model's vocabulary "
                f"of {vocab_size}; take legal_tokens and stop_token from this model's tokenizer"
            )
        return ids

    def may_stop(self, length: Any, newest: Any, after_tool: Any) -> Any:
        """Whether ⊤ is open or forced after `length` tokens, unless a tool is speaking.

        All three arguments are numbers, or arrays of one shape.

        Args:
            newest: the last of the tokens; NO_TOKEN after none.
            after_tool: whether a tool inserted it.
        """
        is_open = (length >= self.min_len) & ((length - self.min_len) % self.stop_every == 0)
        if self.stop_after_tool:
            is_open &= after_tool
        if self.stop_behind is not None:
            behind = self.stop_behind
            is_open &= newest in behind if np.ndim(newest) == 0 else np.isin(newest, list(behind))
        return is_open | self.must_stop(length)

    def must_stop(self, length: Any) -> Any:
        """Whether ⊤ is forced after `length` tokens, unless a tool is speaking; int or array."""
        return length >= self.max_len

    def stop_states(self, completion: _Tokens, from_tool: _Marks) -> NDArray[np.bool_]:
        """[L + 1] True at every prefix where the policy may or must stop.

        Never where the next token is inserted by a tool.
        """
        inserted_L = np.asarray(from_tool, dtype=np.bool_)
        newest_S = np.append(NO_TOKEN, np.asarray(completion, dtype=np.int64))
        may_S = self.may_stop(np.arange(len(newest_S)), newest_S, np.append(False, inserted_L))
        return may_S & ~np.append(inserted_L, False)

    def stop_positions(self, completion: _Tokens, from_tool: _Marks) -> NDArray[np.int32]:
        """[S] the stop states as ascending prefix lengths."""
        return np.flatnonzero(self.stop_states(completion, from_tool)).astype(np.int32)

    def check(self, completion: Sequence[int], from_tool: Sequence[bool]) -> None:
        """Raise IllegalCompletion when the policy cannot produce `completion`, saying where."""
        if len(completion) != len(from_tool):
            raise IllegalCompletion(
                f"{len(completion)} tokens but {len(from_tool)} from_tool marks in one completion"
            )
        if len(completion) < self.min_len:
            raise IllegalCompletion(
                f"completion of {len(completion)} tokens is shorter than min_len={self.min_len}"
            )
        if not self.stop_states(completion, from_tool)[-1]:
            rules = {
                "right after a tool's text (stop_after_tool)": self.stop_after_tool,
                "after one of certain tokens (stop_behind)": self.stop_behind is not None,
                f"at a multiple of {self.stop_every} tokens (stop_every)": self.stop_every > 1,
            }
            raise IllegalCompletion(
                f"completion of {len(completion)} tokens ends where the policy cannot stop: not "
                + ", or not ".join(rule for rule, holds in rules.items() if holds)
            )
        chosen = ~np.asarray(from_tool, dtype=np.bool_)
        tokens = np.asarray(completion, dtype=np.int64)
        illegal = chosen & (tokens == self.stop_token)
        if self.legal_tokens is not None:
            illegal |= chosen & ~np.isin(tokens, np.array(self.legal_tokens, dtype=np.int64))
        if illegal.any():
            place = int(np.argmax(illegal))
            raise IllegalCompletion(
                f"token {int(tokens[place])} at place {place} of a completion is not a legal "
                "token of the policy; filter the data or widen legal_tokens"
            )
        if chosen[self.max_len :].any():
            raise IllegalCompletion(
                f"completion chooses {int(chosen.sum())} of {len(tokens)} tokens, one of them "
                f"beyond max_len={self.max_len}; shorten the data or raise max_len"
            )
