"""What a task asks of its reward: which text the frozen LM scores behind every prefix, or none."""

from collections.abc import Sequence
from dataclasses import dataclass
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

    def item(
        self,
        prompt: Prompt,
        completion: Sequence[int] | NDArray[np.int32],
        stops: NDArray[np.int32],
    ) -> ScoreItem:
        """The question for one completion at its stop states, [S] prefix lengths."""
        answer = (self.stop_token,) if self.kind == "stop" else prompt.answer
        return ScoreItem(
            context=np.array([*self.context, *prompt.scored_prompt], dtype=np.int32),
            completion=np.asarray(completion, dtype=np.int32),
            stops=stops,
            answer=np.array(answer, dtype=np.int32),
        )
