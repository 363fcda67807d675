"""The policy's softmax over legal tokens and the stop action, and draws of the next action."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.actions import ActionSpace


class PolicyDiverged(FloatingPointError):
    """The policy's logits are not finite, so nothing can be sampled from them."""


class Choice(NamedTuple):
    """An action for each of N rows, with what the policy said about it, nats, temperature 1."""

    token: list[int]  # the stop token spells ⊤
    log_q: list[float]  # of that token
    log_stop: list[float]  # of ⊤ in the same state


class ActionDistribution:
    """log q of legal tokens and ⊤, on the columns of these alone.

    `id_C` has their token ids, ascending; column `stop_column` is ⊤.
    """

    def __init__(self, actions: ActionSpace, vocab_size: int, device: torch.device) -> None:
        ids = actions.columns(vocab_size)
        self.every_token = len(ids) == vocab_size
        self.id_C = torch.from_numpy(ids).to(device)
        self.stop_column = int(np.searchsorted(ids, actions.stop_token))

    def column(self, token_X: Tensor) -> Tensor:
        """Where in `id_C` each token stands; an arbitrary column for an illegal one."""
        if self.every_token:
            return token_X
        return torch.searchsorted(self.id_C, token_X).clamp_max_(len(self.id_C) - 1)

    def log_q(self, logits: Tensor, may_stop_X: NDArray[np.bool_]) -> Tensor:
        """[X, C] nats, float32 at least, columns as `id_C`, X any shape; a closed ⊤ is -inf.

        Args:
            logits: [X, V], or [X, C] where no others were computed.
        """
        logits_XC = logits if logits.shape[-1] == len(self.id_C) else logits[..., self.id_C]
        logits_XC = logits_XC.to(torch.promote_types(logits_XC.dtype, torch.float32))
        if not may_stop_X.all():
            closed_X = torch.from_numpy(~may_stop_X).to(logits_XC.device)
            logits_XC = logits_XC.clone()
            logits_XC[..., self.stop_column].masked_fill_(closed_X, -torch.inf)
        return torch.log_softmax(logits_XC, dim=-1)

    def choose(
        self,
        logits_NV: Tensor,
        may_stop: Sequence[bool],
        temperatures: Sequence[float],
        top_p: Sequence[float],
        generator: torch.Generator,
    ) -> Choice:
        """Draw from the nucleus of softmax(log q / temperature), ⊤ only where it may; report log q.

        Raises PolicyDiverged when log q of a draw is not finite.
        """
        device = logits_NV.device
        log_q_NC = self.log_q(logits_NV, np.array(may_stop, dtype=np.bool_))
        temperature_N = torch.tensor(temperatures, device=device)
        weight_NC = torch.softmax(log_q_NC / temperature_N[:, None], dim=-1)
        if any(mass < 1 for mass in top_p):
            weight_NC = nucleus(weight_NC, torch.tensor(top_p, device=device))
        # argmax of p / Exp(1) is a draw from p, without multinomial's device-side asserts.
        # The floor keeps 0 / 0 from electing an action of probability 0.
        noise_NC = torch.empty(weight_NC.shape, device=generator.device)
        noise_NC = noise_NC.exponential_(generator=generator).clamp_min_(1e-30).to(device)
        column_N1 = (weight_NC / noise_NC).argmax(dim=-1, keepdim=True)
        log_q_N1, log_stop_N1 = log_q_NC.gather(1, column_N1), log_q_NC[:, self.stop_column, None]
        # The step's only wait for the device; float64 holds ids exactly.
        drawn_N3 = torch.cat([self.id_C[column_N1].double(), log_q_N1, log_stop_N1], dim=1)
        token, log_q, log_stop = drawn_N3.T.tolist()
        if not np.isfinite(log_q).all():
            raise PolicyDiverged(
                f"log q of {len(log_q) - int(np.isfinite(log_q).sum())} of {len(log_q)} sampled "
                "tokens is not finite: the weights diverged; lower the learning rate and resume "
                "from an earlier checkpoint"
            )
        return Choice([int(t) for t in token], log_q, log_stop)


def nucleus(p_NC: Tensor, mass_N: Tensor) -> Tensor:
    """[N, C] `p_NC` with 0 outside the fewest likeliest actions that hold `mass_N` of each row.

    Nucleus sampling (Holtzman et al. 2020); not normalised anew.
    """
    sorted_NC, column_NC = p_NC.sort(dim=-1, descending=True)
    before_NC = sorted_NC.cumsum(dim=-1) - sorted_NC
    outside_NC = (before_NC >= mass_N[:, None]) & (mass_N[:, None] < 1)
    return p_NC.masked_fill(outside_NC.scatter(1, column_NC, outside_NC), 0.0)
