"""How a task is rewarded: the text that the frozen LM scores after every prefix, or a function."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actors.prompts import Prompt
from reward.request import ScoreItem

RewardKind = Literal["suffix", "stop", "function"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardQuery:
    """How a completion Z of a prompt becomes a question to a scorer; X is the prompt's scored one.

    suffix    log p_LM(z_1:t Y | context X)
    stop      log p_LM(z_1:t ⊤ | context X)
    function  the task's own, of X and Z; no LM is asked
    """

    kind: RewardKind
    stop_token: int  # spells ⊤
    context: tuple[int, ...] = ()  # token ids in front of X when the frozen LM scores
    # Y -> the answer that is wrong where Y is right, of one length or not ...
    rivals: Mapping[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    # ... and the nats by which log R is less where the frozen LM finds that one likelier behind z.
    rival_penalty: float = 0.0

    def item(
        self,
        prompt: Prompt,
        completion: Sequence[int] | NDArray[np.int32],
        stops: NDArray[np.int32],
    ) -> ScoreItem:
        """The question for one completion at its stop states, [S] prefix lengths."""
        answer = (self.stop_token,) if self.kind == "stop" else prompt.answer
        context = (*self.context, *prompt.scored_prompt)
        return ScoreItem.of(
            context,
            completion,
            stops=stops,
            answer=answer,
            record=prompt.record,
            shared=len(self.context),
        )

    def asked(self, items: Sequence[ScoreItem]) -> list[ScoreItem]:
        """What to ask a scorer for `items`: where wrong answers have a price, for those as well."""
        if not self.rival_penalty:
            return list(items)
        rivals = [np.array(self.rivals[tuple(one.answer.tolist())], np.int32) for one in items]
        return [*items, *(replace(i, answer=y) for i, y in zip(items, rivals, strict=True))]

    def judged(self, scores: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """log R at the stop states of items, of what was found for those `asked`."""
        if not self.rival_penalty:
            return list(scores)
        right, wrong = scores[: len(scores) // 2], scores[len(scores) // 2 :]
        return [
            (own_S - self.rival_penalty * (other_S > own_S)).astype(np.float32)
            for own_S, other_S in zip(right, wrong, strict=True)
        ]


class DirectScorer:
    """A Scorer for tasks whose log-reward is a function: nats at each stop state of an item."""

    def __init__(self, log_reward: Callable[[ScoreItem], NDArray[np.float32]]) -> None:
        self._log_reward = log_reward

    def submit(self, items: Sequence[ScoreItem]) -> Future[list[NDArray[np.float32]]]:
        """Score at once."""
        scores: Future[list[NDArray[np.float32]]] = Future()
        scores.set_result([self._log_reward(item) for item in items])
        return scores
