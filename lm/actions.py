"""What the policy may do in a state: the legal tokens, the stop action and where it is open.

A state is a prefix of t tokens of a completion Z. The policy is ONE softmax over the legal tokens
and the stop action ⊤, which is spelled by a token id of the model's vocabulary:

    t < min_len             ⊤ is impossible (-inf)
    min_len <= t < max_len  ⊤ competes with the legal tokens
    t >= max_len            ⊤ is forced, log q(⊤) = 0

A task whose rationale ends with a finished step may narrow this further: with `stop_after_tool`, ⊤
has probability zero but right after a tool's text.

Text that a tool inserts is always inserted whole, so a completion may be longer than max_len.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


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

    def __post_init__(self) -> None:
        if not 0 <= self.min_len <= self.max_len:
            raise ValueError(
                f"min_len={self.min_len}, max_len={self.max_len}: need 0 <= min_len <= max_len"
            )
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

    def mask(self, vocab_size: int, may_stop: bool) -> NDArray[np.bool_]:
        """[V] True where the policy has support; ⊤ only when `may_stop`.

        Raises ValueError when an action is not in the vocabulary.
        """
        mask_V = np.zeros(vocab_size, dtype=np.bool_)
        mask_V[self.columns(vocab_size)] = True
        mask_V[self.stop_token] = may_stop
        return mask_V

    @overload
    def may_stop(self, length: int, after_tool: bool) -> bool: ...

    @overload
    def may_stop(
        self, length: NDArray[np.int64], after_tool: NDArray[np.bool_]
    ) -> NDArray[np.bool_]: ...

    def may_stop(self, length: Any, after_tool: Any) -> Any:
        """Whether ⊤ is open or forced after `length` tokens, unless a tool is speaking.

        Args:
            after_tool: whether a tool inserted the last of them.
        """
        narrowed = after_tool | self.must_stop(length) if self.stop_after_tool else True
        return (length >= self.min_len) & narrowed

    def must_stop(self, length: Any) -> Any:
        """Whether ⊤ is forced after `length` tokens, unless a tool is speaking; int or array."""
        return length >= self.max_len

    def stop_states(self, from_tool: Sequence[bool] | NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[L + 1] True at every prefix where the policy may or must stop.

        Never where the next token is inserted by a tool. The last state of a completion that the
        policy can produce is always one.
        """
        inserted_L = np.asarray(from_tool, dtype=np.bool_)
        length_S = np.arange(len(inserted_L) + 1)
        return self.may_stop(length_S, np.append(False, inserted_L)) & ~np.append(inserted_L, False)

    def stop_positions(self, from_tool: Sequence[bool] | NDArray[np.bool_]) -> NDArray[np.int32]:
        """[S] the stop states as ascending prefix lengths."""
        return np.flatnonzero(self.stop_states(from_tool)).astype(np.int32)

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
        if not self.stop_states(from_tool)[-1]:
            raise IllegalCompletion(
                f"completion of {len(completion)} tokens ends where the policy cannot stop: not "
                "right after a tool's text (stop_after_tool)"
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
