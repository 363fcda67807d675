"""Log-rewards of every prefix of a rationale under a causal LM, in one packed pass.

Works for any causal LM of transformers that takes a 4-D additive mask, `position_ids` and a cache
(GPT-2, GPT-J, GPT-NeoX, Llama, Qwen2 are tested), with sdpa or eager attention. A micro-batch is
two forward passes: the distinct contexts, then the packed rows on the contexts' cached keys and
values. Precision: log-softmax in float32 whatever the weights are in, sums in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.model import CausalLM, context_limit, vocab_size
from reward.packing import MicroBatch, plan, read
from reward.request import ScoreItem, ScoreLimits, Tokens, check_item

# Rows of logits turned to float32 at a time: bounds memory where the vocabulary is large.
LOGITS_CHUNK = 4096


def suffix_log_rewards(
    model: CausalLM, items: Sequence[ScoreItem], token_budget: int
) -> list[NDArray[np.float32]]:
    """log p(z_1:t Y | context) in nats, [S] for each item, one value per stop state.

    Args:
        model: causal LM in evaluation mode; one thread at a time.
        items: any mixture of contexts, lengths and answers.
        token_budget: tokens of one padded micro-batch, at most (one row may be larger).

    Raises:
        BadItem: an item that this model cannot score.
    """
    limits = score_limits(model)
    for item in items:
        check_item(item, limits)
    layout = plan(items, token_budget)
    return read(items, layout, [edge_log_probs(model, batch) for batch in layout.batches])


def stop_log_rewards(
    model: CausalLM, items: Sequence[ScoreItem], stop_token: int, token_budget: int
) -> list[NDArray[np.float32]]:
    """log p(z_1:t ⊤ | context) in nats at every stop state; the items' own answers do not count."""
    return suffix_log_rewards(model, [stopping(item, stop_token) for item in items], token_budget)


def stopping(item: ScoreItem, stop_token: int) -> ScoreItem:
    """The item with the stop token as its answer: turns a suffix reward into a stop reward."""
    return ScoreItem(
        context=item.context,
        completion=item.completion,
        stops=item.stops,
        answer=np.array([stop_token], dtype=np.int32),
    )


def score_limits(model: CausalLM) -> ScoreLimits:
    """What the model can score.

    The explicit mask knows no sliding window, so a model with one is held to texts inside it.
    """
    return ScoreLimits(vocab_size=vocab_size(model), max_length=context_limit(model))


@torch.no_grad()
def edge_log_probs(model: CausalLM, batch: MicroBatch) -> NDArray[np.float32]:
    """Log-probability of every edge of the micro-batch's rows, row after row, in nats.

    Always two forward passes, so ranks that hold shards of one model stay in step.
    """
    device, dtype = model.device, model.dtype
    # The last context token is the first column of every row; what precedes it is shared. A
    # one-token context leaves nothing, so its own token stands there, masked.
    heads = [context[:-1] if len(context) > 1 else context for context in batch.contexts]
    head_ids_CP = torch.from_numpy(_padded(heads)).to(device)
    cache = model(input_ids=head_ids_CP, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_select_indices(torch.tensor(batch.context_of_row, device=device))

    ids_BQ = _padded([np.concatenate(row.tokens) for row in batch.rows])
    positions_BQ = _padded([np.concatenate(row.positions) for row in batch.rows])
    sees_BQK = _visible(batch, head_ids_CP.shape[1], ids_BQ.shape[1])
    blocked = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=device)
    seen = torch.zeros((), dtype=dtype, device=device)
    logits_BQV = model(
        input_ids=torch.from_numpy(ids_BQ).to(device),
        position_ids=torch.from_numpy(positions_BQ).to(device),
        attention_mask=torch.where(torch.from_numpy(sees_BQK).to(device), seen, blocked)[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return _predicted(logits_BQV, batch)


def _padded(rows: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    """Rows side by side, zeros on the right."""
    table = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def _visible(batch: MicroBatch, head_width: int, row_width: int) -> NDArray[np.bool_]:
    """[B, Q, head + Q] what each column sees: its context's head, then columns of its own row."""
    sees = np.zeros((len(batch.rows), row_width, head_width + row_width), dtype=bool)
    for number, row in enumerate(batch.rows):
        sees[number, :, : len(row.context) - 1] = True
        sees[number, : row.width, head_width : head_width + row.width] = row.mask()
    return sees


def _predicted(logits_BQV: Tensor, batch: MicroBatch) -> NDArray[np.float32]:
    """log p(target | source) of all edges, [E] float32."""
    width, vocab = logits_BQV.shape[1:]
    sources = np.concatenate(
        [number * width + source for number, row in enumerate(batch.rows) for source in row.sources]
    )
    targets: Tokens = np.concatenate([target for row in batch.rows for target in row.targets])
    source_E = torch.from_numpy(sources).to(logits_BQV.device)
    target_E = torch.from_numpy(targets.astype(np.int64)).to(logits_BQV.device)
    flat_NV = logits_BQV.reshape(-1, vocab)
    log_total_N = torch.cat(
        [chunk.float().logsumexp(dim=-1) for chunk in flat_NV.split(LOGITS_CHUNK)]
    )
    log_prob_E = flat_NV[source_E, target_E].float() - log_total_N[source_E]
    return log_prob_E.cpu().numpy()
