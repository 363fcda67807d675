"""Beam search and diverse beam search over what the policy may write.

The likeliest completions are sought, by log q(Z ⊤ | X) whatever their length. A hypothesis that has
stopped leaves its place to one that has not, and goes on competing with those that stop later, so a
beam as wide as there are completions ranks them all exactly.

Diverse beam search (Vijayakumar et al. 2018) splits the beams into groups that choose one after
the other at each length; a token costs `penalty` nats for each hypothesis of an earlier group that
has just taken it (their Hamming diversity). ⊤ costs nothing. Penalties add up along a hypothesis
and rank it within its group; what is returned is its log q itself.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain

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


@dataclass(frozen=True, slots=True)
class _Beam:
    """A hypothesis under way, or ended."""

    tokens: tuple[int, ...]
    score: float  # log q less penalties, nats
    log_q: float
    row: int  # of what it continues: a prompt, or a hypothesis in the last pass


@dataclass(eq=False)
class BeamSearch:
    """Searches with a KV cache shared by the beams of several prompts.

    `model` is a causal LM of transformers, as for `lm.sampling.Sampler`. No tool speaks.

    Raises:
        ValueError: beams that make no equal groups, or a penalty below 0.
    """

    model: nn.Module
    actions: ActionSpace
    _: KW_ONLY
    beams: int  # hypotheses kept for a prompt, in all groups; 1 is greedy decoding
    groups: int  # of equal size; 1 is plain beam search
    penalty: float  # nats, see above; without effect on one group
    max_rows: int  # under way at once, but that the beams of a prompt are never parted

    def __post_init__(self) -> None:
        if self.beams < 1 or self.groups < 1 or self.beams % self.groups:
            raise ValueError(f"{self.beams} beams make no {self.groups} groups of equal size")
        if not self.penalty >= 0:
            raise ValueError(f"a diversity penalty of {self.penalty} nats would reward sameness")
        self.model.eval()
        self._width = self.beams // self.groups
        self._prompts_at_once = max(1, self.max_rows // self.beams)
        self._device = next(self.model.parameters()).device
        self._distribution = ActionDistribution(self.actions, vocab_size(self.model), self._device)
        self._ids, self._stop = self._distribution.id_C.tolist(), self.actions.stop_token

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
        require_context(self.model, longest + self.actions.max_len)
        prompts = [(*text_prefix_of(self.model), *prompt) for prompt in prompts]
        size = self._prompts_at_once
        parts = (prompts[at : at + size] for at in range(0, len(prompts), size))
        return [found for part in parts for found in self._search(part)]

    def _search(self, prompts: Sequence[tuple[int, ...]]) -> list[list[Hypothesis]]:
        max_len, groups = self.actions.max_len, self.groups
        # Of each prompt its groups, one after the other; each begins with the empty completion.
        running = [[_Beam((), 0.0, 0.0, row=p)] for p in range(len(prompts)) for _ in range(groups)]
        ended: list[list[_Beam]] = [[] for _ in running]
        prefill = Prefill.run(self.model, prompts)
        longest = max(len(prompt) for prompt in prompts)
        cache = SlotCache(slots=len(running) * self._width, columns=longest + max_len)
        row_N = torch.arange(len(running), device=self._device) // groups
        cache.write(torch.arange(len(row_N), device=self._device), prefill.states, row_N)
        logits_NV = prefill.logits_UV[row_N]
        for length in range(max_len):
            log_q_NC = self._log_q(logits_NV, list(chain.from_iterable(running)), length)
            running = self._grow(running, ended, log_q_NC)
            live = list(chain.from_iterable(running))
            if not live or length + 1 == max_len:
                break
            cache.reorder(torch.tensor([beam.row for beam in live], device=self._device))
            logits_NV = decode_step(
                self.model,
                cache,
                [beam.tokens[-1] for beam in live],
                [len(prompts[at // groups]) + length for at, g in enumerate(running) for _ in g],
            )
        found: list[list[Hypothesis]] = [[] for _ in prompts]
        for at, beams in enumerate(running):  # ⊤ is forced, log q(⊤) = 0
            best = self._best([*ended[at], *beams])
            found[at // groups] += [Hypothesis(tokens=b.tokens, log_q=b.log_q) for b in best]
        return [sorted(one, key=lambda hypothesis: -hypothesis.log_q) for one in found]

    def _log_q(self, logits_NV: Tensor, live: Sequence[_Beam], length: int) -> Tensor:
        """[N, C] nats of what may follow."""
        newest_N = np.array([beam.tokens[-1] if length else NO_TOKEN for beam in live])
        length_N, by_tool_N = np.full(len(live), length), np.zeros(len(live), dtype=np.bool_)
        may_stop_N = self.actions.may_stop(length_N, newest_N, by_tool_N)
        log_q_NC = self._distribution.log_q(logits_NV, may_stop_N)
        if log_q_NC.isnan().any():
            raise PolicyDiverged(
                "log q of this policy is not finite: its weights diverged; take an earlier adapter"
            )
        return log_q_NC

    def _grow(
        self, running: list[list[_Beam]], ended: list[list[_Beam]], log_q_NC: Tensor
    ) -> list[list[_Beam]]:
        """One action for each hypothesis: those that go on. `ended` takes in the others."""
        grown: list[list[_Beam]] = []
        taken_C = log_q_NC.new_zeros(log_q_NC.shape[1])
        first = 0
        for at, log_q_BC in enumerate(log_q_NC.split([len(beams) for beams in running])):
            if at % self.groups == 0:
                taken_C.zero_()
            ways = self._ways(running[at], log_q_BC, taken_C, first)
            # As everything else, stopping is worth it only among the W best ways to go on.
            stopped = [way for way in ways[: self._width] if way.tokens[-1] == self._stop]
            ended[at] += [replace(way, tokens=way.tokens[:-1]) for way in stopped]
            ended[at] = self._best(ended[at])
            going = [way for way in ways if way.tokens[-1] != self._stop][: self._width]
            if len(ended[at]) == self._width:
                # No score rises, so what is behind a full house of ended ones cannot come in.
                going = [way for way in going if way.score > ended[at][-1].score]
            grown.append(going)
            newest_W = torch.tensor([way.tokens[-1] for way in going], device=self._device)
            column_W = self._distribution.column(newest_W.long())
            taken_C += torch.bincount(column_W, minlength=len(taken_C))
            first += len(log_q_BC)
        return grown

    def _ways(
        self, beams: Sequence[_Beam], log_q_BC: Tensor, taken_C: Tensor, first: int
    ) -> list[_Beam]:
        """The best ways to go on or stop, W that go on among them if there are; best first."""
        score_B1 = log_q_BC.new_tensor([beam.score for beam in beams])[:, None]
        score_R = (score_B1 + log_q_BC - self.penalty * taken_C).flatten()
        best_K = score_R.topk(min(self._width + len(beams), len(score_R))).indices
        scores, steps = score_R[best_K].tolist(), log_q_BC.flatten()[best_K].tolist()
        ways = []
        for place, score, step in zip(best_K.tolist(), scores, steps, strict=True):
            row, column = divmod(place, len(taken_C))
            tokens = (*beams[row].tokens, self._ids[column])
            ways.append(_Beam(tokens, score, beams[row].log_q + step, first + row))
        return [way for way in ways if way.score > -math.inf]

    def _best(self, beams: Sequence[_Beam]) -> list[_Beam]:
        return sorted(beams, key=lambda beam: -beam.score)[: self._width]
