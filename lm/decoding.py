"""Beam search and diverse beam search over what the policy may write.

The likeliest completions are sought, by log q(Z ⊤ | X) and with no regard to their length, where
`lm.sampling` draws them. A hypothesis that has stopped leaves its place to one that has not, and
goes on competing with those that stop later, so a beam as wide as there are completions ranks them
all exactly.

Diverse beam search (Vijayakumar et al. 2018) splits the beams into groups that choose one after
the other at each length; a token costs `penalty` nats for each hypothesis of an earlier group that
has just taken it (their Hamming diversity). ⊤ costs nothing. Penalties add up along a hypothesis
and rank it within its group; what is returned is its log q itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lm.action_distribution import ActionDistribution, PolicyDiverged
from lm.actions import NO_TOKEN, ActionSpace
from lm.cache import SlotCache, decode_step
from lm.model import require_context, text_prefix_of, vocab_size
from lm.prefill import Prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A completion that a search has found."""

    tokens: tuple[int, ...]  # stop token excluded
    log_q: float  # of the completion and ⊤, nats


class _Beams:
    """Hypotheses of P prompts, in G groups of W beams; a score of -inf marks an empty place."""

    def __init__(self, shape: tuple[int, int, int], max_len: int, device: torch.device) -> None:
        self.score_PGW = torch.full(shape, -torch.inf, device=device)  # log q less penalties
        self.log_q_PGW = torch.full(shape, -torch.inf, device=device)
        self.column_PGWT = torch.zeros(*shape, max_len, dtype=torch.long, device=device)
        self.length_PGW = torch.zeros(shape, dtype=torch.long, device=device)

    def live(self) -> Tensor:
        """[N] the places that are not empty, counted through prompts, groups and beams."""
        return (self.score_PGW > -torch.inf).flatten().nonzero().flatten()


class BeamSearch:
    """Searches with a KV cache shared by the beams of several prompts.

    `model` is a causal LM of transformers, as for `lm.sampling.Sampler`. No tool speaks.

    Args:
        beams: hypotheses kept for a prompt, in all groups; 1 is greedy decoding.
        groups: of equal size; 1 is plain beam search.
        penalty: nats, see above; without effect on one group.
        max_rows: hypotheses under way at once, but that the beams of a prompt are never parted.

    Raises:
        ValueError: beams that make no equal groups, or a penalty below 0.
    """

    def __init__(
        self,
        model: nn.Module,
        actions: ActionSpace,
        *,
        beams: int,
        groups: int,
        penalty: float,
        max_rows: int,
    ) -> None:
        if beams < 1 or groups < 1 or beams % groups:
            raise ValueError(f"{beams} beams make no {groups} groups of equal size")
        if not penalty >= 0:
            raise ValueError(f"a diversity penalty of {penalty} nats would reward sameness")
        self._model = model.eval()
        self._actions = actions
        self._groups, self._width, self._penalty = groups, beams // groups, penalty
        self._prompts_at_once = max(1, max_rows // beams)
        self._device = next(model.parameters()).device
        self._distribution = ActionDistribution(actions, vocab_size(model), self._device)

    @torch.inference_mode()
    def search(self, prompts: Sequence[tuple[int, ...]]) -> list[list[Hypothesis]]:
        """For each prompt what its beams end with, likeliest first.

        One for each beam, fewer where fewer completions exist; two groups may find the same.

        Raises:
            ValueError: an empty prompt, or a text that outgrows the model.
            PolicyDiverged: log q is NaN.
        """
        if not all(prompts):
            raise ValueError("empty prompt: a search needs at least one token to start from")
        longest = max((len(prompt) for prompt in prompts), default=0)
        require_context(self._model, longest + self._actions.max_len)
        prompts = [(*text_prefix_of(self._model), *prompt) for prompt in prompts]
        size = self._prompts_at_once
        parts = (prompts[at : at + size] for at in range(0, len(prompts), size))
        return [found for part in parts for found in self._search(part)]

    def _search(self, prompts: Sequence[tuple[int, ...]]) -> list[list[Hypothesis]]:
        max_len, beams = self._actions.max_len, self._groups * self._width
        shape = (len(prompts), self._groups, self._width)
        running, ended = (_Beams(shape, max_len, self._device) for _ in range(2))
        running.score_PGW[..., 0] = running.log_q_PGW[..., 0] = 0.0  # the empty completion
        live_N = running.live()
        prefill = Prefill.run(self._model, prompts)
        longest = max(len(prompt) for prompt in prompts)
        cache = SlotCache(slots=running.score_PGW.numel(), columns=longest + max_len)
        slot_N = torch.arange(len(live_N), device=self._device)
        cache.write(slot_N, prefill.keys, prefill.values, live_N // beams)
        logits_NV = prefill.logits_UV[live_N // beams]
        for length in range(max_len):
            log_q_PGWC = self._log_q(logits_NV, live_N, running, length)
            parent_R = self._grow(running, ended, log_q_PGWC, length).flatten()
            slot_R = torch.zeros_like(parent_R)
            slot_R[live_N] = torch.arange(len(live_N), device=self._device)
            live_N = running.live()
            if not len(live_N) or length + 1 == max_len:
                break
            cache.reorder(slot_R[parent_R[live_N]])
            column_N = running.column_PGWT[..., length].flatten()[live_N]
            logits_NV = decode_step(
                self._model,
                cache,
                self._distribution.id_C[column_N].tolist(),
                [len(prompts[p]) + length for p in (live_N // beams).tolist()],
            )
        for group in range(self._groups):  # ⊤ is forced, log q(⊤) = 0
            score_PW, log_q_PW = running.score_PGW[:, group], running.log_q_PGW[:, group]
            _keep_best(ended, running, group, score_PW, log_q_PW)
        return self._hypotheses(ended)

    def _log_q(self, logits_NV: Tensor, live_N: Tensor, running: _Beams, length: int) -> Tensor:
        """[P, G, W, C] nats of what may follow, -inf behind empty places."""
        newest_N = np.full(len(live_N), NO_TOKEN)
        if length:
            column_N = running.column_PGWT[..., length - 1].flatten()[live_N]
            newest_N = self._distribution.id_C[column_N].cpu().numpy()
        length_N, by_tool_N = np.full(len(live_N), length), np.zeros(len(live_N), dtype=np.bool_)
        may_stop_N = self._actions.may_stop(length_N, newest_N, by_tool_N)
        log_q_NC = self._distribution.log_q(logits_NV, may_stop_N)
        if log_q_NC.isnan().any():
            raise PolicyDiverged(
                "log q of this policy is not finite: its weights diverged; take an earlier adapter"
            )
        shape = (*running.score_PGW.shape, log_q_NC.shape[-1])
        log_q_PGWC = log_q_NC.new_full(shape, -torch.inf)
        log_q_PGWC.view(-1, shape[-1])[live_N] = log_q_NC
        return log_q_PGWC

    def _grow(self, running: _Beams, ended: _Beams, log_q_PGWC: Tensor, length: int) -> Tensor:
        """One action for each hypothesis; [P, G, W] the places that the new ones come from."""
        prompts, groups, width, actions = log_q_PGWC.shape
        stop = self._distribution.stop_column
        taken_PC = log_q_PGWC.new_zeros(prompts, actions)
        parent_PGW = torch.zeros_like(running.length_PGW)
        first_P = torch.arange(prompts, device=self._device)[:, None] * groups * width
        for group in range(groups):
            step_PWC = log_q_PGWC[:, group] - self._penalty * taken_PC[:, None]
            score_PWC = running.score_PGW[:, group, :, None] + step_PWC
            # As everything else, stopping is worth it only among the W best ways to go on.
            best_PW = score_PWC.flatten(1).topk(width).indices
            is_best_PWC = torch.zeros_like(score_PWC, dtype=torch.bool)
            is_best_PWC.view(prompts, -1).scatter_(1, best_PW, True)
            stopped_PW = score_PWC[..., stop].masked_fill(~is_best_PWC[..., stop], -torch.inf)
            total_PWC = running.log_q_PGW[:, group, :, None] + log_q_PGWC[:, group]
            _keep_best(ended, running, group, stopped_PW, total_PWC[..., stop])
            score_PWC[..., stop] = -torch.inf
            new_score_PW, best_PW = score_PWC.flatten(1).topk(width)
            parent_PW, column_PW = best_PW // actions, best_PW % actions
            # No score rises, so what is behind a full house of ended ones cannot come in any more.
            hopeless_PW = new_score_PW <= ended.score_PGW[:, group].amin(dim=1, keepdim=True)
            running.score_PGW[:, group] = new_score_PW.masked_fill(hopeless_PW, -torch.inf)
            running.log_q_PGW[:, group] = total_PWC.flatten(1).gather(1, best_PW)
            running.column_PGWT[:, group] = _pick(running.column_PGWT[:, group], parent_PW)
            running.column_PGWT[:, group, :, length] = column_PW
            running.length_PGW[:, group] = length + 1
            taken_PC.scatter_add_(1, column_PW, (~hopeless_PW).float())
            parent_PGW[:, group] = first_P + group * width + parent_PW
        return parent_PGW

    def _hypotheses(self, ended: _Beams) -> list[list[Hypothesis]]:
        found: list[list[Hypothesis]] = [[] for _ in ended.score_PGW]
        beams = self._groups * self._width
        tokens_RT = self._distribution.id_C[ended.column_PGWT].flatten(0, 2).tolist()
        lengths, log_q = ended.length_PGW.flatten().tolist(), ended.log_q_PGW.flatten().tolist()
        for place in ended.live().tolist():
            tokens = tuple(tokens_RT[place][: lengths[place]])
            found[place // beams].append(Hypothesis(tokens=tokens, log_q=log_q[place]))
        return [sorted(one, key=lambda hypothesis: -hypothesis.log_q) for one in found]


def _keep_best(
    ended: _Beams, running: _Beams, group: int, score_PW: Tensor, log_q_PW: Tensor
) -> None:
    """Of the group's ended hypotheses and its running ones, as they would end now, the W best."""
    score_PQ = torch.cat([ended.score_PGW[:, group], score_PW], dim=1)
    ended.score_PGW[:, group], best_PW = score_PQ.topk(score_PW.shape[1])
    for mine_PGW, theirs_PW in (
        (ended.log_q_PGW, log_q_PW),
        (ended.column_PGWT, running.column_PGWT[:, group]),
        (ended.length_PGW, running.length_PGW[:, group]),
    ):
        mine_PGW[:, group] = _pick(torch.cat([mine_PGW[:, group], theirs_PW], dim=1), best_PW)


def _pick(values_PQX: Tensor, chosen_PW: Tensor) -> Tensor:
    """[P, W, ...] of [P, Q, ...], those at places `chosen_PW` of each row."""
    rows_P1 = torch.arange(len(chosen_PW), device=chosen_PW.device)[:, None]
    return values_PQX[rows_P1, chosen_PW]
