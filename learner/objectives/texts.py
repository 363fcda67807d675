"""Maximum likelihood of texts under the language model itself: every token of it may come next.

    loss = - log p(text | X) = - sum_k log p(text_k | X text_1:k-1),  a mean over texts, nats

Unlike the completion of a policy, a text has no legal tokens and no stop action of its own: what
ends it, such as a full stop, is a token like any other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput, ObjectiveValue
from learner.objectives.potential import last_stops, path_log_probs
from lm.actions import ActionSpace


def text_actions(*, end_token: int, max_len: int) -> ActionSpace:
    """The whole vocabulary at every place of a text.

    Args:
        end_token: stands for the stop action, which no text takes; in none of them.
        max_len: tokens of the longest text, or more.
    """
    return ActionSpace(stop_token=end_token, legal_tokens=None, min_len=0, max_len=max_len)


@dataclass(frozen=True)
class TextLikelihood:
    """Negative log-likelihood of whole texts; see learner.objectives.base.Objective.

    Stopping is left out, and so are rewards. Over texts Z Y with Z ~ q(Z | X) this is what an
    M-step lowers: - E_q[log p(Z Y | X)], but for the sampling error of a fixed set of Z.
    """

    def weight(self, stop_BS: Tensor) -> Tensor:
        """The number of rows."""
        return torch.tensor(stop_BS.shape[0], dtype=torch.float64, device=stop_BS.device)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        end_B1 = last_stops(batch.stop_BS)[:, None]
        log_p_B = path_log_probs(batch.log_pf_BT).gather(1, end_B1).squeeze(1)
        return ObjectiveValue(total=-log_p_B.sum(), row_sums={"log_p_nats": log_p_B.detach().sum()})
