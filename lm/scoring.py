"""Log-probabilities of given completions under the policy: one teacher-forced pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.action_distribution import ActionDistribution
from lm.actions import ActionSpace
from lm.attention import attention_mask
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
    device = next(model.parameters()).device
    packing = pack(prompts, completions, shared_width=SHARED_WIDTH)
    row_B, column_BS, next_BS, chosen_BT, open_BS = (
        torch.from_numpy(array).to(device)
        for array in (
            packing.row_B,
            packing.column_BS - packing.first,
            batch.next_BS,
            batch.chosen_BT,
            batch.open_BS,
        )
    )
    prompt_state_BH = None
    if with_prompt_state:
        with _head_inputs(model) as inputs:
            logits_RJV = _logits(model, packing, device)
        prompt_state_BH = inputs[0].detach()[row_B, column_BS[:, 0]]
    else:
        logits_RJV = _logits(model, packing, device)
    distribution = ActionDistribution(actions, logits_RJV.shape[-1], device)
    log_q_BSC = distribution.log_q(logits_RJV[row_B[:, None], column_BS], batch.may_stop_BS)
    log_next_BS = log_q_BSC.gather(-1, distribution.column(next_BS)[..., None]).squeeze(-1)
    log_stop_BS = log_q_BSC[..., distribution.stop_column]
    zero = log_next_BS.new_zeros(())
    return LogProbs(
        log_pf_BT=torch.where(chosen_BT, log_next_BS[:, :-1], zero),
        log_stop_BS=torch.where(open_BS, log_stop_BS, zero),
        prompt_state_BH=prompt_state_BH,
    )


def prompt_state_size(model: nn.Module) -> int:
    """Width H of `prompt_state_BH`."""
    return int(_output_head(model).weight.shape[-1])


def _logits(model: nn.Module, packing: Packing, device: torch.device) -> Tensor:
    """[R, J, V] from column `packing.first` on.

    Where each row is one text, causal attention needs no mask, not even for padding at the right.
    """
    ids_RW = torch.from_numpy(packing.ids_RW).to(device)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids_RW)}
    if packing.shared:
        position_RW = torch.from_numpy(packing.position_RW).to(device)
        sees_RWW = torch.from_numpy(packing.sees_RWW()).to(device)
        how["attention_mask"] = attention_mask(model, sees_RWW, position_RW, position_RW)
        how["position_ids"] = position_RW
    logits: Tensor = model(
        input_ids=ids_RW,
        logits_to_keep=torch.arange(packing.first, ids_RW.shape[1], device=device),
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


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The states of completions, right-padded."""

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
        open_BS = may_stop_BS & ~actions.must_stop(np.arange(tokens + 1))
        return _Batch(longest, next_BS, chosen_BT, may_stop_BS, open_BS)
