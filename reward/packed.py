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

from lm.attention import attention_mask
from lm.cache import whole_cache
from lm.model import CausalLM, context_limit, vocab_size
from lm.packing import pad
from reward.packing import MicroBatch, gather_scores, lay_out
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
    layout = lay_out(items, token_budget)
    return gather_scores(items, layout, [edge_log_probs(model, batch) for batch in layout.batches])


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
    """What the model can score."""
    return ScoreLimits(vocab_size=vocab_size(model), max_length=context_limit(model))


@torch.no_grad()
def edge_log_probs(model: CausalLM, batch: MicroBatch) -> NDArray[np.float32]:
    """Log-probability of every edge of the micro-batch's rows, row after row, in nats.

    Always two forward passes, so ranks that hold shards of one model stay in step.
    """
    device = model.device
    # The last context token is the first column of every row; what precedes it is shared. A
    # one-token context leaves nothing, so its own token stands there, masked.
    heads = [context[:-1] if len(context) > 1 else context for context in batch.contexts]
    head_ids_CP = torch.from_numpy(pad([head.tolist() for head in heads])).to(device)
    cache = whole_cache()
    model(input_ids=head_ids_CP, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.tensor(batch.context_of_row, device=device))

    trees = [row.tree for row in batch.rows]
    position_BQ = torch.from_numpy(pad([tree.positions for tree in trees])).to(device)
    head_1P = torch.arange(head_ids_CP.shape[1], device=device)[None]
    position_BK = torch.cat([head_1P.expand(len(trees), -1), position_BQ], dim=1)
    sees_BQK = torch.from_numpy(_visible(batch, head_ids_CP.shape[1])).to(device)
    logits_BQV = model(
        input_ids=torch.from_numpy(pad([tree.tokens for tree in trees])).to(device),
        position_ids=position_BQ,
        attention_mask=attention_mask(model, sees_BQK, position_BQ, position_BK),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return _predicted(logits_BQV, batch)


def _visible(batch: MicroBatch, head_width: int) -> NDArray[np.bool_]:
    """[B, Q, head + Q] what each column sees: its context's head, then columns of its own row."""
    row_width = max(row.tree.width for row in batch.rows)
    sees = np.zeros((len(batch.rows), row_width, head_width + row_width), dtype=bool)
    for number, row in enumerate(batch.rows):
        width = row.tree.width
        sees[number, :, : len(row.context) - 1] = True
        sees[number, :width, head_width : head_width + width] = row.tree.sees()
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
