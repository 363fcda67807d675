"""What may come next after given prefixes: log-probabilities of all actions, or of all tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lm.actions import ActionSpace
from lm.model import require_context

Prefix = tuple[int, ...]

# A tree grows by this many tokens beyond its first prefix. Attention within it is quadratic.
TREE_TOKENS = 384


class NextLogits:
    """A causal LM asked for what may come next, after many prefixes at once.

    A prefix is the whole text: prompt, then tokens of the completion. The last answer is kept,
    since the frozen LM is asked the same as a policy and as the prior.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._asked: tuple[Prefix, ...] = ()
        self._logits_NV = torch.empty(0)

    def action_log_probs(
        self, actions: ActionSpace, prefixes: Sequence[Prefix], may_stop: Sequence[bool]
    ) -> Tensor:
        """[N, C] log q of every action, nats, float32, columns as `actions.columns`.

        The same softmax over legal tokens and ⊤ that sampler and scorer use; ⊤ is -inf where it
        may not be chosen.

        Raises ValueError as next_logits does, and for an action outside the vocabulary.
        """
        logits_NV = self._logits(prefixes)
        ids = actions.columns(logits_NV.shape[-1])
        logits_NC = logits_NV[:, torch.from_numpy(ids).to(logits_NV.device)]  # a copy
        closed_N = ~torch.tensor(may_stop, device=logits_NV.device)
        logits_NC[closed_N, int(np.searchsorted(ids, actions.stop_token))] = -torch.inf
        return logits_NC.log_softmax(dim=-1)

    def token_log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        """[N, V] log p of every token of the vocabulary, nothing masked, nats, float32."""
        return self._logits(prefixes).log_softmax(dim=-1)

    def _logits(self, prefixes: Sequence[Prefix]) -> Tensor:
        if self._asked != tuple(prefixes):
            self._logits_NV = next_logits(self._model, prefixes)
            self._asked = tuple(prefixes)
        return self._logits_NV


@torch.no_grad()
def next_logits(model: nn.Module, prefixes: Sequence[Prefix]) -> Tensor:
    """[N, V] float32 logits behind each prefix.

    What prefixes begin with in common runs through the model once: all of them are laid out as one
    tree of tokens in which a token sees its ancestors alone, at its own depth's position.

    Raises ValueError for no prefix, an empty one, or one longer than the model's context.
    """
    if not prefixes or not all(prefixes):
        raise ValueError("next_logits needs at least one prefix, and none of them empty")
    require_context(model, max(len(prefix) for prefix in prefixes))
    order = sorted(range(len(prefixes)), key=lambda n: prefixes[n])
    trees: list[_TokenTree] = []
    for n in order:
        if not trees or not trees[-1].add(prefixes[n]):
            trees.append(_TokenTree(prefixes[n]))
    sorted_NV = torch.cat([tree.logits(model) for tree in trees])
    place_N = torch.empty(len(order), dtype=torch.long)
    place_N[order] = torch.arange(len(order))
    return sorted_NV[place_N.to(sorted_NV.device)]


class _TokenTree:
    """Prefixes, given in ascending order, as one row of tokens."""

    def __init__(self, prefix: Prefix) -> None:
        self._tokens: list[int] = []
        self._path: list[int] = []  # columns of the newest prefix's tokens
        self._paths: list[list[int]] = []
        self._newest: Prefix = ()
        self._room = len(prefix) + TREE_TOKENS
        self.add(prefix)

    def add(self, prefix: Prefix) -> bool:
        """Take a prefix in, unless the tree is full."""
        shared = _shared_length(self._newest, prefix)
        if len(self._tokens) + len(prefix) - shared > self._room:
            return False
        self._newest = prefix
        fresh = range(len(self._tokens), len(self._tokens) + len(prefix) - shared)
        self._tokens += prefix[shared:]
        self._path = [*self._path[:shared], *fresh]
        self._paths.append(self._path)
        return True

    def logits(self, model: nn.Module) -> Tensor:
        """[N, V] float32 behind each prefix that was taken in."""
        weight = next(model.parameters())
        size = len(self._tokens)
        sees_QQ = np.zeros((size, size), dtype=np.bool_)
        position_Q = np.zeros(size, dtype=np.int64)
        for path in self._paths:
            columns = np.array(path)
            sees_QQ[columns[:, None], columns] |= np.tri(len(path), dtype=np.bool_)
            position_Q[columns] = np.arange(len(path))
        hidden_QQ = torch.from_numpy(~sees_QQ).to(weight.device)
        mask_QQ = torch.zeros(size, size, dtype=weight.dtype, device=weight.device)
        mask_QQ.masked_fill_(hidden_QQ, torch.finfo(weight.dtype).min)
        last_N = torch.tensor([path[-1] for path in self._paths], device=weight.device)
        kept_K, row_N = last_N.unique(return_inverse=True)
        logits_1KV: Tensor = model(
            input_ids=torch.tensor([self._tokens], device=weight.device),
            position_ids=torch.from_numpy(position_Q)[None].to(weight.device),
            attention_mask=mask_QQ[None, None],
            logits_to_keep=kept_K,
            use_cache=False,
        ).logits
        return logits_1KV[0, row_N].float()


def _shared_length(first: Prefix, second: Prefix) -> int:
    """Tokens that both begin with."""
    longest = min(len(first), len(second))
    return next((at for at in range(longest) if first[at] != second[at]), longest)
