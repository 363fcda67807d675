"""Log-probabilities of given completions under the policy: one teacher-forced pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.actions import ActionSpace
from lm.model import require_context
from lm.packing import SHARED_WIDTH, Packing, pack


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogProbs:
    """What the policy says about a batch of completions, nats, float32, differentiable."""

    log_pf_BT: Tensor  # log q(z_{t+1} | z_1:t); 0 at tool tokens and padding
    log_stop_BS: Tensor  # log q(⊤ | z_1:t), S = T + 1; 0 where forced, 0 (no meaning) elsewhere
    prompt_state_BH: Tensor | None  # what the output head saw behind the prompt, detached; if asked


def completion_log_probs(
    model: nn.Module,
    actions: ActionSpace,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    from_tool: Sequence[Sequence[bool]],
    *,
    with_prompt_state: bool = False,
) -> LogProbs:
    """log q of every token and of stopping at every state, in one teacher-forced pass.

    Completions of one prompt stand behind a single copy of it (lm/packing.py), so they should come
    together: a group costs its prompt once.

    `model` is any causal LM of transformers, with or without adapter, or an engine around one.

    Args:
        prompts: B token-id sequences, none empty.
        completions: B token-id sequences, stop token excluded; may be empty.
        from_tool: B mark sequences, True where a tool inserted the token.
        with_prompt_state: give `prompt_state_BH` too, out of the same pass.

    Raises:
        IllegalCompletion: the policy gives a completion probability zero.
        ValueError: an empty prompt, an action outside the vocabulary, or too long a row.
    """
    batch = _Batch.collate(actions, prompts, completions, from_tool)
    require_context(model, batch.longest)
    weight = next(model.parameters())
    packing = pack(prompts, completions, shared_width=SHARED_WIDTH)
    row_B, column_BS, next_BS, chosen_BT, may_stop_BS, open_BS = (
        torch.from_numpy(array).to(weight.device)
        for array in (
            packing.row_B,
            packing.column_BS - packing.first,
            batch.next_BS,
            batch.chosen_BT,
            batch.may_stop_BS,
            batch.open_BS,
        )
    )
    prompt_state_BH = None
    if with_prompt_state:
        with _head_inputs(model) as inputs:
            logits_RJV = _logits(model, packing, weight)
        prompt_state_BH = inputs[0].detach()[row_B, column_BS[:, 0]]
    else:
        logits_RJV = _logits(model, packing, weight)
    logits_BSV = logits_RJV[row_B[:, None], column_BS]
    log_next_BS, log_stop_BS = _action_log_probs(actions, logits_BSV, next_BS, may_stop_BS)
    zero = log_next_BS.new_zeros(())
    return LogProbs(
        log_pf_BT=torch.where(chosen_BT, log_next_BS[:, :-1], zero),
        log_stop_BS=torch.where(open_BS, log_stop_BS, zero),
        prompt_state_BH=prompt_state_BH,
    )


def prompt_state_size(model: nn.Module) -> int:
    """Width H of `prompt_state_BH`."""
    return int(_output_head(model).weight.shape[-1])


def _logits(model: nn.Module, packing: Packing, weight: Tensor) -> Tensor:
    """[R, J, V] from column `packing.first` on.

    Where each row is one text, causal attention needs no mask, not even for padding at the right.
    The mask of shared prompts knows no sliding window: `require_context` holds texts inside one.
    """
    ids_RW = torch.from_numpy(packing.ids_RW).to(weight.device)
    if packing.shared:
        seen = torch.zeros((), dtype=weight.dtype, device=weight.device)
        blocked = torch.full_like(seen, torch.finfo(weight.dtype).min)
        sees_RWW = torch.from_numpy(packing.sees_RWW()).to(weight.device)
        how = {
            "attention_mask": torch.where(sees_RWW, seen, blocked)[:, None],
            "position_ids": torch.from_numpy(packing.position_RW).to(weight.device),
        }
    else:
        how = {"attention_mask": torch.ones_like(ids_RW)}
    logits: Tensor = model(
        input_ids=ids_RW,
        logits_to_keep=torch.arange(packing.first, ids_RW.shape[1], device=weight.device),
        use_cache=False,
        **how,
    ).logits
    return logits


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the output head is given inside the block, one tensor for each forward pass."""
    inputs: list[Tensor] = []
    hook = _output_head(model).register_forward_pre_hook(lambda head, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def _output_head(model: nn.Module) -> Any:
    language_model: Any = getattr(model, "module", model)
    return language_model.get_output_embeddings()


def _action_log_probs(
    actions: ActionSpace, logits_BSV: Tensor, next_BS: Tensor, may_stop_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, S] log q of the next token and of ⊤; entries of illegal tokens are arbitrary."""
    vocab_size = logits_BSV.shape[-1]
    ids = actions.columns(vocab_size)
    stop_column = int(np.searchsorted(ids, actions.stop_token))
    if actions.legal_tokens is None:
        logits_BSC, next_column_BS = logits_BSV.float(), next_BS
    else:
        column_of_id = np.zeros(vocab_size, dtype=np.int64)
        column_of_id[ids] = np.arange(len(ids))
        next_column_BS = torch.from_numpy(column_of_id).to(next_BS.device)[next_BS]
        logits_BSC = logits_BSV[..., torch.from_numpy(ids).to(next_BS.device)].float()
    is_stop_C = torch.arange(len(ids), device=next_BS.device) == stop_column
    logits_BSC = logits_BSC.masked_fill(~may_stop_BS[..., None] & is_stop_C, -torch.inf)
    log_q_BSC = torch.log_softmax(logits_BSC, dim=-1)
    return (
        log_q_BSC.gather(-1, next_column_BS[..., None]).squeeze(-1),
        log_q_BSC[..., stop_column],
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """What is asked of each completion's states; right-padded."""

    longest: int  # tokens of the longest text
    next_BS: NDArray[np.int64]  # the token behind state t; zeros at the end
    chosen_BT: NDArray[np.bool_]  # the policy chose this token
    may_stop_BS: NDArray[np.bool_]  # a stop state
    open_BS: NDArray[np.bool_]  # ... where ⊤ is not forced

    @staticmethod
    def collate(
        actions: ActionSpace,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        from_tool: Sequence[Sequence[bool]],
    ) -> "_Batch":
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("empty prompt: the first token's probability needs a token before it")
        size, tokens = len(prompts), max(len(completion) for completion in completions)
        longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        next_BS = np.zeros((size, tokens + 1), dtype=np.int64)
        chosen_BT = np.zeros((size, tokens), dtype=np.bool_)
        may_stop_BS = np.zeros((size, tokens + 1), dtype=np.bool_)
        for b, (completion, marks) in enumerate(zip(completions, from_tool, strict=True)):
            actions.check(completion, marks)
            next_BS[b, : len(completion)] = completion
            chosen_BT[b, : len(completion)] = ~np.asarray(marks, dtype=np.bool_)
            may_stop_BS[b, : len(completion) + 1] = actions.stop_states(marks)
        open_BS = may_stop_BS.copy()
        open_BS[:, actions.max_len :] = False
        return _Batch(longest, next_BS, chosen_BT, may_stop_BS, open_BS)
