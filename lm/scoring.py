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
    """log q of every token and of stopping at every state, in one right-padded pass.

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
    require_context(model, batch.ids_BW.shape[1])
    device = next(model.parameters()).device
    column_BS, chosen_BT, may_stop_BS, open_BS = (
        torch.from_numpy(array).to(device)
        for array in (batch.column_BS, batch.chosen_BT, batch.may_stop_BS, batch.open_BS)
    )
    ids_BW = torch.from_numpy(batch.ids_BW).to(device)
    prompt_state_BH = None
    if with_prompt_state:
        with _head_inputs(model) as inputs:
            logits_BJV = _logits(model, ids_BW, batch.first)
        rows_B = torch.arange(len(column_BS), device=device)
        prompt_state_BH = inputs[0].detach()[rows_B, column_BS[:, 0]]
    else:
        logits_BJV = _logits(model, ids_BW, batch.first)
    next_BJ = nn.functional.pad(ids_BW[:, batch.first + 1 :], (0, 1))
    # column_BS[:, 0] is where state 0 sits, so the difference is t.
    state_BJ = torch.arange(next_BJ.shape[1], device=device) - column_BS[:, :1]
    may_stop_BJ = may_stop_BS.gather(1, state_BJ.clamp(0, may_stop_BS.shape[1] - 1))
    log_next_BJ, log_stop_BJ = _action_log_probs(actions, logits_BJV, next_BJ, may_stop_BJ)
    zero = log_next_BJ.new_zeros(())
    return LogProbs(
        log_pf_BT=torch.where(chosen_BT, log_next_BJ.gather(1, column_BS[:, :-1]), zero),
        log_stop_BS=torch.where(open_BS, log_stop_BJ.gather(1, column_BS), zero),
        prompt_state_BH=prompt_state_BH,
    )


def prompt_state_size(model: nn.Module) -> int:
    """Width H of `prompt_state_BH`."""
    return int(_output_head(model).weight.shape[-1])


def _logits(model: nn.Module, ids_BW: Tensor, first: int) -> Tensor:
    """[B, J, V] from column `first` on. Causal attention needs no mask for padding at the right."""
    logits: Tensor = model(
        input_ids=ids_BW,
        attention_mask=torch.ones_like(ids_BW),
        logits_to_keep=torch.arange(first, ids_BW.shape[1], device=ids_BW.device),
        use_cache=False,
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
    actions: ActionSpace, logits_BJV: Tensor, next_BJ: Tensor, may_stop_BJ: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, J] log q of the next token and of ⊤; entries of illegal tokens are arbitrary."""
    vocab_size = logits_BJV.shape[-1]
    ids = actions.columns(vocab_size)
    stop_column = int(np.searchsorted(ids, actions.stop_token))
    if actions.legal_tokens is None:
        logits_BJC, next_column_BJ = logits_BJV.float(), next_BJ
    else:
        column_of_id = np.zeros(vocab_size, dtype=np.int64)
        column_of_id[ids] = np.arange(len(ids))
        next_column_BJ = torch.from_numpy(column_of_id).to(next_BJ.device)[next_BJ]
        logits_BJC = logits_BJV[..., torch.from_numpy(ids).to(next_BJ.device)].float()
    is_stop_C = torch.arange(len(ids), device=next_BJ.device) == stop_column
    logits_BJC = logits_BJC.masked_fill(~may_stop_BJ[..., None] & is_stop_C, -torch.inf)
    log_q_BJC = torch.log_softmax(logits_BJC, dim=-1)
    return (
        log_q_BJC.gather(-1, next_column_BJ[..., None]).squeeze(-1),
        log_q_BJC[..., stop_column],
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Right-padded arrays. W columns of text, of which J = W - first are scored."""

    ids_BW: NDArray[np.int64]  # prompt, completion, zeros
    first: int  # column of the earliest state 0: the shortest prompt's last token
    column_BS: NDArray[np.int64]  # scored column that holds state t's logits
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
        width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        ids_BW = np.zeros((size, width), dtype=np.int64)
        chosen_BT = np.zeros((size, tokens), dtype=np.bool_)
        may_stop_BS = np.zeros((size, tokens + 1), dtype=np.bool_)
        start_B = np.array([len(prompt) - 1 for prompt in prompts])
        for b, (prompt, completion, marks) in enumerate(
            zip(prompts, completions, from_tool, strict=True)
        ):
            actions.check(completion, marks)
            ids_BW[b, : len(prompt)] = prompt
            ids_BW[b, len(prompt) : len(prompt) + len(completion)] = completion
            chosen_BT[b, : len(completion)] = ~np.asarray(marks, dtype=np.bool_)
            may_stop_BS[b, : len(completion) + 1] = actions.stop_states(marks)
        open_BS = may_stop_BS.copy()
        open_BS[:, actions.max_len :] = False
        first = int(start_B.min())
        column_BS = start_B[:, None] - first + np.arange(tokens + 1)
        column_BS = np.minimum(column_BS, width - 1 - first)  # padding: any column will do
        return _Batch(ids_BW, first, column_BS, chosen_BT, may_stop_BS, open_BS)
