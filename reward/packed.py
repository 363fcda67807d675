"""Log-rewards of every prefix of a rationale under a causal LM, in one packed pass.

For any causal LM that takes a 4-D additive mask, `position_ids` and a cache (`reward.probe`). A
micro-batch is two forward passes: the distinct contexts, then the packed rows on their keys and
values; wide rows have their copies of Y in further ones, on those of their stems. Log-softmax in
float32 whatever the weights are in, a chunk of states at a time; sums in float64.
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
from lm.packing import Indices, pad
from lm.prefill import WORTH_A_PASS, PromptStore
from reward.packing import MicroBatch, gather_scores, lay_out
from reward.request import ScoreItem, ScoreLimits, Tokens, check_item
from reward.row import Columns


def suffix_log_rewards(
    model: CausalLM, items: Sequence[ScoreItem], token_budget: int
) -> list[NDArray[np.float32]]:
    """log p(z_1:t Y | context) in nats, [S] for each item, else BadItem; one thread at a time.

    A padded micro-batch holds at most `token_budget` tokens, or one row.
    """
    limits = score_limits(model)
    for item in items:
        check_item(item, limits)
    layout = lay_out(items, token_budget)
    heads = PromptStore(model, max_prompts=1)
    edges = [edge_log_probs(model, batch, heads) for batch in layout.batches]
    return gather_scores(items, layout, edges)


def score_limits(model: CausalLM) -> ScoreLimits:
    """What the model can score."""
    return ScoreLimits(vocab_size=vocab_size(model), max_length=context_limit(model))


@torch.no_grad()
def edge_log_probs(
    model: CausalLM, batch: MicroBatch, heads: PromptStore | None = None
) -> NDArray[np.float32]:
    """Log-probability of every edge of the micro-batch's rows, row after row, in nats.

    Always `batch.num_passes` forward passes, so ranks that hold shards of one model stay in step;
    and one more for a head of the contexts that is not among `heads` yet, which keeps it.
    """
    device, num_rows = model.device, len(batch.rows)
    # The last context token is the first column of every row; what precedes it is shared. Where
    # nothing does, the token itself stands there, masked.
    prefix = text_prefix_of(model)
    contexts = batch.contexts
    cache, kept = whole_cache(), 0
    head = (*prefix, *batch.head)
    if heads is not None and len(head) >= WORTH_A_PASS:
        [(prefill, number)] = heads.take([head])
        cache, kept = prefill.cache(number, copies=len(contexts)), len(head)
    tails = [
        [*prefix, *text[:-1].tolist()][kept:] or text[-1:].tolist() for text in contexts.values()
    ]
    tail_ids_CP = torch.from_numpy(pad(tails)).to(device)
    model(input_ids=tail_ids_CP, past_key_values=cache, use_cache=True, logits_to_keep=1)
    slots = {key: slot for slot, key in enumerate(contexts)}
    context_of_row = [slots[row.context.tobytes()] for row in batch.rows]
    cache.batch_select_indices(torch.tensor(context_of_row, device=device))

    head_width = kept + tail_ids_CP.shape[1]
    past_BK = np.tile(np.arange(head_width), (num_rows, 1))  # positions of what is cached
    first_edges = np.cumsum([0, *(row.num_edges for row in batch.rows[:-1])])
    targets = np.concatenate([tokens for row in batch.rows for tokens in row.targets])
    log_probs = np.zeros(len(targets), dtype=np.float32)
    for number, columns in enumerate(batch.passes()):
        # A row whose copies are all done has a column that nobody asks anything.
        ids_BQ = pad([part.tokens or [0] for part in columns])
        position_BQ = pad([part.positions or [0] for part in columns]) + len(prefix)
        position_BK = np.concatenate([past_BK, position_BQ], axis=1)
        width = ids_BQ.shape[1]
        sees_BQK = _visible(batch, columns, width, len(prefix), head_width, past_BK.shape[1])
        edges = zip(first_edges, columns, strict=True)
        edge_E = np.concatenate([first + part.edges for first, part in edges])
        source_E = np.concatenate([n * width + part.sources for n, part in enumerate(columns)])
        tables = (ids_BQ, position_BQ, position_BK, sees_BQK)
        log_probs[edge_E] = _pass(model, cache, tables, source_E, targets[edge_E])
        if number == 0:
            past_BK = position_BK
        else:
            cache.crop(-width)
    return log_probs


def _pass(
    model: CausalLM,
    cache: Any,
    tables: Sequence[NDArray[Any]],
    source_E: Indices,
    target_E: Tokens,
) -> NDArray[np.float32]:
    """[E] log p(target | source) by a pass on what is cached.

    `tables`: ids and positions [B, Q], positions of what is there [B, K], who sees it [B, Q, K].
    """
    device = model.device
    ids, at, at_past, sees = (torch.from_numpy(table).to(device) for table in tables)
    order_E = source_E.argsort(kind="stable")
    state_N, place_E = np.unique(source_E[order_E], return_inverse=True)
    log_prob_E = np.empty(len(source_E), dtype=np.float32)

    def predict(hidden_BQD: Tensor) -> None:
        sorted_E = target_log_probs(
            OutputHead.of(model),
            hidden_BQD.flatten(0, 1)[torch.from_numpy(state_N).to(device)],
            place_E,
            target_E[order_E].astype(np.int64),
        )
        log_prob_E[order_E] = sorted_E.float().cpu().numpy()

    with head_replaced(model, predict):
        model(
            input_ids=ids,
            position_ids=at,
            attention_mask=attention_mask(model, sees, at, at_past),
            past_key_values=cache,
            use_cache=True,
        )
    return log_prob_E


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
