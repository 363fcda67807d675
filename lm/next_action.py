"""What may come next after given prefixes: log-probabilities of all actions, or of all tokens."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.action_distribution import ActionDistribution
from lm.actions import ActionSpace
from lm.attention import attention_mask
from lm.chunked_head import OutputHead, head_replaced
from lm.model import require_context, text_prefix_of
from lm.packing import TokenTree

Prefix = tuple[int, ...]

# A tree grows by this many tokens beyond its first prefix. Attention within it is quadratic.
TREE_TOKENS = 384


class NextLogits:
    """A causal LM asked for what may come next, after many prefixes at once.

    A prefix is the whole text: prompt, then tokens of the completion. The last pass is kept, up to
    the output head, since the frozen LM is asked the same as a policy and as the prior.

    Args:
        active: within it `model` is what is asked, such as one without its adapter.
    """

    def __init__(
        self, model: Any, active: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.model, self.active = model, active
        self._hidden = lru_cache(maxsize=1)(self._ask)

    def _ask(self, prefixes: tuple[Prefix, ...]) -> Tensor:
        return last_hidden(self.model, prefixes)

    def action_log_probs(
        self, actions: ActionSpace, prefixes: Sequence[Prefix], may_stop: Sequence[bool]
    ) -> Tensor:
        """[N, C] log q of every action, nats, float32, columns as `actions.columns`.

        ⊤ is -inf where it may not be chosen. Raises ValueError as next_logits does, and for an
        action outside the vocabulary.
        """
        head, device = OutputHead.of(self.model), next(self.model.parameters()).device
        distribution = ActionDistribution(actions, head.vocab_size, device)
        with torch.no_grad(), self.active():
            logits_NC = head.logits_of(self._hidden(tuple(prefixes)), distribution.id_C)
        return distribution.log_q(logits_NC, np.array(may_stop, dtype=np.bool_))

    def token_log_probs(self, prefixes: Sequence[Prefix], tokens: NDArray[np.int64]) -> Tensor:
        """[N, K] log p of K tokens after each prefix, nothing masked, nats, float32."""
        with torch.no_grad(), self.active():
            hidden_ND = self._hidden(tuple(prefixes))
            token_NK = torch.from_numpy(tokens).to(hidden_ND.device)
            return OutputHead.of(self.model).log_probs_of(hidden_ND, token_NK)


@torch.no_grad()
def next_logits(model: nn.Module, prefixes: Sequence[Prefix]) -> Tensor:
    """[N, V] float32 logits after each prefix; raises as `last_hidden`."""
    return OutputHead.of(model).logits(last_hidden(model, prefixes))


@torch.no_grad()
def last_hidden(model: nn.Module, prefixes: Sequence[Prefix]) -> Tensor:
    """[N, D] what the head is given after each prefix; what they begin with in common is read once.

    Raises ValueError for no prefix, an empty one, or one longer than the model's context.
    """
    if not prefixes or not all(prefixes):
        raise ValueError("next_logits needs at least one prefix, and none of them empty")
    require_context(model, max(len(prefix) for prefix in prefixes))
    prefixes = [(*text_prefix_of(model), *prefix) for prefix in prefixes]
    order = sorted(range(len(prefixes)), key=lambda n: prefixes[n])
    trees: list[TokenTree] = []
    columns: list[list[int]] = []  # of each tree: where its prefixes end
    limit = 0
    for n in order:
        prefix = prefixes[n]
        if not trees or trees[-1].width_with(prefix) > limit:
            trees.append(TokenTree())
            columns.append([])
            limit = len(prefix) + TREE_TOKENS
        columns[-1].append(int(trees[-1].add(prefix)[-1]))
    sorted_ND = torch.cat([_hidden(model, *row) for row in zip(trees, columns, strict=True)])
    place_N = torch.empty(len(order), dtype=torch.long)
    place_N[order] = torch.arange(len(order))
    return sorted_ND[place_N.to(sorted_ND.device)]


def _hidden(model: nn.Module, tree: TokenTree, columns: Sequence[int]) -> Tensor:
    """[N, D] of N columns."""
    device = next(model.parameters()).device
    position_1W = torch.tensor([tree.positions], device=device)
    sees_1WW = torch.from_numpy(tree.sees()[None]).to(device)
    kept_K, row_N = torch.tensor(columns, device=device).unique(return_inverse=True)
    found: list[Tensor] = []
    with head_replaced(model, found.append):
        model(
            input_ids=torch.tensor([tree.tokens], device=device),
            position_ids=position_1W,
            attention_mask=attention_mask(model, sees_1WW, position_1W, position_1W),
            logits_to_keep=kept_K,
            use_cache=False,
        )
    return found[0][0, row_N]
