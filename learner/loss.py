"""The loss of a micro-batch, in one backward pass or, where that would be too large, in several.

A group is more than its rows: log Z and advantages are estimated from all of them. A group larger
than the token budget is therefore passed through the model twice. First without a graph, part by
part, to have its log-probabilities together; the objective and its gradient with respect to *them*
need no model. Then part by part once more, each part's log-probabilities weighted with their
gradients: by the chain rule the sum over parts has the gradient of the whole loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from learner.batch import Batch, row_log_probs, split_rows
from learner.log_z import LogZ
from learner.objectives.base import Objective, ObjectiveInput
from learner.step_metrics import Tally
from lm.actions import ActionSpace
from lm.adapter import adapter_off

# log q of tokens [D, T] and of stopping [D, S], and learned log Z [D] where there is one: what the
# model says of D distinct rows, nats.
Terms = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """An objective over what a model says of trajectories."""

    model: nn.Module
    actions: ActionSpace
    objective: Objective
    log_z: LogZ | None  # the head inside `model` that learns log Z; None: from the group
    token_budget: int  # columns of one pass, at most; a single row may be larger

    def num_passes(self, batch: Batch) -> int:
        return len(split_rows(batch, self.token_budget))

    def losses(
        self, batch: Batch, factor: float, temperature: float, tally: Tally
    ) -> list[Callable[[], Tensor]]:
        """Losses whose gradients add up to that of `factor` times the batch's total.

        They are to be called in order, with the same weights. The first counts the batch in
        `tally`; of several, the values mean nothing.
        """
        parts = split_rows(batch, self.token_budget)
        if len(parts) == 1:
            return [lambda: self._total(batch, self._terms(batch), factor, temperature, tally)]
        slopes: list[Terms] = []

        def of_part(rows: slice) -> Tensor:
            if not slopes:
                slopes.append(self._slopes(batch, factor, temperature, tally))
            terms = self._terms(batch, rows)
            weighted = zip(terms, slopes[0], strict=True)
            return torch.stack([(term * slope[rows]).sum() for term, slope in weighted]).sum()

        return [partial(of_part, rows) for rows in parts]

    @torch.no_grad()
    def inputs(self, batch: Batch, temperature: float) -> ObjectiveInput:
        """The batch under the current policy, without a graph."""
        return self._inputs(batch, self._all_terms(batch), temperature)

    def _total(
        self, batch: Batch, terms: Terms, factor: float, temperature: float, tally: Tally
    ) -> Tensor:
        inputs = self._inputs(batch, terms, temperature)
        value = self.objective(inputs)
        tally.add(batch, inputs, value, factor=factor)
        return value.total * factor

    def _slopes(self, batch: Batch, factor: float, temperature: float, tally: Tally) -> Terms:
        """The gradient of the batch's loss with respect to its terms."""
        with torch.no_grad():
            terms = self._all_terms(batch)
        for term in terms:
            term.requires_grad_(True)
        total = self._total(batch, terms, factor, temperature, tally)
        return torch.autograd.grad(total, terms, allow_unused=True, materialize_grads=True)

    def _inputs(self, batch: Batch, terms: Terms, temperature: float) -> ObjectiveInput:
        base: Terms | None = None
        if self.objective.traits.needs_base:
            with torch.no_grad(), adapter_off(self.model):
                base = self._all_terms(batch)
        row_B = batch.row_B
        return ObjectiveInput(
            log_pf_BT=terms[0][row_B],
            log_stop_BS=terms[1][row_B],
            log_reward_BS=batch.log_reward_BS / temperature,
            stop_BS=batch.stop_BS,
            group_B=batch.group_B,
            log_z_B=None if self.log_z is None else terms[2][row_B],
            behaviour_log_prob_BT=batch.behaviour_log_prob_BT,
            behaviour_log_stop_BS=batch.behaviour_log_stop_BS,
            base_log_pf_BT=None if base is None else base[0][row_B],
            base_log_stop_BS=None if base is None else base[1][row_B],
        )

    def _all_terms(self, batch: Batch) -> Terms:
        """Of all distinct rows, in passes within the budget."""
        parts = [self._terms(batch, rows) for rows in split_rows(batch, self.token_budget)]
        return tuple(torch.cat(terms) for terms in zip(*parts, strict=True))

    def _terms(self, batch: Batch, rows: slice = slice(None)) -> Terms:
        """What the model says of these distinct rows, in one pass."""
        *terms, state_DH = row_log_probs(self.model, self.actions, batch, rows)
        return tuple(terms) if self.log_z is None else (*terms, self.log_z(state_DH))
