"""The output head and its softmax, a chunk of states at a time: forward and backward.

Logits of all states are states x vocabulary numbers, by far the largest tensor of a pass, and of
each state two log-probabilities alone are wanted, that of the next token and that of ⊤. Here at
most CHUNK_ENTRIES logits exist at a time.

With p the policy's softmax over legal tokens and ⊤, and g1, g2 the gradients of the two,

    d loss / d logits = g1 (onehot(next) - p) + g2 (onehot(⊤) - p)

Behind a frozen linear head W that is a sum of rows of W and of p W, which the forward pass takes
along before it knows g1 and g2: [states, width] numbers, and no logit is computed twice. A head
that is trained itself (an adapter on it, say) has its logits recomputed, chunk by chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lm.action_distribution import ActionDistribution
from lm.model import model_config

# Logits that exist at a time: 64 MB in float32.
CHUNK_ENTRIES = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """From the last hidden states of a causal LM to its logits: cap(scale * module(hidden)).

    `cap(x) = softcap * tanh(x / softcap)` where the architecture has one (Gemma 2).
    """

    module: Any  # a linear layer, maybe with an adapter: [.., D] -> [.., V]
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: nn.Module) -> "OutputHead":
        """The head of a causal LM of transformers, with or without adapter."""
        language_model: Any = getattr(model, "module", model)
        config = model_config(model)
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        softcap = getattr(config, "final_logit_softcapping", None)
        return OutputHead(language_model.get_output_embeddings(), scale, softcap)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V], in float32 at least."""
        # Not called as a module: around that, sharded weights would be gathered and given up.
        return self._finished(self.module.forward(hidden_ND))

    def linear_logits(self, hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None) -> Tensor:
        """[N, C], in float32 at least, with these rows of the module's weight and bias."""
        return self._finished(nn.functional.linear(hidden_ND, weight_CD, bias_C))

    def logits_of(self, hidden_ND: Tensor, id_C: Tensor) -> Tensor:
        """[N, C] of these tokens, distinct and ascending, in float32 at least; an adapted head's
        logits of other tokens exist for a chunk of states at a time."""
        if len(id_C) == self.vocab_size:
            return self.logits(hidden_ND)
        if not self.frozen_linear:
            chunks = self._chunks_of(hidden_ND)
            return torch.cat([self.logits(hidden_ND[chunk])[:, id_C] for chunk in chunks])
        bias_V = self.module.bias
        bias_C = None if bias_V is None else bias_V[id_C]
        return self.linear_logits(hidden_ND, self.module.weight[id_C], bias_C)

    def log_probs_of(self, hidden_ND: Tensor, token_NK: Tensor) -> Tensor:
        """[N, K] log p of K tokens in each state, nothing masked, nats, chunk by chunk."""
        parts = []
        for chunk in self._chunks_of(hidden_ND):
            logits_NV = self.logits(hidden_ND[chunk])
            log_total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
            parts.append(logits_NV.gather(1, token_NK[chunk]) - log_total_N1)
        return torch.cat(parts)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d module(hidden), at these logits."""
        capped = 0.0 if self.softcap is None else (logits / self.softcap).square()
        return self.scale * (1 - capped)

    @property
    def vocab_size(self) -> int:
        return int(self.module.weight.shape[0])

    @property
    def frozen_linear(self) -> bool:
        """Whether it is a matrix that nobody trains or wraps."""
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        return type(self.module) is nn.Linear and not trained

    def _chunks_of(self, hidden_ND: Tensor) -> Iterator[slice]:
        """States whose logits of the whole vocabulary may exist at a time."""
        return _chunks(len(hidden_ND), max(1, CHUNK_ENTRIES // self.vocab_size))

    def _finished(self, raw: Tensor) -> Tensor:
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def action_log_probs(
    head: OutputHead,
    hidden_ND: Tensor,
    distribution: ActionDistribution,
    next_N: Tensor,
    may_stop_N: NDArray[np.bool_],
    chunk_entries: int = CHUNK_ENTRIES,
) -> tuple[Tensor, Tensor]:
    """[N] log q of the next token and of ⊤ in each state, nats, float32 at least, differentiable.

    Args:
        hidden_ND: what the head is given.
        next_N: int64, token ids; of an illegal one log q is arbitrary.
        may_stop_N: elsewhere ⊤ has probability zero, log q -inf.
        chunk_entries: logits to hold at a time; those of one state at least.
    """
    column_N, stop = distribution.column(next_N), distribution.stop_column
    if head.frozen_linear:
        weight_CD, bias_C = head.module.weight, head.module.bias
        if not distribution.every_token:
            weight_CD = weight_CD[distribution.id_C]
            bias_C = None if bias_C is None else bias_C[distribution.id_C]
        closed_N = torch.from_numpy(~may_stop_N).to(hidden_ND.device)
        chunk = max(1, chunk_entries // len(weight_CD))
        found: tuple[Tensor, Tensor] = _FrozenHead.apply(
            hidden_ND, weight_CD, bias_C, head, column_N, closed_N, stop, chunk
        )
        return found

    def of_chunk(states: slice) -> tuple[Tensor, Tensor]:
        log_q_NC = distribution.log_q(head.logits(hidden_ND[states]), may_stop_N[states])
        return log_q_NC.gather(1, column_N[states, None]).squeeze(1), log_q_NC[:, stop]

    parts = [
        checkpoint(of_chunk, states, use_reentrant=False)
        for states in _chunks(len(hidden_ND), max(1, chunk_entries // head.vocab_size))
    ]
    log_next, log_stop = zip(*parts, strict=True)
    return torch.cat(log_next), torch.cat(log_stop)


@torch.no_grad()
def target_log_probs(
    head: OutputHead,
    hidden_ND: Tensor,
    source_E: NDArray[np.int64],
    target_E: NDArray[np.int64],
    chunk_entries: int = CHUNK_ENTRIES,
) -> Tensor:
    """[E] log p(token target | state source) of the LM itself, nothing masked, nats, no gradient.

    Args:
        source_E: below N, ascending.
        target_E: token ids.
    """
    parts, device = [], hidden_ND.device
    for chunk in _chunks(len(hidden_ND), max(1, chunk_entries // head.vocab_size)):
        logits_NV = head.logits(hidden_ND[chunk])
        edges = slice(*np.searchsorted(source_E, (chunk.start, chunk.stop)))
        row_K = torch.from_numpy(source_E[edges] - chunk.start).to(device)
        target_K = torch.from_numpy(target_E[edges]).to(device)
        parts.append(logits_NV[row_K, target_K] - logits_NV.logsumexp(dim=-1)[row_K])
    return torch.cat(parts)


@contextmanager
def head_replaced(model: nn.Module, compute: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block a pass of `model` ends in `compute(hidden)` where it would compute logits.

    Inside the call of the head, as a model whose weights are sharded holds those of a layer during
    its call alone. The logits that the pass returns mean nothing. One pass, one thread at a time.
    """
    head = OutputHead.of(model).module

    def forward(hidden: Tensor) -> Tensor:
        del head.forward
        compute(hidden)
        return hidden[..., :1, :1]

    head.forward = forward  # on the instance, in front of the class's own
    try:
        yield
    finally:
        vars(head).pop("forward", None)


class _FrozenHead(torch.autograd.Function):
    """The closed form: the gradient's ingredients come out of the forward pass.

    The rows of the next token and of ⊤ are kept out of the sum p W: 1 - p is what counts of them,
    and would drown in their rounding where p is near 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        head: OutputHead,
        next_N: Tensor,
        closed_N: Tensor,
        stop: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """`next_N` and `stop` are columns, as the rows of `weight_CD`."""
        learns = ctx.needs_input_grad[0]
        log_next, log_stop, slopes, rests = [], [], [], []
        for states in _chunks(len(hidden_ND), chunk):
            next_N1 = next_N[states, None]
            logits_NC = head.linear_logits(hidden_ND[states], weight_CD, bias_C)
            slope = head.slope(logits_NC)
            logits_NC[:, stop].masked_fill_(closed_N[states], -torch.inf)
            log_total_N = logits_NC.logsumexp(dim=-1)
            log_next.append(logits_NC.gather(1, next_N1).squeeze(1) - log_total_N)
            log_stop.append(logits_NC[:, stop] - log_total_N)
            if learns:
                p_NC = logits_NC.sub_(log_total_N[:, None]).exp_().mul_(slope)
                p_NC.scatter_(1, next_N1, 0.0)[:, stop] = 0.0
                rests.append(p_NC.to(weight_CD.dtype) @ weight_CD)
                if isinstance(slope, Tensor):
                    slopes.append(torch.cat([slope.gather(1, next_N1), slope[:, stop, None]], 1))
        log_next_N, log_stop_N = torch.cat(log_next), torch.cat(log_stop)
        if learns:
            slope_N2 = torch.cat(slopes) if slopes else log_next_N.new_full((1, 2), head.scale)
            ctx.save_for_backward(
                weight_CD, torch.cat(rests), log_next_N, log_stop_N, slope_N2, next_N
            )
            ctx.stop_column = stop
        return log_next_N, log_stop_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_CD, rest_ND, log_next_N, log_stop_N, slope_N2, next_N = ctx.saved_tensors
        grad_next_N, grad_stop_N = grads
        # A state without a next token may name ⊤ in its place, whose p must not count twice.
        log_next_N = log_next_N.masked_fill(next_N == ctx.stop_column, -torch.inf)
        of_next_N = -grad_next_N * log_next_N.expm1() - grad_stop_N * log_next_N.exp()
        of_stop_N = -grad_stop_N * log_stop_N.expm1() - grad_next_N * log_stop_N.exp()
        of_stop_N = of_stop_N.masked_fill(log_stop_N == -torch.inf, 0.0)
        grad_ND = (slope_N2[:, 0] * of_next_N)[:, None] * weight_CD[next_N]
        grad_ND += (slope_N2[:, 1] * of_stop_N)[:, None] * weight_CD[ctx.stop_column]
        grad_ND -= (grad_next_N + grad_stop_N)[:, None] * rest_ND
        return grad_ND.to(rest_ND.dtype), *[None] * 7


def _chunks(size: int, chunk: int) -> Iterator[slice]:
    """Slices that cover `size`; one, and empty, for none."""
    for start in range(0, max(size, 1), chunk):
        yield slice(start, min(start + chunk, size))
