"""Maximum likelihood: of a policy's completions, and of texts under the language model itself."""

from dataclasses import dataclass
from typing import ClassVar

from learner.objectives.base import ObjectiveInput, ObjectiveValue, PerTrajectory
from learner.objectives.potential import at_end, path_log_probs
from learner.objectives.traits import TRAITS


@dataclass(frozen=True)
class MaximumLikelihood(PerTrajectory):
    """Supervised fine-tuning: negative log-likelihood of completions, a mean over them, nats.

        - log q(Z ⊤ | X) = - sum_k log q(z_{k+1} | z_1:k) - log q(⊤ | Z)

    Tool tokens have probability 1 and teach nothing; rewards do not enter. Over a fixed set of
    completions the optimum is their empirical distribution (the KL from it to q is least).
    """

    traits: ClassVar = TRAITS["sft"]

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        log_q_B = at_end(path_log_probs(batch.log_pf_BT) + batch.log_stop_BS, batch.stop_BS)
        return ObjectiveValue(-log_q_B.sum(), {"log_q_nats": log_q_B.detach().sum()})


@dataclass(frozen=True)
class TextLikelihood(PerTrajectory):
    """Negative log-likelihood of whole texts, a mean over texts, nats.

        - log p(text | X) = - sum_k log p(text_k | X text_1:k-1)

    A text has no legal tokens and no stop action of its own: what ends it, such as a full stop, is
    a token like any other. Rewards do not enter. Over texts Z Y with Z ~ q(Z | X) this is what an
    M-step lowers, - E_q[log p(Z Y | X)], but for the sampling error of a fixed set of Z.
    """

    traits: ClassVar = TRAITS["joint"]

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        log_p_B = at_end(path_log_probs(batch.log_pf_BT), batch.stop_BS)
        return ObjectiveValue(-log_p_B.sum(), {"log_p_nats": log_p_B.detach().sum()})
