"""Log-probabilities of given completions under the policy: one teacher-forced pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.action_distribution import ActionDistribution
from lm.actions import ActionSpace
from lm.attention import attention_mask
from lm.chunked_head import OutputHead, action_log_probs, head_replaced
from lm.model import require_context, text_prefix_of
from lm.packing import SHARED_WIDTH, Packing, pack


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogProbs:
    """What the policy says about a batch of completions, nats, float32, differentiable."""

    log_pf_BT: Tensor  # log q(z_{t+1} | z_1:t); 0 at tool tokens and padding
    log_stop_BS: Tensor  # log q(⊤ | z_1:t), S = T + 1; 0 where forced, 0 (no meaning) elsewhere
    prompt_state_BH: Tensor  # what the output head is given after the prompt, detached


def completion_log_probs(
    model: nn.Module,
    actions: ActionSpace,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    from_tool: Sequence[Sequence[bool]],
) -> LogProbs:
    """log q of every token and of stopping at every state, in one teacher-forced pass.

    Completions of one prompt share it (lm/packing.py), so they should come together. `model` is any
    causal LM of transformers, with or without adapter, or an engine around one.

    Args:
        prompts: B token-id sequences, none empty.
        completions: B token-id sequences, stop token excluded; may be empty.
        from_tool: B mark sequences, True where a tool inserted the token.

    Raises:
        IllegalCompletion: the policy gives a completion probability zero.
        ValueError: an empty prompt, an action outside the vocabulary, or too long a row.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("empty prompt: the first token's probability needs a token before it")
    next_BS, chosen_BS, may_stop_BS = _states(actions, completions, from_tool)
    open_BS = may_stop_BS & ~actions.must_stop(np.arange(may_stop_BS.shape[1]))
    require_context(model, max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)))
    device = next(model.parameters()).device
    prompts = [(*text_prefix_of(model), *prompt) for prompt in prompts]
    packing = pack(prompts, completions, shared_width=SHARED_WIDTH)
    head = OutputHead.of(model)
    # What the policy decided: a token was chosen, or ⊤ could have been.
    b_N, s_N = np.nonzero(chosen_BS | open_BS)
    row_N, column_N, next_N = (
        torch.from_numpy(array).to(device)
        for array in (packing.row_B[b_N], packing.column_BS[b_N, s_N], next_BS[b_N, s_N])
    )
    found: list[Tensor] = []

    def of_hidden(hidden_RWD: Tensor) -> None:
        distribution = ActionDistribution(actions, head.vocab_size, device)
        hidden_ND = hidden_RWD[row_N, column_N]
        may_stop_N = may_stop_BS[b_N, s_N]
        found.extend(action_log_probs(head, hidden_ND, distribution, next_N, may_stop_N))
        found.append(hidden_RWD.detach()[packing.row_B, packing.column_BS[:, 0]])

    with head_replaced(model, of_hidden):
        _run(model, packing, device)
    log_next_N, log_stop_N, prompt_state_BH = found

    return LogProbs(
        log_pf_BT=_spread(log_next_N, b_N, s_N, chosen_BS)[:, :-1],
        log_stop_BS=_spread(log_stop_N, b_N, s_N, open_BS),
        prompt_state_BH=prompt_state_BH,
    )


def prompt_state_size(model: nn.Module) -> int:
    """Width H of `prompt_state_BH`."""
    return int(OutputHead.of(model).module.weight.shape[-1])


def _spread(
    values_N: Tensor, b_N: NDArray[np.int64], s_N: NDArray[np.int64], wanted_BS: NDArray[np.bool_]
) -> Tensor:
    """Values of states (b, s) at their places, 0 where `wanted_BS` does not hold."""
    index_K = np.flatnonzero(wanted_BS[b_N, s_N])
    n_K, b_K, s_K = (torch.from_numpy(i) for i in (index_K, b_N[index_K], s_N[index_K]))
    place = (b_K.to(values_N.device), s_K.to(values_N.device))
    return values_N.new_zeros(wanted_BS.shape).index_put(place, values_N[n_K.to(values_N.device)])


def _run(model: nn.Module, packing: Packing, device: torch.device) -> None:
    """Pass the rows through the model.

    Where each row is one text, causal attention needs no mask, not even for padding at the right.
    """
    ids_RW = torch.from_numpy(packing.ids_RW).to(device)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids_RW)}
    if packing.shared:
        position_RW = torch.from_numpy(packing.position_RW).to(device)
        sees_RWW = torch.from_numpy(packing.sees_RWW()).to(device)
        how["attention_mask"] = attention_mask(model, sees_RWW, position_RW, position_RW)
        how["position_ids"] = position_RW
    model(input_ids=ids_RW, use_cache=False, **how)


def _states(
    actions: ActionSpace,
    completions: Sequence[Sequence[int]],
    from_tool: Sequence[Sequence[bool]],
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """[B, S] of each state, right-padded: the token behind it, if the policy chose that, and if it
    is a stop state."""
    shape = len(completions), 1 + max(len(completion) for completion in completions)
    next_BS = np.zeros(shape, dtype=np.int64)
    chosen_BS, may_stop_BS = np.zeros((2, *shape), dtype=np.bool_)
    for b, (completion, marks) in enumerate(zip(completions, from_tool, strict=True)):
        actions.check(completion, marks)
        length = len(completion)
        next_BS[b, :length] = completion
        chosen_BS[b, :length] = ~np.asarray(marks, dtype=np.bool_)
        may_stop_BS[b, : length + 1] = actions.stop_states(completion, marks)
    return next_BS, chosen_BS, may_stop_BS
