"""Log-rewards of every prefix of a rationale under a causal LM, in one packed pass.

Works for any causal LM of transformers that takes a 4-D additive mask, `position_ids` and a cache
(GPT-2, GPT-J, GPT-NeoX, Llama, Qwen2 are tested), with sdpa or eager attention. A micro-batch is
two forward passes: the distinct contexts, then the packed rows on the contexts' cached keys and
values; wide rows have their copies of Y in further ones, on those of their stems. Precision:
log-softmax in float32 whatever the weights are in, a chunk of states at a time; sums in float64.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.attention import attention_mask
from lm.cache import whole_cache
from lm.chunked_head import OutputHead, head_replaced, target_log_probs
from lm.model import CausalLM, context_limit, text_prefix_of, vocab_size
from lm.packing import pad
from reward.packing import MicroBatch, gather_scores, lay_out
from reward.request import ScoreItem, ScoreLimits, check_item
from reward.row import Columns


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

    Always `batch.num_passes` forward passes, so ranks that hold shards of one model stay in step.
    """
    device, num_rows = model.device, len(batch.rows)
    # The last context token is the first column of every row; what precedes it is shared. Where
    # nothing does, the token itself stands there, masked.
    prefix = text_prefix_of(model)
    heads = [[*prefix, *context[:-1].tolist()] or context.tolist() for context in batch.contexts]
    head_ids_CP = torch.from_numpy(pad(heads)).to(device)
    cache = whole_cache()
    model(input_ids=head_ids_CP, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.tensor(batch.context_of_row, device=device))

    head_width = head_ids_CP.shape[1]
    past_BK = np.tile(np.arange(head_width), (num_rows, 1))  # positions of what is cached
    log_probs = [np.zeros(row.num_edges, dtype=np.float32) for row in batch.rows]
    for number, columns in enumerate(batch.passes()):
        # A row whose copies are all done has a column that nobody asks anything.
        position_BQ = pad([part.positions or [0] for part in columns]) + len(prefix)
        position_BK = np.concatenate([past_BK, position_BQ], axis=1)
        sees_BQK = _visible(
            batch, columns, position_BQ.shape[1], len(prefix), head_width, past_BK.shape[1]
        )
        found = _pass(model, cache, batch, columns, position_BQ, position_BK, sees_BQK)
        for values, part, log_prob_E in zip(log_probs, columns, found, strict=True):
            values[part.edges] = log_prob_E
        if number == 0:
            past_BK = position_BK
        else:
            cache.crop(-position_BQ.shape[1])
    return np.concatenate(log_probs)


def _pass(
    model: CausalLM,
    cache: Any,
    batch: MicroBatch,
    columns: Sequence[Columns],
    position_BQ: NDArray[np.int64],
    position_BK: NDArray[np.int64],
    sees_BQK: NDArray[np.bool_],
) -> list[NDArray[np.float32]]:
    """Pass columns through the model, on what is cached; log p of their edges, row by row."""
    ids, at, at_past, sees = (
        torch.from_numpy(table).to(model.device)
        for table in (pad([c.tokens or [0] for c in columns]), position_BQ, position_BK, sees_BQK)
    )
    found: list[NDArray[np.float32]] = []

    def of_hidden(hidden_BQD: Tensor) -> None:
        found.extend(_predicted(model, hidden_BQD, batch, columns))

    with head_replaced(model, of_hidden):
        model(
            input_ids=ids,
            position_ids=at,
            attention_mask=attention_mask(model, sees, at, at_past),
            past_key_values=cache,
            use_cache=True,
        )
    return found


def _visible(
    batch: MicroBatch,
    columns: Sequence[Columns],
    width: int,
    prefix: int,
    head_width: int,
    past_width: int,
) -> NDArray[np.bool_]:
    """[B, Q, past + Q] what each column sees: its context's head, the stem, and of the pass.

    The stem is in the pass itself, or after the head in what is cached.
    """
    sees = np.zeros((len(columns), width, past_width + width), dtype=bool)
    for number, (row, part) in enumerate(zip(batch.rows, columns, strict=True)):
        size, stem = len(part.tokens), row.stem.width
        sees[number, :, : prefix + len(row.context) - 1] = True
        sees[number, :size, head_width : head_width + stem] = part.sees_QK[:, :stem]
        own = part.sees_QK[:, stem:]
        start = past_width if past_width > head_width else head_width + stem
        sees[number, :size, start : start + own.shape[1]] = own
    return sees


def _predicted(
    model: CausalLM, hidden_BQD: Tensor, batch: MicroBatch, columns: Sequence[Columns]
) -> list[NDArray[np.float32]]:
    """log p(target | source) of the edges of these columns, row by row."""
    device, width = hidden_BQD.device, hidden_BQD.shape[1]
    source_E = np.concatenate([n * width + part.sources for n, part in enumerate(columns)])
    target_E = np.concatenate(
        [
            np.concatenate(row.targets)[part.edges]
            for row, part in zip(batch.rows, columns, strict=True)
        ]
    )
    order_E = source_E.argsort(kind="stable")
    state_N, place_E = np.unique(source_E[order_E], return_inverse=True)
    sorted_E = target_log_probs(
        OutputHead.of(model),
        hidden_BQD.flatten(0, 1)[torch.from_numpy(state_N).to(device)],
        torch.from_numpy(place_E).to(device),
        torch.from_numpy(target_E[order_E].astype(np.int64)).to(device),
    )
    log_prob_E = np.empty(len(source_E), dtype=np.float32)
    log_prob_E[order_E] = sorted_E.float().cpu().numpy()
    return np.split(log_prob_E, np.cumsum([len(part.edges) for part in columns])[:-1])
